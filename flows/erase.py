"""Erase rows and take batches back: by a data commit, with a mark on every version that learned from them.

The next training leaves the rows out. This needs no Prefect run, because a request for erasure must not
depend on a server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flows.events import COMMITTED, tell
from flows.retries import on_top
from ratchet.config.params import Config
from ratchet.data.batches import REVERTED, Batch, read_reverted, write_reverted
from ratchet.data.erasure import FILE, read_forgotten, write_forgotten
from ratchet.errors import ServiceError, UserError
from ratchet.files import write_text
from ratchet.pipeline.checkout import locked, who
from ratchet.pipeline.dvc import Workspace, bring, push_data
from ratchet.pipeline.workspace import land, open_workspace
from ratchet.promotion.lineage import Trace, trace, trace_batches
from ratchet.tracking.registry import Version, list_versions
from tasks import erase as tasks

Say = Callable[[str], None]
RAW, GOLDEN = Path("data/raw"), Path("data/golden.jsonl")
PENDING = {tag: Path(f".ratchet/{tag}-pending") for tag in (tasks.TAG, tasks.REVERTED_TAG)}


class Done(NamedTuple):
    """The result of an erasure; `rows` are new on the list.

    `versions` learned from rows on the list. It is None when MLflow did not answer; then the next retraining
    marks them.
    """

    rows: int
    commit: str
    versions: list[Trace] | None


class Taken(NamedTuple):
    """A batch that was taken back; `golden` of its rows stay in the golden set. `versions`: as in `Done`."""

    batch: Batch
    golden: int
    commit: str
    versions: list[Trace] | None


def find_rows(root: Path, config: Config, query: tasks.Query, say: Say) -> list[tasks.Found]:
    """Find the rows that match `query`, in every batch and in the golden set of the newest commit.

    Raises UserError when there is none.
    """
    with open_workspace(root, "forget", say, keep_failed=0) as workspace:
        bring(workspace, str(RAW))
        found = tasks.find(workspace.path / RAW, workspace.path / GOLDEN, query, config.prepare)
    if not found:
        raise UserError(
            "no row of any batch, and no golden row, is like that",
            remedy="the pattern is searched in texts as they are normalised (NFC); (?i) ignores case",
        )
    return found


def erase_rows(root: Path, config: Config, found: list[tasks.Found], *, reason: str, say: Say) -> Done:
    """Put the rows on the erasure list, and mark the versions in MLflow that learned from them.

    Rows that are on the list already change nothing, so the call can be repeated. MLflow may be down. Raises
    the errors of the checkout.
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
    write_text(workspace.root / PENDING[tasks.TAG], "")  # before it lands, in case this process is killed
    return rows, land(workspace, f"Forget {rows} row{'s' * (rows > 1)}\n\n{reason}", [str(FILE)])


def revert_batch(root: Path, config: Config, name: str, *, reason: str, say: Say) -> Taken:
    """Take a batch back by a new commit, keep the batches after it, and mark the versions that learned from
    it.

    `name` may be the beginning of one batch's name. Raises UserError when there is no such batch.
    """

    def take_back() -> tuple[Batch, int, str]:
        with open_workspace(root, "revert", say, keep_failed=0) as workspace:
            return _land_without(workspace, name, reason, say)

    with locked(root, "ingest"):
        batch, golden, commit = on_top(take_back, say)
    if config.retrain.on_data:
        tell(COMMITTED, config, {"reason": f"batch {batch.name} was taken back", "commit": commit})
    return Taken(batch, golden, commit, follow_reverted(root, config, say))


def _land_without(workspace: Workspace, name: str, reason: str, say: Say) -> tuple[Batch, int, str]:
    bring(workspace, str(RAW))
    raw = workspace.path / RAW
    batch = tasks.find_batch(raw, name)
    golden = tasks.count_golden(raw, batch, workspace.path / GOLDEN)
    came = workspace.git("log", "-1", "--format=%H", "--fixed-strings", f"--grep=Batch: {batch.name}").strip()
    entry = tasks.revert(raw, batch, came=came, reason=reason, by=who(workspace.root))
    write_reverted(workspace.path, [*read_reverted(workspace.path), entry])
    workspace.dvc("add", "--quiet", str(RAW))
    push_data(workspace, say)
    write_text(workspace.root / PENDING[tasks.REVERTED_TAG], "")
    subject = f"Take back {batch.rows} rows of {batch.name}"[:72]
    message = f"{subject}\n\n{reason}\n\nReverts-batch: {batch.name}"
    return batch, golden, land(workspace, message, [f"{RAW}.dvc", str(REVERTED)])


def list_is_pending(root: Path) -> bool:
    """Return whether versions in MLflow still have to be marked."""
    return any((root / pending).exists() for pending in PENDING.values())


def follow_list(root: Path, config: Config, say: Say) -> list[Trace] | None:
    """Mark every version that learned from rows on the list.

    Return None when MLflow does not answer, and leave a note for the next retraining.
    """
    entries = read_forgotten(root / FILE).entries
    return _mark(root, config, say, tasks.TAG, lambda known: trace(root, known, entries)) if entries else []


def follow_reverted(root: Path, config: Config, say: Say) -> list[Trace] | None:
    """Mark every version that learned from a batch that was taken back; None as for `follow_list`."""
    entries = read_reverted(root)
    if not entries:
        return []
    return _mark(root, config, say, tasks.REVERTED_TAG, lambda known: trace_batches(root, known, entries))


def follow_all(root: Path, config: Config, say: Say) -> None:
    """Mark the versions that either list concerns."""
    follow_list(root, config, say)
    follow_reverted(root, config, say)


def _mark(
    root: Path, config: Config, say: Say, tag: str, find: Callable[[list[Version]], list[Trace]]
) -> list[Trace] | None:
    try:
        found = find(list_versions(config.project.name))
        tasks.mark(config.project.name, found, tag)
        (root / PENDING[tag]).unlink(missing_ok=True)
        return found
    except ServiceError as error:
        write_text(root / PENDING[tag], "")
        say(f"the versions are marked later, by the next `ratchet retrain`: {error}")
        return None


def summary(done: Done, found: list[tasks.Found]) -> dict[str, Any]:
    """Return what `--json` prints."""
    versions = None if done.versions is None else [entry._asdict() for entry in done.versions]
    return {
        "found": [row.place for row in found],
        "forgotten": done.rows,
        "commit": done.commit,
        "versions": versions,
    }
