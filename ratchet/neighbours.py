"""Splits that stay: near duplicates together, and no row ever moves while data grow.

Rows come in the order of their batches. The first row of a cluster of near duplicates decides the cluster's split by the
hash of its own id; later ones follow it. A row near to two clusters of different splits would leak between them and is
refused (`straddles`). Nearness is MinHash LSH over shingles of three words (rensa), confirmed by the true Jaccard.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from rensa import RMinHash, RMinHashLSH

from ratchet.config import PrepareConfig
from ratchet.examples import CONTINUE, Example

Split = Literal["train", "validation", "test"]
Side = Literal["train", "validation", "test", "golden"]

PERMUTATIONS = 64
MISSED = 1e-3  # share of near pairs that the bands may miss, at most
WORD = re.compile(r"\w+")


class Placed(NamedTuple):
    """Where a row goes; `near` is the id of the row that it is a near duplicate of, if any."""

    side: Side | Literal["straddles"]
    near: str | None


class Clusters:
    """Assigns rows to sides one after another. Memory: about 1 kB a row."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self._index = RMinHashLSH(threshold=config.near_duplicate, num_perm=PERMUTATIONS, num_bands=bands_for(config.near_duplicate))
        self._rows: list[tuple[str, Side, frozenset[str]]] = []

    def place(self, example: Example, side: Side | None = None) -> Placed:
        """The row's side; `side` fixes it (golden rows). A row that straddles is not remembered."""
        shingles = shingle(example)
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=42)
        sketch.update(sorted(shingles))
        near = [self._rows[key] for key in sorted(self._index.query(sketch)) if jaccard(shingles, self._rows[key][2]) >= self._config.near_duplicate]
        sides = {row[1] for row in near}
        if side is None and len(sides) > 1:
            return Placed("straddles", near[0][0])
        chosen: Side = side or (near[0][1] if near else split_by_hash(example.id, self._config))
        if chosen != "golden" or side == "golden":
            self._index.insert(len(self._rows), sketch)
            self._rows.append((example.id, chosen, shingles))
        return Placed(chosen, near[0][0] if near else None)


def bands_for(threshold: float) -> int:
    """Fewest bands (they bring the fewest candidates) that miss few pairs at the threshold: (1 - 0.8^4)^16 is one in 5,000."""
    return next((bands for bands in (4, 8, 16, 32) if (1 - threshold ** (PERMUTATIONS // bands)) ** bands < MISSED), PERMUTATIONS)


def split_by_hash(example_id: str, config: PrepareConfig) -> Split:
    """By the id alone, so that a row's split needs no memory."""
    position = int(example_id[:13], 16) / 16**13
    if position < config.test_share:
        return "test"
    return "validation" if position < config.test_share + config.validation_share else "train"


def shingle(example: Example) -> frozenset[str]:
    """Word trigrams of what the user wrote; shorter texts count as one. Answers stay out: one question must not be asked in training and in test."""
    asked = " ".join(message.content for message in example.prompt if message.role == "user")
    words = WORD.findall((asked if asked != CONTINUE else example.answer).lower())
    if len(words) < 3:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / (len(left | right) or 1)
