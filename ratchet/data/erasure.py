"""The erasure list, data/forgotten.jsonl: hashes and places of rows that no model may learn from again.

A row is recognised by the hash of its content, so that copies in other batches are left out too, and by its
place (batch and line), so that a later change of text normalisation, which changes hashes, cannot bring it
back. Golden rows are recognised by hash alone, since other rows may take their lines in a new golden set.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.errors import DataError
from ratchet.files import write_bytes

FILE = Path("data/forgotten.jsonl")
GOLDEN = "golden"  # in place of a batch's name, for golden rows


class Entry(msgspec.Struct, frozen=True):
    """One line of the list.

    `ids` are the hashes of the row as written and as prepared (sanitised, masked); empty for a row that is
    not a valid example. `at` is UTC, ISO 8601.
    """

    ids: list[str]
    batch: str
    line: int
    reason: str
    by: str
    at: str


class Forgotten:
    """The erasure list in memory, indexed by id and by place."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self.ids = frozenset(id for entry in self.entries for id in entry.ids)
        self.places = frozenset((entry.batch, entry.line) for entry in self.entries)

    def holds(self, example_id: str, batch: str, line: int) -> bool:
        """Tell whether a row is on the list; `example_id` is empty for an invalid row."""
        return example_id in self.ids or (batch != GOLDEN and (batch, line) in self.places)


def read_forgotten(path: Path) -> Forgotten:
    """Read the list. Raises DataError for a broken line, since part of a list would let rows back in."""
    if not path.exists():
        return Forgotten()
    try:
        return Forgotten(
            msgspec.json.decode(line, type=Entry) for line in path.read_bytes().split(b"\n") if line.strip()
        )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} holds a line that is no entry: {error}", remedy=f"restore it: git checkout {FILE}"
        ) from None


def write_forgotten(path: Path, forgotten: Forgotten) -> None:
    write_bytes(path, (msgspec.json.encode(entry) + b"\n" for entry in forgotten.entries))
