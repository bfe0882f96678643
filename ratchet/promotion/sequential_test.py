"""Compare two arms, and the split of users between them, with bounds that hold at every look, however many
there are.

The difference is taken within each step of a rollout, and the steps are then combined by inverse variance.
Pooled over steps, an arm whose share grows would be compared with other hours of other days (Simpson's
paradox). A user who returns in several steps counts as one. The bound is the asymptotic confidence sequence
of Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas (arXiv 2103.06476, theorem 2.2, one-sided): a normal mixture
as in Robbins (1970) and Johari, Koomen, Pekelis & Walsh (arXiv 1512.04922).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from ratchet.promotion.rollout import Bounds

Values = NDArray[np.float64]
Units = NDArray[np.int64]
# Information (1 / variance of the difference) at which the bound is tightest, in units of a score's variance:
# about 250 users an arm.
TUNED_TO = 125.0
LEAST = 5  # a step counts once each arm has so many values


class Stratum(NamedTuple):
    """One step: the values of each arm, one per unit, and the numbers of the units.

    A unit has the same number in all steps. None means that all units are different.
    """

    champion: Values
    challenger: Values
    champion_units: Units | None = None
    challenger_units: Units | None = None


def difference(strata: list[Stratum], alpha: float, *, scale: float = 1.0) -> Bounds | None:
    """Combine the differences of all steps; None while no step has enough units.

    `scale` is the expected standard deviation of a value. It only decides where the bound is tightest.
    """
    told = [stratum for stratum in strata if min(len(stratum.champion), len(stratum.challenger)) >= LEAST]
    if not told:
        return None
    means = np.array([stratum.challenger.mean() - stratum.champion.mean() for stratum in told])
    information = np.array([1.0 / _variance(stratum, scale) for stratum in told])
    total = float(information.sum())
    mean = float((means * information).sum() / total)
    # Returning users make the steps dependent; then there is less information than the sum over steps.
    total = min(total, 1.0 / max(_clustered_variance(told, information / total), 1e-12))
    width = radius(total, alpha, scale)
    return Bounds(
        mean,
        mean - width,
        mean + width,
        _count([(s.champion, s.champion_units) for s in strata]),
        _count([(s.challenger, s.challenger_units) for s in strata]),
    )


def _clustered_variance(strata: list[Stratum], weights: Values) -> float:
    """Return the variance of the combined difference when units return in several steps.

    This is the sandwich estimate (Liang & Zeger 1986).
    """
    pulls: list[Values] = []
    units: list[Units] = []
    for stratum, weight in zip(strata, weights, strict=True):
        for sign, values, known in (
            (-1, stratum.champion, stratum.champion_units),
            (1, stratum.challenger, stratum.challenger_units),
        ):
            if known is None:
                continue
            pulls.append(sign * weight * (values - values.mean()) / len(values))
            units.append(known)
    if not pulls:
        return 0.0
    _, places = np.unique(np.concatenate(units), return_inverse=True)
    return float((np.bincount(places, weights=np.concatenate(pulls)) ** 2).sum())


def _count(arms: list[tuple[Values, Units | None]]) -> int:
    """Count the different units."""
    known = [units for _, units in arms if units is not None]
    return sum(len(values) for values, units in arms if units is None) + (
        len(np.unique(np.concatenate(known))) if known else 0
    )


def _variance(stratum: Stratum, scale: float) -> float:
    """Return the variance of the difference of the means.

    Each arm gets a prior of two values at the expected variance, because five equal values do not prove that
    the variance is zero.
    """
    return sum(
        (float(arm.var()) * len(arm) + 2 * scale**2) / (len(arm) + 2) / len(arm)
        for arm in (stratum.champion, stratum.challenger)
    )


def radius(information: float, alpha: float, scale: float = 1.0) -> float:
    """Return half the width of the bounds at this amount of information.

    It is the normal mixture's boundary for a mean, one-sided at alpha.
    """
    rho = TUNED_TO / scale**2  # prior information of the mixture
    return math.sqrt(
        (information + rho)
        / information**2
        * (math.log((information + rho) / rho) + 2 * math.log(1 / (2 * alpha)))
    )


def split_e_value(champion: int, challenger: int, share: float) -> float:
    """Return how many times more likely these numbers are under another split than under `share`.

    A value over 1/alpha, at any look, refutes the share at level alpha. This is a Dirichlet-multinomial Bayes
    factor (Lindon & Malek, arXiv 2011.03567); its prior is centred on the share with the weight of 20 users.
    """
    a, b = 20 * (1 - share), 20 * share
    mixed = (
        gammaln(a + b)
        - gammaln(a)
        - gammaln(b)
        + gammaln(a + champion)
        + gammaln(b + challenger)
        - gammaln(a + b + champion + challenger)
    )
    plain = xlogy(champion, 1 - share) + xlogy(challenger, share)
    return float(np.exp(min(700.0, mixed - plain)))  # exp(710) overflows a float
