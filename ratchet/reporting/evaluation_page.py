"""The page of one evaluation: one HTML file without scripts or anything from outside, in MLflow beside the
run and by `ratchet gate explain`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.errors import CheckoutError, CommandError, RatchetError
from ratchet.evaluation.paired import paired_gains
from ratchet.files import read_json, write_text
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.reporting.charts import Line, Tick, intervals, nice_top
from ratchet.reporting.dashboard_view import environment, word_of
from ratchet.reporting.heatmap import heat
from ratchet.reporting.markdown import LABELS, MODELS, VERDICTS, metrics_of, speed_line
from ratchet.tracking.curve import read_history

if TYPE_CHECKING:
    import pandas as pd

LOSSES = ("train_loss", "validation_loss")
MOST_ROWS = 20


def write_evaluation_page(path: Path, found: dict[str, Any]) -> Path:
    write_text(path, render_evaluation(found))
    return path


def render_evaluation(found: dict[str, Any]) -> str:
    """`found` is `ratchet.reporting.evaluation_page.gather`'s.

    Texts of people are escaped; halves of surrogate pairs become question marks.
    """
    return (
        environment()
        .get_template("evaluation.html")
        .render(found, **_views(found))
        .encode("utf-8", "replace")
        .decode()
    )


def _views(found: dict[str, Any]) -> dict[str, Any]:
    decision = found["decision"]
    checks = [*decision["checks"], *decision.get("regions", [])]
    return {
        "verdict": VERDICTS[decision["verdict"]].partition(" ")[2],
        "labels": LABELS,
        "checks": _with_intervals(checks),
        "slices": _with_intervals(decision.get("slices", [])),
        "batches": {
            name.partition(":")[2]: part
            for name, part in found["metrics"]["slices"].items()
            if name.startswith("batch:")
        },
        "speed": speed_line(decision["speed"]) if decision.get("speed") else "",
        "curve_view": _curve(found["curve"]),
        "heat": heat(found["retention"]) if found["retention"] else None,
    }


def _with_intervals(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All gains of one metric on one axis; checks without figures have no interval."""
    whole = [
        place
        for place, check in enumerate(checks)
        if all(isinstance(check.get(key), int | float) for key in ("low", "mean", "high"))
    ]
    drawn: dict[int, Any] = {}
    axis = ["money" if check["name"] == "worth" else check["metric"] for check in checks]
    for metric in {axis[place] for place in whole}:
        places = [place for place in whole if axis[place] == metric]
        drawn |= zip(
            places,
            intervals(
                [
                    (
                        checks[place]["low"],
                        checks[place]["mean"],
                        checks[place]["high"],
                        checks[place].get("wanted"),
                    )
                    for place in places
                ]
            ),
            strict=True,
        )
    return [{**check, "drawn": drawn.get(place), **_badge(check)} for place, check in enumerate(checks)]


def _badge(check: dict[str, Any]) -> dict[str, str]:
    """What it says, and its colour: a drifted topic that is not cured failed nobody."""
    if check["name"].startswith("region:"):
        return {"word": word_of(check), "look": "unclear" if check["result"] == "fail" else check["result"]}
    return {
        "word": {"pass": "passed", "fail": "failed"}.get(check["result"], "unclear"),
        "look": check["result"],
    }


def _curve(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Losses over optimizer steps, in per cent of the chart."""
    series = {key: [(point["step"], point[key]) for point in points if key in point] for key in LOSSES}
    every = [value for part in series.values() for _, value in part]
    if not every:
        return None
    top, last = nice_top(max(every)), max(point["step"] for point in points) or 1
    lines = [
        Line([(100 * step / last, 100 - 100 * min(1.0, value / top)) for step, value in part], number)
        for number, part in enumerate(series.values())
    ]
    return {
        "lines": [line for line in lines if line.points],
        "names": [(number, key.replace("_", " ")) for number, key in enumerate(LOSSES) if series[key]],
        "heights": [Tick(100 - 25 * part, f"{top * part / 4:.3g}") for part in range(5)],
        "ticks": [Tick(100 * part / 4, f"{last * part / 4:.0f}") for part in (1, 2, 3)],
        "last": last,
    }


def gather(folder: Path, name: str, retention: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a workspace, or of what `fetched` brought.

    Raises RatchetError when the gate's verdict or the metrics are not there.
    """
    decision, metrics = (
        read_json(folder / "reports/gate.json"),
        read_json(folder / "reports/evaluation/metrics.json"),
    )
    moved: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    fault = ""
    try:
        moved = _moved(folder / "reports/evaluation/scores.parquet", decision)
    except (RatchetError, OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        fault = " ".join(str(error).split())
    return {
        "name": name,
        "decision": decision,
        "metrics": metrics,
        "metric": decision["checks"][0]["metric"],
        "models": [model for model in MODELS if model in metrics["slices"]["test"]],
        "tables": {
            part: [(key, metrics["slices"][part]) for key in metrics_of(metrics["slices"][part])]
            for part in ("test", "golden")
            if part in metrics["slices"]
        },
        "better": moved[0],
        "worse": moved[1],
        "rows_fault": fault,
        "curve": read_history(folder / "reports/train/history.jsonl"),
        "retention": retention if retention and retention["versions"] else None,
    }


def _moved(path: Path, decision: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows that got better, rows that got worse), those that moved furthest first; of equal ones those whose
    likelihood moved further.
    """
    import pandas as pd

    scores, rival, metric = pd.read_parquet(path), decision["rival"]["model"], decision["checks"][0]["metric"]
    gains = pd.Series(
        paired_gains(scores, rival, metric), index=sorted(scores.id[scores.model == "candidate"])
    )
    mine, theirs = (scores[scores.model == model].set_index("id") for model in ("candidate", rival))
    order = pd.DataFrame(
        {"gain": gains, "nll": (theirs.answer_nll - mine.answer_nll).reindex(gains.index).fillna(0.0)}
    )
    best = order[order.gain > 0].sort_values(["gain", "nll"], ascending=False, kind="stable").head(MOST_ROWS)
    worst = order[order.gain < 0].sort_values(["gain", "nll"], kind="stable").head(MOST_ROWS)
    return _rows(best, mine, theirs), _rows(worst, mine, theirs)


def _rows(found: pd.DataFrame, mine: pd.DataFrame, theirs: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            "id": str(id_),
            "batch": str(mine.batch[id_]),
            "gain": float(row.gain),
            "question": str(mine.question[id_]),
            "wanted": str(mine.reference[id_]),
            "before": str(theirs.answer[id_]),
            "now": str(mine.answer[id_]),
        }
        for id_, row in found.iterrows()
    ]


@contextmanager
def fetched(root: Path, commit: str) -> Iterator[Path]:
    """The reports of a commit, in a folder that goes. Raises CheckoutError."""
    with tempfile.TemporaryDirectory(prefix="ratchet-explain-") as scratch:
        folder = Path(scratch)
        try:
            write_text(folder / "reports/gate.json", git(root, "show", f"{commit}:reports/gate.json"))
            for part in ("reports/evaluation", "reports/train"):
                get_output(root, commit, part, folder / part)
        except CommandError as error:
            raise CheckoutError(
                f"the reports of {commit[:8]} cannot be had: {' '.join(str(error).split())[:200]}",
                remedy="dvc pull brings what another machine made; `git fetch --unshallow` history",
            ) from None
        yield folder
