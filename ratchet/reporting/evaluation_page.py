"""Make the page of one evaluation: one HTML file without scripts and without anything from outside.

It is beside the run in MLflow, and `ratchet gate explain` writes it. The pages that a checkout keeps are
linked by the project's page.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ratchet.errors import CheckoutError, CommandError, RatchetError
from ratchet.evaluation.paired import paired_gains
from ratchet.evaluation.report import Metrics, Summary, read_metrics
from ratchet.evaluation.statistics import Interval
from ratchet.federation.records import Round, read_trained_rounds
from ratchet.files import write_text
from ratchet.media.names import in_words
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Check, Verdict, read_verdict
from ratchet.reporting.charts import Line, Tick, nice_top
from ratchet.reporting.dashboard_view import draw_checks, environment, word_of
from ratchet.reporting.heatmap import heat
from ratchet.reporting.markdown import LABELS, MODELS, VERDICTS, metrics_of
from ratchet.reporting.retention import Retention
from ratchet.tracking.curve import Point, read_history

if TYPE_CHECKING:
    import pandas as pd

LOSSES = ("train_loss", "validation_loss")
PARTS = ("test", "golden")
MOST_ROWS = 20
KEPT = Path(".ratchet/evaluations")
MOST_KEPT = 200  # pages; each has some 100 KB


Cells = list[Interval | None]  # one per model


class Moved(msgspec.Struct, frozen=True):
    """A row whose score changed: its question, the reference, the rival's answer and the candidate's."""

    id: str
    batch: str
    gain: float
    question: str
    wanted: str
    before: str
    now: str


class Evaluated(msgspec.Struct, frozen=True):
    """An evaluation as people see it; `rows_fault` says why the changed rows cannot be read."""

    name: str
    decision: Verdict
    metrics: Metrics
    better: list[Moved]
    worse: list[Moved]
    rows_fault: str
    curve: list[Point]
    retention: Retention | None
    rounds: list[Round]  # of a federation
    promoted: bool = False  # whether the version was ever in charge, as far as it was known then

    @property
    def sentence(self) -> str:
        return tell_verdict(self.decision, promoted=self.promoted)

    @property
    def metric(self) -> str:
        return self.decision.success.metric

    @property
    def models(self) -> list[str]:
        return [model for model in MODELS if model in self.metrics.slices["test"]]

    @property
    def tables(self) -> dict[str, list[tuple[str, Cells]]]:
        """Return (metric, cells) for the test and the golden rows."""
        parts = {part: self.metrics.slices[part] for part in PARTS if part in self.metrics.slices}
        return {
            name: [(key, self._cells(part, key)) for key in metrics_of(part)] for name, part in parts.items()
        }

    @property
    def batches(self) -> list[tuple[str, Cells]]:
        """Return (batch, cells) of the success metric."""
        return [(name, self._cells(part, self.metric)) for name, part in self.metrics.batches.items()]

    def _cells(self, part: dict[str, Summary], key: str) -> Cells:
        return [part[model].scores.get(key) if model in part else None for model in self.models]

    def to_json(self) -> dict[str, object]:
        metrics = self.metrics.to_json()
        return {
            **msgspec.to_builtins(self),
            "sentence": self.sentence,
            "metrics": metrics,
            "metric": self.metric,
            "models": self.models,
            "tables": {
                part: [(key, metrics["slices"][part]) for key, _ in rows]
                for part, rows in self.tables.items()
            },
        }


def write_evaluation_page(path: Path, found: Evaluated) -> Path:
    write_text(path, render_evaluation(found))
    return path


def keep_page(root: Path, found: Evaluated) -> Path:
    """Write the page where the project's page links it; the oldest pages make room."""
    path = write_evaluation_page(root / kept_page(found.decision), found)
    pages = sorted((root / KEPT).glob("*.html"), key=lambda page: page.stat().st_mtime)
    for old in pages[:-MOST_KEPT]:
        old.unlink(missing_ok=True)
    return path


def kept_page(verdict: Verdict) -> Path:
    """Return the place of the page in the checkout: one for each candidate and rival."""
    candidate = re.sub(r"[^0-9a-f]", "", verdict.candidate.adapter_sha256)[:12]
    rival = verdict.rival.version
    return KEPT / f"{candidate}-against-{'base' if rival is None else f'v{rival}'}.html"


def render_evaluation(found: Evaluated) -> str:
    """Render the page as HTML.

    Texts of people are escaped; halves of surrogate pairs become question marks.
    """
    decision = found.decision
    return (
        environment()
        .get_template("evaluation.html")
        .render(
            found=found,
            decision=decision,
            verdict=VERDICTS[decision.verdict].partition(" ")[2],
            labels=LABELS,
            checks=[
                (check, drawn, *_badge(check))
                for check, drawn in draw_checks([*decision.checks, *decision.regions])
            ],
            slices=draw_checks(decision.slices),
            curve=_curve(found.curve),
            heat=heat(found.retention) if found.retention else None,
        )
        .encode("utf-8", "replace")
        .decode()
    )


def _badge(check: Check) -> tuple[str, str]:
    """Return the word on the check's badge, and its colour.

    A drifted topic that did not improve is shown as unclear, because no candidate fails for it.
    """
    if check.name.startswith("region:"):
        return word_of(check), "unclear" if check.result == "fail" else check.result
    return {"pass": "passed", "fail": "failed"}.get(check.result, "unclear"), check.result


class Curve(NamedTuple):
    """Losses over optimizer steps, in per cent of the chart; `names` gives the number of each line."""

    lines: list[Line]
    names: list[tuple[int, str]]
    heights: list[Tick]
    ticks: list[Tick]
    last: float


def _curve(points: Sequence[Point]) -> Curve | None:
    series = {key: [(point["step"], point[key]) for point in points if key in point] for key in LOSSES}
    every = [value for part in series.values() for _, value in part]
    if not every:
        return None
    top, last = nice_top(max(every)), max(point["step"] for point in points) or 1
    lines = [
        Line([(100 * step / last, 100 - 100 * min(1.0, value / top)) for step, value in part], number)
        for number, part in enumerate(series.values())
    ]
    return Curve(
        [line for line in lines if line.points],
        [(number, key.replace("_", " ")) for number, key in enumerate(LOSSES) if series[key]],
        [Tick(100 - 25 * part, f"{top * part / 4:.3g}") for part in range(5)],
        [Tick(100 * part / 4, f"{last * part / 4:.0f}") for part in (1, 2, 3)],
        last,
    )


def gather(folder: Path, name: str, retention: Retention | None = None) -> Evaluated:
    """Gather the contents of the page from a workspace, or from a folder that `fetched` yields.

    Raises RatchetError when the gate's verdict or the metrics are missing.
    """
    decision = read_verdict(folder / "reports/gate.json")
    metrics = read_metrics(folder / "reports/evaluation")
    better, worse, fault = list[Moved](), list[Moved](), ""
    try:
        better, worse = _moved(folder / "reports/evaluation/scores.parquet", decision)
    except (RatchetError, OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
        fault = " ".join(str(error).split())
    return Evaluated(
        name,
        decision,
        metrics,
        better,
        worse,
        fault,
        read_history(folder / "reports/train/history.jsonl"),
        retention if retention and retention.versions else None,
        read_trained_rounds(folder / "reports/train"),
    )


def _moved(path: Path, decision: Verdict) -> tuple[list[Moved], list[Moved]]:
    """Return (rows that improved, rows that got worse); those that changed most come first.

    Among equal changes of the score, rows whose likelihood changed more come first.
    """
    import pandas as pd

    scores, rival = pd.read_parquet(path), decision.rival.model
    gains = pd.Series(
        paired_gains(scores, rival, decision.success.metric),
        index=sorted(scores.id[scores.model == "candidate"]),
    )
    mine, theirs = (scores[scores.model == model].set_index("id") for model in ("candidate", rival))
    order = pd.DataFrame(
        {"gain": gains, "nll": (theirs.answer_nll - mine.answer_nll).reindex(gains.index).fillna(0.0)}
    )
    best = order[order.gain > 0].sort_values(["gain", "nll"], ascending=False, kind="stable").head(MOST_ROWS)
    worst = order[order.gain < 0].sort_values(["gain", "nll"], kind="stable").head(MOST_ROWS)
    return _rows(best, mine, theirs), _rows(worst, mine, theirs)


def _rows(found: pd.DataFrame, mine: pd.DataFrame, theirs: pd.DataFrame) -> list[Moved]:
    return [
        Moved(
            str(id_),
            str(mine.batch[id_]),
            float(row.gain),
            question=in_words(str(mine.question[id_])).strip(),
            wanted=str(mine.reference[id_]),
            before=str(theirs.answer[id_]),
            now=str(mine.answer[id_]),
        )
        for id_, row in found.iterrows()
    ]


@contextmanager
def fetched(root: Path, commit: str) -> Iterator[Path]:
    """Yield a temporary folder with the reports of a commit. Raises CheckoutError."""
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
