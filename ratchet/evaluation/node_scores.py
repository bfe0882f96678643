"""Compare two models on rows that stay at the nodes, from counts and sums alone.

A node scores candidate and rival on its own held-out rows and sends, for groups of rows, how many there are,
and the sums of the scores, of their differences and of the squares of these. The mean gain over all nodes and
its interval follow from the sums exactly as from the rows: Student's t for the mean of paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ratchet.evaluation.paired import LOWER_IS_BETTER
from ratchet.evaluation.statistics import Interval

FILE = "nodes.json"  # among the reports of the training
ALL, GOLDEN = "all", "golden"


class Sums(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one group of rows: how many, the sums of both scores, of their differences and of the squares."""

    rows: int
    candidate: float
    rival: float
    difference: float
    square: float


class Scores(msgspec.Struct, frozen=True):
    """The nodes' sums of one comparison; `left_out`: name → reason.

    `together` has them of all nodes. Under secure aggregation `summed` is all that is known, with the `names`
    of the nodes in it.
    """

    metric: str
    rival: str  # "champion" or "base"
    nodes: dict[str, dict[str, Sums]]  # by name and group
    left_out: dict[str, str]
    summed: Sums | None = None
    names: list[str] = []

    @property
    def count(self) -> int:
        """Return the number of nodes in the sums."""
        return len(self.names if self.summed else self.nodes)

    @property
    def together(self) -> dict[str, Sums]:
        """Return the sums over all nodes, by group."""
        if self.summed:
            return {ALL: self.summed}
        groups = sorted({group for sums in self.nodes.values() for group in sums})
        return {
            group: add([sums[group] for sums in self.nodes.values() if group in sums]) for group in groups
        }


def sum_up(candidate: Sequence[float], rival: Sequence[float]) -> Sums:
    """Return the sums of paired scores."""
    gains = [one - other for one, other in zip(candidate, rival, strict=True)]
    squares = math.fsum(gain * gain for gain in gains)
    return Sums(len(gains), math.fsum(candidate), math.fsum(rival), math.fsum(gains), squares)


def add(parts: Sequence[Sums]) -> Sums:
    return Sums(
        sum(part.rows for part in parts),
        math.fsum(part.candidate for part in parts),
        math.fsum(part.rival for part in parts),
        math.fsum(part.difference for part in parts),
        math.fsum(part.square for part in parts),
    )


def gain_of(sums: Sums, alpha: float) -> Interval:
    """Return the mean gain between bounds that are each one-sided at `alpha`."""
    from scipy.stats import t

    mean = sums.difference / sums.rows
    if sums.rows < 2:
        return Interval(mean, -math.inf, math.inf)
    variance = max(0.0, (sums.square - sums.difference * mean) / (sums.rows - 1))
    half = float(t.ppf(1 - alpha, sums.rows - 1)) * math.sqrt(variance / sums.rows)
    return Interval(mean, mean - half, mean + half)


def sign_of(metric: str) -> float:
    """Return what scores are multiplied by before they are summed, so that more is better."""
    return -1.0 if metric in LOWER_IS_BETTER else 1.0


def read_groups(scores: Path, metric: str, rival: str, least: int) -> dict[str, Sums]:
    """Return the sums of an evaluation's table (scores.parquet): of all test rows, and by kind.

    A group of fewer rows than `least` is left out: a sum over few rows would tell of single ones. So is a
    single group that is smaller than the whole by fewer rows than that.
    """
    import pandas as pd

    table = pd.read_parquet(scores)
    test = table[table.batch != GOLDEN]
    test = test.assign(**{metric: sign_of(metric) * test[metric]})
    sides = {name: test[test.model == name].set_index("id").sort_index() for name in ("candidate", rival)}
    mine, theirs = sides["candidate"], sides[rival]
    found = {ALL: sum_up(mine[metric].tolist(), theirs[metric].loc[mine.index].tolist())}
    for kind, part in mine.groupby("kind"):
        found[f"kind:{kind}"] = sum_up(part[metric].tolist(), theirs[metric].loc[part.index].tolist())
    whole = found[ALL].rows
    return {
        name: sums
        for name, sums in found.items()
        if sums.rows >= least and (name == ALL or whole - sums.rows == 0 or whole - sums.rows >= least)
    }


def check_sums(groups: Mapping[str, Sums], least: int) -> str | None:
    """Return what is wrong with a node's sums, or None."""
    for name, sums in groups.items():
        values = (sums.candidate, sums.rival, sums.difference, sums.square)
        if sums.rows < least or not all(math.isfinite(value) for value in values):
            return f"its sums of {name} are of {sums.rows} rows, or not finite; wanted {least} or more"
        if sums.square < 0 or sums.difference**2 > sums.square * sums.rows * (1 + 1e-9) + 1e-9:
            return f"its sums of {name} contradict each other"
    return None
