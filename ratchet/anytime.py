"""Bounds that hold at every look: of the difference between two arms, and of whether the arms have the sizes that they should have.

Confidence sequences from Robbins' normal mixture, one-sided (Johari et al., arXiv 1512.04922), in the asymptotic form of
Waudby-Smith et al. (arXiv 2103.06476): as often as one looks, the chance that a bound is ever wrong stays under `alpha`.
Arms are compared within a step of the rollout and never pooled over steps: shares and traffic change from one to the next.
"""

from __future__ import annotations

from math import exp, lgamma, log
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
FEWEST = 5  # units of each arm, before a step is compared at all
BORROWED = 10.0  # units of both arms' common variance that each arm borrows: 20 equal outcomes are no proof that there is no variance
CONCENTRATION = 100.0  # of the Dirichlet prior around the intended share, in units


class Bounds(NamedTuple):
    """A difference, challenger minus champion, between a lower and an upper bound, each one-sided at `alpha` over all looks."""

    mean: float
    low: float
    high: float


class Outcomes(NamedTuple):
    """One entry for each unit in each step. NaN where a unit has no outcome."""

    values: Values
    challenger: NDArray[np.bool_]
    step: NDArray[np.int64]  # from 0
    unit: NDArray[np.int64]  # from 0; one user has one number in all steps


def compare(outcomes: Outcomes, *, alpha: float, spread: float, pairs: float) -> Bounds | None:
    """None while no step has enough of both arms. `spread` is about the standard deviation of an outcome; the bounds are narrowest near `pairs` pairs of units."""
    found = estimate(outcomes)
    if found is None:
        return None
    mean, variance = found
    width = half_width(variance, alpha=alpha, spread=spread, pairs=pairs)
    return Bounds(mean, mean - width, mean + width)


def estimate(outcomes: Outcomes) -> tuple[float, float] | None:
    """The steps' differences of means, weighted by 1/(1/n + 1/m), and the variance of that sum.

    These are inverse-variance weights for equal variances: they follow from the counts alone, so chance in the outcomes cannot choose
    them. A user may be in several steps, and in both arms one after the other: the variance is summed by user (Liang & Zeger 1986).
    """
    values, cell, unit = _compared(outcomes)
    if not len(values):
        return None
    count = np.bincount(cell).astype(float)
    count = np.append(count, 0.0) if len(count) % 2 else count
    counts = count.reshape(-1, 2)  # (step, arm)
    pairs = np.where(counts.all(axis=1), counts.prod(axis=1) / np.maximum(counts.sum(axis=1), 1.0), 0.0)
    weights = pairs / pairs.sum()
    present = np.maximum(count, 1.0)
    means = np.bincount(cell, values, len(count)) / present
    by_cell = np.repeat(weights, 2) / present  # what one unit's outcome weighs in the estimate
    residuals = (values - means[cell]) * np.sqrt(present / np.maximum(present - 1.0, 1.0))[cell]
    by_unit = np.bincount(unit, by_cell[cell] * residuals * np.where(cell % 2, 1.0, -1.0))
    borrowed = np.sum(by_cell**2 * BORROWED * np.repeat(_variance_by_step(values, cell // 2, len(weights)), 2))
    return float(weights @ (means[1::2] - means[::2])), float(by_unit @ by_unit + borrowed)


def half_width(variance: float, *, alpha: float, spread: float, pairs: float) -> float:
    """From an estimate to its bound (arXiv 2103.06476, the one-sided boundary). Time is information, counted in pairs of units."""
    if variance == 0.0:
        return 0.0
    time = 2 * spread**2 / variance
    mixed = _mixture(alpha, pairs)
    return float(np.sqrt(variance * 2 * (time + mixed) / time * log(1 + np.sqrt((time + mixed) / mixed) / (2 * alpha))))


def mismatch(challenger: int, champion: int, share: float) -> float:
    """E-value against arms of the intended share: above 1/a at any look with chance a at most, if they are (Lindon & Malek, arXiv 2011.03567)."""
    if not 0 < share < 1:
        return 1.0
    prior = (CONCENTRATION * share, CONCENTRATION * (1 - share))
    evidence = _log_beta(prior[0] + challenger, prior[1] + champion) - _log_beta(*prior)
    return exp(min(evidence - challenger * log(share) - champion * log(1 - share), 700.0))


def _compared(outcomes: Outcomes) -> tuple[Values, NDArray[np.int64], NDArray[np.int64]]:
    """(values, 2 * step + arm, unit) of the steps that have enough of both arms."""
    known = np.isfinite(outcomes.values)
    cell = 2 * outcomes.step + outcomes.challenger
    counts = np.bincount(cell[known], minlength=2 * (int(outcomes.step.max(initial=0)) + 1)).reshape(-1, 2)
    known &= (counts.min(axis=1) >= FEWEST)[outcomes.step]
    return outcomes.values[known], cell[known], outcomes.unit[known]


def _variance_by_step(values: Values, step: NDArray[np.int64], steps: int) -> Values:
    """Of both arms together, about their common mean."""
    counts = np.maximum(np.bincount(step, minlength=steps), 1)
    means = np.bincount(step, values, steps) / counts
    return np.asarray(np.bincount(step, (values - means[step]) ** 2, steps) / counts)


def _mixture(alpha: float, pairs: float) -> float:
    """The mixture's parameter that makes the bound narrowest at `pairs` (Howard et al., arXiv 1810.08240, section 3.5)."""
    return pairs / (2 * log(1 / alpha) + log(1 + 2 * log(1 / alpha)))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
