"""The erasure list, data/forgotten.jsonl: hashes and places of rows that no model may learn from again.

A row is known by the hash of its content, so that copies of it in other batches are left out too, and by its
place, so that another normalisation of texts cannot bring it back. Golden rows are known by their hash alone:
another golden set may take their lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from ratchet.errors import DataError
from ratchet.files import write_bytes

FILE = Path("data/forgotten.jsonl")
GOLDEN = "golden"  # stands for a batch's name


class Entry(msgspec.Struct, frozen=True):
    """One line.

    `ids`: of the row as it was written, and as it was prepared (sanitised, masked); none for a row that is no
    example. `at` is UTC, ISO 8601.
    """

    ids: list[str]
    batch: str
    line: int
    reason: str
    by: str
    at: str


class Forgotten:
    """What is on the list."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries = tuple(entries)
        self.ids = frozenset(id for entry in self.entries for id in entry.ids)
        self.places = frozenset((entry.batch, entry.line) for entry in self.entries)

    def holds(self, example_id: str, batch: str, line: int) -> bool:
        """Tell whether a row is on the list; `example_id` is empty for a row that is no example."""
        return example_id in self.ids or (batch != GOLDEN and (batch, line) in self.places)


def read_forgotten(path: Path) -> Forgotten:
    """Read the list. Raises DataError for a line that is no entry: half a list is worse than stopping."""
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
