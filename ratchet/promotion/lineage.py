"""Find the versions that learned from given rows or batches.

The training rows of a version's own commit tell it exactly; where they cannot be read, the version's list of
batches is used.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.data.batches import REVERTED, Reverted, decode_reverted, read_reverted
from ratchet.data.erasure import GOLDEN, Entry
from ratchet.data.examples import read_examples
from ratchet.data.mixture import undesirable
from ratchet.errors import RatchetError
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.tracking.registry import Version

PREPARED, TRAIN = "data/prepared", "data/prepared/train.jsonl"
BAD = f"{PREPARED}/{undesirable('train')}.jsonl"
COMMIT = re.compile(r"[0-9a-f]{7,64}")  # anybody can write a tag, and git would take some texts for options
TAUGHT_BY = "taught_by"  # tag: JSON list of the nodes of a federation whose share is in the weights
STARTED_FROM = "started_from"  # tag: sha256 of the adapter that the training started from, or `base`


class Trace(NamedTuple):
    """What one version learned of the rows.

    `exact`: known from its training rows; otherwise only its batches are known. `parent`: the version whose
    marked weights it started from.
    """

    version: int
    rows: int
    exact: bool
    parent: int | None
    at: str  # time of the newest entry that concerns the version
    reason: str


class Learned(NamedTuple):
    """How many of the rows in question a version's own training had, and the newest entry about them."""

    rows: int
    at: str
    reason: str


def trace(root: Path, versions: list[Version], entries: tuple[Entry, ...]) -> list[Trace]:
    """Return the versions that learned from any erased row of `entries`, the oldest first.

    The checkout at `root` has the commits; its DVC cache or remote has the rows.
    """

    def learned(version: Version, rows: Rows | None) -> Learned:
        found = _learned(entries, rows, version)
        count = len({entry.ids[0] if entry.ids else (entry.batch, entry.line) for entry in found})
        newest = max(found or entries, key=lambda entry: entry.at)
        return Learned(count, newest.at, newest.reason)

    return _follow(root, versions, learned)


def trace_batches(root: Path, versions: list[Version], reverted: Sequence[Reverted]) -> list[Trace]:
    """Return the versions that learned from any batch that was taken back, the oldest first."""

    def learned(version: Version, rows: Rows | None) -> Learned:
        batches = _batches(version)
        counts = {
            entry: (rows.batches[entry.batch] if rows else entry.rows * (entry.batch in batches))
            for entry in reverted
        }
        newest = max([entry for entry in reverted if counts[entry]] or reverted, key=lambda entry: entry.at)
        return Learned(sum(counts.values()), newest.at, newest.reason)

    return _follow(root, versions, learned)


def _follow(
    root: Path, versions: list[Version], learned: Callable[[Version, Rows | None], Learned]
) -> list[Trace]:
    trained, found, weights = TrainingRows(root), dict[int, Trace](), dict[str, int]()
    for version in sorted(versions, key=lambda version: version.number):
        rows = trained.at(version.tags.get("git_commit", ""))
        own = learned(version, rows)
        parent = weights.get(version.tags.get(STARTED_FROM, ""))
        if own.rows or parent is not None:
            found[version.number] = Trace(
                version.number, own.rows, rows is not None, parent, own.at, own.reason
            )
            if adapter := version.tags.get("adapter_sha256"):
                weights.setdefault(adapter, version.number)
    return list(found.values())


def _learned(entries: tuple[Entry, ...], rows: Rows | None, version: Version) -> list[Entry]:
    """Return the erased rows that the version learned from; golden rows are only scored, never learned."""
    if rows is not None:
        return [entry for entry in entries if not rows.ids.isdisjoint(entry.ids)]
    batches = _batches(version)
    return [entry for entry in entries if entry.batch != GOLDEN and entry.batch in batches]


def taught_by(versions: list[Version], node: str) -> list[int]:
    """Return the versions whose weights hold the share of a federation's node, the oldest first."""
    found = (version.number for version in versions if node in json.loads(version.tags.get(TAUGHT_BY, "[]")))
    return sorted(found)


def reverted_since(root: Path, commit: str) -> list[Reverted]:
    """Return the batches that `commit` had and that were taken back after it; this needs only git."""
    entries = read_reverted(root)
    if not entries or not COMMIT.fullmatch(commit):
        return []
    try:
        known = {entry.batch for entry in decode_reverted(git(root, "show", f"{commit}:{REVERTED}").encode())}
    except RatchetError:  # there was no such file yet
        known = set()
    return [entry for entry in entries if entry.batch not in known and _had(root, commit, entry)]


def _had(root: Path, commit: str, entry: Reverted) -> bool:
    """Return whether `commit` contains the commit that added the batch; yes where git cannot tell."""
    if not COMMIT.fullmatch(entry.came):
        return True
    try:
        return git(root, "merge-base", entry.came, commit).strip() == entry.came
    except RatchetError:
        return False


def _batches(version: Version) -> set[str]:
    try:
        found = json.loads(version.tags.get("batches", "[]"))
    except ValueError:
        return set()
    return {str(name) for name in found} if isinstance(found, list) else set()


class Rows(NamedTuple):
    """Training rows: their ids, and how many came with each batch."""

    ids: frozenset[str]
    batches: Counter[str]


class TrainingRows:
    """A commit's training rows; commits with the same data are read once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, Rows | None] = {}

    def at(self, commit: str) -> Rows | None:
        """Return the commit's training rows.

        None when they cannot be read: there is no such commit here, or its data are gone.
        """
        digest = self._digest(commit) if COMMIT.fullmatch(commit) else ""
        if not digest:
            return None
        if digest not in self._known:
            self._known[digest] = self._read(commit)
        return self._known[digest]

    def _digest(self, commit: str) -> str:
        """Return DVC's hash of the commit's prepared data; empty when it cannot be read."""
        try:
            lock: Any = YAML(typ="safe").load(git(self._root, "show", f"{commit}:dvc.lock"))
            return next(
                (str(out["md5"]) for out in lock["stages"]["prepare"]["outs"] if out["path"] == PREPARED), ""
            )
        except (RatchetError, YAMLError, KeyError, TypeError):
            return ""

    def _read(self, commit: str) -> Rows | None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "train.jsonl"
            try:
                get_output(self._root, commit, TRAIN, out)
                found = [(example.id, str(example.meta.get("batch"))) for example in read_examples(out)]
            except RatchetError:
                return None
            with suppress(RatchetError):  # releases before preferences wrote no such file
                get_output(self._root, commit, BAD, out)
                found += [(example.id, str(example.meta.get("batch"))) for example in read_examples(out)]
        return Rows(frozenset(id for id, _ in found), Counter(batch for _, batch in found))
