"""What a new row must not repeat: rows of this run, rows of the prepared splits, and above all rows that are tested on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rensa import RMinHash, RMinHashLSH

from ratchet.examples import Example, RowError, make_example, read_examples, recognise_form, row_to_messages
from ratchet.neighbours import PERMUTATIONS, bands_for, jaccard, shingle

REASONS = {"test": "near_test", "golden": "near_golden", "train": "duplicate", "validation": "duplicate", "run": "duplicate_of_run"}
ORDER = ("golden", "test", "validation", "train", "run")  # the reason that weighs most comes first


class Twin(NamedTuple):
    reason: str
    id: str


class Known:
    """About 1 kB a row. Nearness is that of the splits (ratchet/neighbours.py): shingles of what the user wrote."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._index = RMinHashLSH(threshold=threshold, num_perm=PERMUTATIONS, num_bands=bands_for(threshold))
        self._rows: list[tuple[str, str, frozenset[str]]] = []
        self._sides: dict[str, str] = {}

    def add(self, example: Example, side: str) -> None:
        shingles = shingle(example)
        self._index.insert(len(self._rows), _sketch(shingles))
        self._rows.append((example.id, side, shingles))
        self._sides[example.id] = side

    def find(self, example: Example, *, but: str = "") -> Twin | None:
        """The row that this one repeats, the gravest first; `but` is the id of one that it may be near to."""
        if side := self._sides.get(example.id):
            return Twin(REASONS[side], example.id)
        shingles = shingle(example)
        near = [(side, id) for id, side, others in (self._rows[key] for key in self._index.query(_sketch(shingles))) if id != but and jaccard(shingles, others) >= self._threshold]
        if not near:
            return None
        side, id = min(near, key=lambda row: (ORDER.index(row[0]), row[1]))
        return Twin(REASONS[side], id)


def _sketch(shingles: frozenset[str]) -> RMinHash:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=42)
    sketch.update(sorted(shingles))
    return sketch


def read_known(prepared: Path, golden: Path, threshold: float) -> Known:
    """The prepared splits, and the golden file itself: it may be newer than the last preparation."""
    known = Known(threshold)
    for split in ("golden", "test", "validation", "train"):
        path = prepared / f"{split}.jsonl"
        for example in read_examples(path) if path.exists() else ():
            known.add(example, split)
    for example in _golden(golden):
        known.add(example, "golden")
    return known


def _golden(path: Path) -> list[Example]:
    import msgspec

    found = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        if line.strip():
            try:
                row = msgspec.json.decode(line, type=dict)
                found.append(make_example(row_to_messages(row, recognise_form(row)), {}))
            except (msgspec.DecodeError, UnicodeDecodeError, RowError):
                continue  # preparation refuses such a file with its line
    return found
