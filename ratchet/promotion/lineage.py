"""Which versions learned from rows: by the training rows of a version's own commit where they can be read, by
its batches otherwise.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.data.erasure import GOLDEN, Entry
from ratchet.data.examples import read_examples
from ratchet.errors import RatchetError
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.tracking.registry import Version

PREPARED, TRAIN = "data/prepared", "data/prepared/train.jsonl"
COMMIT = re.compile(r"[0-9a-f]{7,64}")  # a tag is anybody's text, and git takes some texts for options
STARTED_FROM = "started_from"  # tag: sha256 of the adapter that the weights went on from, or `base`


class Trace(NamedTuple):
    """What one version has of the rows.

    `exact`: told by its training rows, otherwise only its batches are known. `parent`: the version whose
    marked weights it went on from.
    """

    version: int
    rows: int
    exact: bool
    parent: int | None
    at: str  # of the newest entry that it is about
    reason: str


def trace(root: Path, versions: list[Version], entries: tuple[Entry, ...]) -> list[Trace]:
    """Return the versions that learned from any of `entries`, the oldest first.

    The checkout at `root` has the commits, its DVC cache or remote the rows.
    """
    trained, found, weights = TrainingRows(root), dict[int, Trace](), dict[str, int]()
    for version in sorted(versions, key=lambda version: version.number):
        ids = trained.at(version.tags.get("git_commit", ""))
        learned = _learned(entries, ids, version)
        parent = weights.get(version.tags.get(STARTED_FROM, ""))
        if learned or parent is not None:
            newest = max(learned or entries, key=lambda entry: entry.at)
            count = len({entry.ids[0] if entry.ids else (entry.batch, entry.line) for entry in learned})
            found[version.number] = Trace(
                version.number, count, ids is not None, parent, newest.at, newest.reason
            )
            if adapter := version.tags.get("adapter_sha256"):
                weights.setdefault(adapter, version.number)
    return list(found.values())


def _learned(entries: tuple[Entry, ...], ids: frozenset[str] | None, version: Version) -> list[Entry]:
    """Return the forgotten rows that the version learned from; golden rows are scored, never learned from."""
    if ids is not None:
        return [entry for entry in entries if not ids.isdisjoint(entry.ids)]
    batches = _batches(version)
    return [entry for entry in entries if entry.batch != GOLDEN and entry.batch in batches]


def _batches(version: Version) -> set[str]:
    try:
        found = json.loads(version.tags.get("batches", "[]"))
    except ValueError:
        return set()
    return {str(name) for name in found} if isinstance(found, list) else set()


class TrainingRows:
    """The ids of a commit's training rows; commits with the same data are read once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, frozenset[str] | None] = {}

    def at(self, commit: str) -> frozenset[str] | None:
        """Return the ids of the commit's training rows.

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

    def _read(self, commit: str) -> frozenset[str] | None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "train.jsonl"
            try:
                get_output(self._root, commit, TRAIN, out)
                return frozenset(example.id for example in read_examples(out))
            except RatchetError:
                return None
