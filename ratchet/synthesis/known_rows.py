"""What a new row must not repeat: rows of this run, of the prepared splits, and above all of the tests."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ratchet.config.data import PrepareConfig
from ratchet.data.batches import raw_lines
from ratchet.data.dedup import NearRows, shingle, sketch_of
from ratchet.data.examples import Example, RowError, read_examples
from ratchet.data.validation import Origin, Validator

REASONS = {
    "test": "near_test",
    "golden": "near_golden",
    "train": "duplicate",
    "validation": "duplicate",
    "run": "duplicate_of_run",
}
OURS = ("train", "run")  # what the row may stand beside; it is a duplicate from `prepare.near_duplicate` on
ORDER = ("golden", "test", "validation", "train", "run")  # the reason that weighs most comes first


class Twin(NamedTuple):
    reason: str
    id: str


class Known:
    """About 1 kB a row.

    Nearness is that of the splits (ratchet/data/dedup.py): shingles of what the user wrote; rows of other
    sides from `prepare.leak` on.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self._near = config.near_duplicate
        self._rows = NearRows(config)
        self._sides: dict[str, str] = {}

    def add(self, example: Example, side: str) -> None:
        if example.id in self._sides:
            return
        shingles = shingle(example)
        self._rows.add(example, side, shingles, sketch_of(shingles))
        self._sides[example.id] = side

    def find(self, example: Example, *, but: str = "") -> Twin | None:
        """Find the row that this one repeats, the gravest first; `but` is the id of one that it may be near
        to.

        A twin without an id means that the row has many words in a row from a golden one.

        Without an id: it has many words in a row from a golden one.
        """
        if side := self._sides.get(example.id):
            return Twin(REASONS[side], example.id)
        shingles = shingle(example)
        close = (
            (*self._rows.rows[place], alike)
            for place, alike in self._rows.close(shingles, sketch_of(shingles))
        )
        near = [
            (side, id) for id, side, alike in close if id != but and (side not in OURS or alike >= self._near)
        ]
        if near:
            side, id = min(near, key=lambda row: (ORDER.index(row[0]), row[1]))
            return Twin(REASONS[side], id)
        return Twin(REASONS["golden"], "") if self._rows.quotes_golden(example) else None


def read_known(prepared: Path, golden: Path, config: PrepareConfig) -> Known:
    """Read the prepared splits, and the golden file itself: it may be newer than the last preparation."""
    known, validator = Known(config), Validator(config)
    for _, line in raw_lines(golden) if golden.exists() else []:
        with suppress(RowError):  # preparation refuses such a file with its line
            known.add(validator.check(line, Origin("golden", "")).example, "golden")
    for split in ("golden", "test", "validation", "train"):
        path = prepared / f"{split}.jsonl"
        for example in read_examples(path) if path.exists() else ():
            known.add(example, split)
    return known
