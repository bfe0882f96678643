"""Judge the last candidate again on more rows: `ratchet gate more`.

The rows come in as a held-out batch, which nothing is ever trained on. So the next retraining finds the
training's inputs unchanged, asks candidate and champion the new rows alone, and decides on all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows.console import say
from flows.ingest import Ingested, ingest
from flows.outage import run_flow
from flows.retrain import Retrained, retrain
from ratchet.errors import UserError
from ratchet.pipeline.dvc import check_out, stale_stages
from ratchet.pipeline.workspace import open_workspace
from ratchet.promotion.champion import read_champion
from ratchet.promotion.verdict import Verdict, read_verdict
from tasks.pin import TRAINING

VERDICT = Path("reports/gate.json")


def open_verdict(root: Path) -> Verdict:
    """Return the last verdict. Raises UserError unless more rows could change it."""
    if not (root / VERDICT).exists():
        raise UserError("no candidate was judged in this checkout yet", remedy="ratchet retrain")
    verdict, champion = read_verdict(root / VERDICT), read_champion(root)
    if verdict.verdict != "uncertain":
        raise UserError(
            f"the last verdict is `{verdict.verdict}`: more rows are for one that is `uncertain`",
            remedy="`ratchet gate explain` says why it was decided so",
        )
    if verdict.rival.version != (champion.version if champion else None):
        raise UserError(
            f"the last candidate was compared with {verdict.rival.told}, which is not in charge any more",
            remedy="ratchet retrain --force compares it with today's champion",
        )
    return verdict


def judge_on_more(root: Path, *, like: str | None = None, **source: Any) -> tuple[Ingested, Retrained | None]:
    """Hold out the rows of a source, and judge the last candidate again; None: the rows were there already.

    `like` and `source`: see `ingest`. Raises UserError when the next retraining would train anew, so that its
    candidate would be another one; the errors of `ingest` and `retrain`.
    """
    open_verdict(root)
    with open_workspace(root, "gate", say, keep_failed=0) as workspace:
        check_out(workspace)
        if stale := sorted(stale_stages(workspace) & TRAINING):
            raise UserError(
                f"rows, settings or code have changed since the candidate was trained ({', '.join(stale)}): "
                "another one would be trained and judged",
                remedy="ratchet retrain; if its verdict is `uncertain`, ratchet gate more",
            )
    taken = run_flow(ingest, root=str(root), held_out=True, like=like, **source)
    if not taken["new"]:
        return taken, None
    return taken, run_flow(retrain, root=str(root), reason=f"more rows for the gate: {taken['batch']}")
