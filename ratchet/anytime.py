"""Tests that may be looked at as often as one likes: two arms' difference, and whether the arms' numbers fit their shares.

Each unit is a user in one step of a rollout. Given what was seen before, its arm was drawn with a known chance: a user who is new in
step s gets the challenger with share p_s; one whom the champion answered in step r, with (p_s - p_r) / (1 - p_r), since a user's
position stays; one whom the challenger answered before tells nothing new. Units are compared within the same step and chance only, so
a rising share, a time of day or regular users cannot pass for an effect (Simpson's paradox).

The difference is tested by betting (Waudby-Smith & Ramdas 2024, arXiv 2010.09686): with chance p, arm z, outcome y in [0, 1] and
centre m, x = (z - p)(y - m) - p(1 - p)g has mean at most 0 where the effect is at most g, so a stake on x wins nothing in the long
run. The capital, a mean over fixed stakes, exceeds 1/alpha at any time with a chance of at most alpha (Ville 1939). Unlike a normal
mixture (Johari et al., arXiv 1512.04922) it is honest about the first error of ten users, too. The centre is the mean of both arms: it
does not know who is in which.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

STAKES = 0.05 * 2.0 ** np.arange(9)  # best is effect / variance of the outcome
LARGEST_STAKE = 0.9  # of the capital that the worst outcome could take
BINS = 200  # outcomes are rounded to 1/200
PRIOR_UNITS = 10.0  # weight of the shares in the alternative to them


class Cells(NamedTuple):
    """Units that are alike, together: how many had which outcome, in which arm (1: challenger), under which chance of it."""

    chance: Floats
    arm: Floats
    outcome: Floats
    centre: Floats
    units: Floats
    stratum: Ints


class Draw(NamedTuple):
    """Of each unit the chance with which it was the challenger's, and the stratum in which it may be compared. A chance of 0 or 1 is no draw."""

    chance: Floats
    stratum: Ints


def draw_chances(user: Ints, step: Ints, arm: Ints, shares: list[float]) -> Draw:
    """All units in any order, users as numbers."""
    order = np.lexsort((step, user))
    known = np.zeros(len(user), dtype=bool)
    known[1:] = user[order][1:] == user[order][:-1]
    floor = np.where(known, np.roll(step[order], 1), -1)
    taken = known & (np.roll(arm[order], 1) == 1)
    lowest = np.array([0.0, *shares])[floor + 1]
    sorted_chance = np.where(taken, 1.0, (np.asarray(shares)[step[order]] - lowest) / (1 - lowest))
    chance, stratum = np.empty(len(user)), np.empty(len(user), dtype=np.int64)
    chance[order], stratum[order] = sorted_chance, step[order] * (len(shares) + 1) + floor + 1
    return Draw(chance, stratum)


def make_cells(draw: Draw, arm: Ints, outcome: Floats) -> Cells:
    """Of the units whose arm was drawn and whose outcome is known (not NaN)."""
    kept = (draw.chance > 0) & (draw.chance < 1) & np.isfinite(outcome)
    stratum, arms = draw.stratum[kept], arm[kept]
    bins = np.rint(np.clip(outcome[kept], 0, 1) * BINS).astype(np.int64)
    counts = np.bincount((stratum * 2 + arms) * (BINS + 1) + bins)
    key = np.flatnonzero(counts)
    count, rest = counts[key].astype(float), key // (BINS + 1)
    of_stratum, outcomes = rest // 2, (key % (BINS + 1)) / BINS
    size = int(of_stratum.max(initial=0)) + 1
    total = np.bincount(of_stratum, count, size)
    mean = np.bincount(of_stratum, count * outcomes, size) / np.maximum(total, 1)
    chances = np.zeros(size)
    chances[stratum] = draw.chance[kept]
    return Cells(chances[of_stratum], (rest % 2).astype(float), outcomes, mean[of_stratum], count, of_stratum)


def log_evidence(cells: Cells, *, sign: int, margin: float) -> float:
    """Logarithm of the capital won against "sign · (challenger - champion) is at most margin"; over log(1/alpha) that is refuted at alpha."""
    spread = cells.chance * (1 - cells.chance)
    won = sign * (cells.arm - cells.chance) * (cells.outcome - cells.centre) - spread * margin
    good, bad = (1 - cells.centre, cells.centre) if sign < 0 else (cells.centre, 1 - cells.centre)
    worst = np.maximum((1 - cells.chance) * good, cells.chance * bad) + spread * margin
    stakes = np.minimum(STAKES[:, None], LARGEST_STAKE / np.maximum(worst, 1e-9))  # (stakes, cells)
    return _log_mean(np.log1p(stakes * won) @ cells.units)


def lower_bound(cells: Cells, *, sign: int, alpha: float) -> float:
    """The largest margin that is refuted, at any number of looks together; -1 when nothing is known."""
    low, high = -1.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if log_evidence(cells, sign=sign, margin=middle) >= -math.log(alpha) else (low, middle)
    return low


def difference(cells: Cells) -> float | None:
    """Challenger minus champion: the strata's differences of means, weighted by what they can tell. None where no stratum has both arms."""
    size = int(cells.stratum.max(initial=0)) + 1
    by_arm = [cells.units * (cells.arm == arm) for arm in (0, 1)]
    units = [np.bincount(cells.stratum, count, size) for count in by_arm]
    sums = [np.bincount(cells.stratum, count * cells.outcome, size) for count in by_arm]
    both = (units[0] > 0) & (units[1] > 0)
    if not both.any():
        return None
    weight = (units[0] * units[1] / np.maximum(units[0] + units[1], 1))[both]
    return float(weight @ (sums[1][both] / units[1][both] - sums[0][both] / units[0][both]) / weight.sum())


def log_mismatch(draw: Draw, arm: Ints, step: Ints, steps: int) -> float:
    """Logarithm of the evidence that the arms' numbers do not fit their chances: a Dirichlet-multinomial Bayes factor (Lindon & Malek, arXiv 2011.03567) a step.

    The steps' mean is again such evidence: over 1/alpha at any time with a chance of at most alpha.
    """
    drawn = (draw.chance > 0) & (draw.chance < 1)
    found = np.zeros(steps)
    for stratum in np.unique(draw.stratum[drawn]):
        of_stratum = drawn & (draw.stratum == stratum)
        first = int(np.argmax(of_stratum))
        found[step[first]] += _log_bayes_factor(int(arm[of_stratum].sum()), int(of_stratum.sum()), float(draw.chance[first]))
    return _log_mean(found)


def _log_bayes_factor(challengers: int, units: int, chance: float) -> float:
    a, b = PRIOR_UNITS * chance, PRIOR_UNITS * (1 - chance)
    champions = units - challengers
    return _log_beta(a + challengers, b + champions) - _log_beta(a, b) - challengers * math.log(chance) - champions * math.log1p(-chance)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_mean(logs: Floats) -> float:
    highest = float(logs.max())
    return highest + math.log(float(np.exp(logs - highest).mean()))
