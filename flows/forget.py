"""Forget rows: on the erasure list by a data commit, out of the next training, and marked on every version
that learned from them.

No Prefect run stands behind it: somebody's wish to be forgotten must not need a server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flows.events import COMMITTED, tell
from flows.retries import on_top
from ratchet.config.params import Config
from ratchet.data.erasure import FILE, Forgotten, read_forgotten, write_forgotten
from ratchet.errors import ServiceError, UserError
from ratchet.files import write_text
from ratchet.pipeline.checkout import locked, who
from ratchet.pipeline.dvc import Workspace, configured_remote
from ratchet.pipeline.workspace import land, open_workspace
from ratchet.promotion.lineage import Trace, trace
from ratchet.tracking.registry import list_versions
from tasks import forget as tasks

Say = Callable[[str], None]
RAW, GOLDEN = Path("data/raw"), Path("data/golden.jsonl")
PENDING = ".ratchet/forget-pending"


class Done(NamedTuple):
    """`rows` are new on the list.

    `versions` learned from rows that are on it; None when MLflow did not answer, and the next retraining
    marks them.
    """

    rows: int
    commit: str
    versions: list[Trace] | None


def find_rows(root: Path, config: Config, query: tasks.Query, say: Say) -> list[tasks.Found]:
    """Find the rows that match `query`, in every batch and in the golden set of the newest commit.

    Raises UserError when there is none.
    """
    with open_workspace(root, "forget", say, keep_failed=0) as workspace:
        if (workspace.path / f"{RAW}.dvc").exists():
            verb = "pull" if configured_remote(root) else "checkout"
            workspace.dvc(verb, "--quiet", f"{RAW}.dvc")
        found = tasks.find(workspace.path / RAW, workspace.path / GOLDEN, query, config.prepare)
    if not found:
        raise UserError(
            "no row of any batch, and no golden row, is like that",
            remedy="the pattern is searched in texts as they are normalised (NFC); (?i) ignores case",
        )
    return found


def forget_rows(root: Path, config: Config, found: list[tasks.Found], *, reason: str, say: Say) -> Done:
    """Put the rows on the list of forgotten ones, and mark the versions in MLflow that learned from them.

    Rows that are on the list already change nothing, so that it can be run again. Raises what the checkout
    raises; MLflow may be away.
    """

    def put_on_list() -> tuple[int, str]:
        with open_workspace(root, "forget", say, keep_failed=0) as workspace:
            return _land(workspace, found, reason)

    with locked(root, "ingest"):
        rows, commit = on_top(put_on_list, say)
    if rows and config.retrain.on_data:
        tell(COMMITTED, config, {"reason": f"{rows} rows are to be forgotten", "commit": commit})
    return Done(rows, commit, follow_list(root, config, say))


def _land(workspace: Workspace, found: list[tasks.Found], reason: str) -> tuple[int, str]:
    known = read_forgotten(workspace.path / FILE)
    longer = tasks.extend(known, found, reason=reason, by=who(workspace.root))
    rows = len(longer.entries) - len(known.entries)
    if not rows:
        return 0, workspace.git("rev-parse", "HEAD").strip()
    write_forgotten(workspace.path / FILE, longer)
    return rows, land(workspace, f"Forget {rows} row{'s' * (rows > 1)}\n\n{reason}", [str(FILE)])


def list_is_pending(root: Path) -> bool:
    """Return whether versions in MLflow still have to be marked."""
    return (root / PENDING).exists()


def follow_list(root: Path, config: Config, say: Say) -> list[Trace] | None:
    """Mark every version that learned from rows on the list; None, and a mark for the next retraining, when
    MLflow does not answer.
    """
    pending, forgotten = root / PENDING, read_forgotten(root / FILE)
    if not forgotten.entries:
        return []
    try:
        found = _trace(root, config, forgotten)
        tasks.mark(config.project.name, found)
        pending.unlink(missing_ok=True)
        return found
    except ServiceError as error:
        write_text(pending, f"{len(forgotten.entries)} rows\n")
        say(f"the versions are marked later, by the next `ratchet retrain` or `ratchet data erase`: {error}")
        return None


def _trace(root: Path, config: Config, forgotten: Forgotten) -> list[Trace]:
    return trace(root, list_versions(config.project.name), forgotten.entries)


def summary(done: Done, found: list[tasks.Found]) -> dict[str, Any]:
    """Return what `--json` prints."""
    versions = None if done.versions is None else [entry._asdict() for entry in done.versions]
    return {
        "found": [row.place for row in found],
        "forgotten": done.rows,
        "commit": done.commit,
        "versions": versions,
    }
