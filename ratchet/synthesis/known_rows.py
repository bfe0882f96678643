"""Find the known row that a new row repeats: of this run, of the prepared splits, or of the golden set."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ratchet.config.data import PrepareConfig
from ratchet.data.batches import raw_lines
from ratchet.data.dedup import NearRows
from ratchet.data.examples import Example, RowError, read_examples
from ratchet.data.validation import Origin, Validator

REASONS = {
    "test": "near_test",
    "golden": "near_golden",
    "train": "duplicate",
    "validation": "duplicate",
    "run": "duplicate_of_run",
}
# On these sides a near row is a duplicate, not a leak, so `prepare.near_duplicate` is the bound.
OURS = ("train", "run")
ORDER = ("golden", "test", "validation", "train", "run")  # the most serious reason first


class Twin(NamedTuple):
    reason: str
    id: str


class Known:
    """The rows that a new row must not repeat; about 1 kB of memory per row.

    Similarity is measured as for the splits (ratchet/data/dedup.py), on shingles of what the user wrote; the
    same question about another picture is another question. Rows
    of validation, test and golden set count from the similarity `prepare.leak` on.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self._near = config.near_duplicate
        self._rows = NearRows(config)
        self._sides: dict[str, str] = {}

    def add(self, example: Example, side: str) -> None:
        if example.id in self._sides:
            return
        self._rows.add(example, side, self._rows.sign(example))
        self._sides[example.id] = side

    def find(self, example: Example, *, but: str = "") -> Twin | None:
        """Find the row that this one repeats, with the most serious reason; None if there is none.

        `but` is the id of a row to which it may be similar. A twin without an id means that the example
        quotes many consecutive words of a golden row.
        """
        if side := self._sides.get(example.id):
            return Twin(REASONS[side], example.id)
        close = (
            (*self._rows.rows[place], alike) for place, alike in self._rows.close(self._rows.sign(example))
        )
        near = [
            (side, id) for id, side, alike in close if id != but and (side not in OURS or alike >= self._near)
        ]
        if near:
            side, id = min(near, key=lambda row: (ORDER.index(row[0]), row[1]))
            return Twin(REASONS[side], id)
        return Twin(REASONS["golden"], "") if self._rows.quotes_golden(example) else None


def read_known(prepared: Path, golden: Path, config: PrepareConfig) -> Known:
    """Read the prepared splits, and the golden file itself, which may be newer than the last preparation."""
    known, validator = Known(config), Validator(config)
    for _, line in raw_lines(golden) if golden.exists() else []:
        with suppress(RowError):  # preparation will refuse the file and name the line
            known.add(validator.check(line, Origin("golden", "")).example, "golden")
    for split in ("golden", "test", "validation", "train"):
        path = prepared / f"{split}.jsonl"
        for example in read_examples(path) if path.exists() else ():
            known.add(example, split)
    return known
