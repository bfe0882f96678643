"""One evaluation, gathered to be looked at: the verdict, the figures with their intervals, the rows that moved, the curve, the ledger."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.errors import CheckoutError, CommandError, RatchetError
from ratchet.evaluation.paired import paired_gains
from ratchet.files import read_json, write_text
from ratchet.pipeline.workspace import dvc, git
from ratchet.reporting.markdown import MODELS, metrics_of
from ratchet.tracking.mlflow import read_history

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 20


def gather(folder: Path, name: str, ledger: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a workspace, or of what `fetched` brought. Raises RatchetError when the gate's verdict or the metrics are not there."""
    decision, metrics = read_json(folder / "reports/gate.json"), read_json(folder / "reports/evaluation/metrics.json")
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
        "tables": {part: [(key, metrics["slices"][part]) for key in metrics_of(metrics["slices"][part])] for part in ("test", "golden") if part in metrics["slices"]},
        "better": moved[0],
        "worse": moved[1],
        "rows_fault": fault,
        "curve": read_history(folder / "reports/train/history.jsonl"),
        "ledger": ledger if ledger and ledger["versions"] else None,
    }


def _moved(path: Path, decision: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows that got better, rows that got worse), those that moved furthest first; of equal ones those whose likelihood moved further."""
    import pandas as pd

    scores, rival, metric = pd.read_parquet(path), decision["rival"]["model"], decision["checks"][0]["metric"]
    gains = pd.Series(paired_gains(scores, rival, metric), index=sorted(scores.id[scores.model == "candidate"]))
    mine, theirs = (scores[scores.model == model].set_index("id") for model in ("candidate", rival))
    order = pd.DataFrame({"gain": gains, "nll": (theirs.answer_nll - mine.answer_nll).reindex(gains.index).fillna(0.0)})
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
                dvc(root, "get", "--quiet", ".", part, "--rev", commit, "--out", str(folder / part))
        except CommandError as error:
            raise CheckoutError(
                f"the reports of {commit[:8]} cannot be had: {' '.join(str(error).split())[:200]}",
                remedy="dvc pull brings what another machine made; `git fetch --unshallow` history",
            ) from None
        yield folder
