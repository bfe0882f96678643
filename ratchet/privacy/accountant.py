"""Account for DP-SGD: which ε a training spends, which noise an ε needs, and what trainings spend together.

The mechanism is the Gaussian one on rows that are drawn by Poisson sampling; neighbouring data differ by one
row that is there or not (Abadi et al. 2016, arXiv 1607.00133). The figures are Opacus's: privacy loss random
variables (arXiv 2106.02848), of which the upper bound is taken; Rényi DP (arXiv 1908.10530) where all rows
are in every step, for which the former has no density. Opacus is the extra `privacy`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import msgspec
from scipy.optimize import brentq

from ratchet.errors import ConfigError

NOISE_DIGITS = 4  # significant ones of a noise multiplier, rounded up
FIRST_NOISE, MOST_NOISE = 4.0, 1e4
TOLERANCE = 0.005  # relative, of the ε that the chosen noise gives


class Mechanism(msgspec.Struct, frozen=True):
    """The steps of one training, in the terms in which they are accounted for.

    `noise_multiplier` is the noise's standard deviation divided by the norm to which gradients are clipped;
    `sampling_rate` is the probability with which a row is in a step.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    @property
    def told(self) -> str:
        return f"noise {self.noise_multiplier:g}, rate {self.sampling_rate:.3g}, {self.steps} steps"


def require_opacus() -> None:
    """Raise ConfigError if Opacus is not installed."""
    if find_spec("opacus") is None:
        raise ConfigError(
            "`train.privacy.epsilon` is set, and Opacus, which accounts for it, is not installed",
            remedy="make privacy, or pip install 'ratchet[privacy]', or set `train.privacy.epsilon: null`",
        )


def epsilon_of(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Return the ε that the trainings spend together on a row that all of them use; 0 for none."""
    if not mechanisms:
        return 0.0
    require_opacus()
    from opacus.accountants import PRVAccountant, RDPAccountant

    whole = any(each.sampling_rate >= 1 for each in mechanisms)
    accountant = RDPAccountant() if whole else PRVAccountant()
    accountant.history = [(each.noise_multiplier, each.sampling_rate, each.steps) for each in mechanisms]
    with warnings.catch_warnings():
        # Opacus warns where more orders would give a tighter bound; a loose bound holds as well.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> Mechanism:
    """Return the mechanism with the least noise that spends at most `epsilon`.

    Raises ConfigError if no noise multiplier up to 10,000 is enough.
    """

    @cache
    def spent(noise: float) -> float:
        return epsilon_of([Mechanism(noise, sampling_rate, steps)], delta)

    high = FIRST_NOISE
    while spent(high) > epsilon:
        high *= 2
        if high > MOST_NOISE:
            raise ConfigError(
                f"no noise gives ε = {epsilon:g} with δ = {delta:g} over {steps} steps",
                remedy="raise `train.privacy.epsilon` or `train.privacy.delta`, or lower `train.epochs`",
            )
    low = high / 2
    while spent(low) <= epsilon:  # from above, since little noise takes long to account for
        low, high = low / 2, low
    aim = epsilon * (1 - TOLERANCE / 2)
    found = _rounded_up(brentq(lambda noise: spent(noise) - aim, low, high, rtol=TOLERANCE / 2))
    while spent(found) > epsilon:
        found = _rounded_up(found * (1 + TOLERANCE))
    return Mechanism(found, sampling_rate, steps)


def _rounded_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - NOISE_DIGITS + 1)
    return float(f"{math.ceil(value / unit) * unit:.{NOISE_DIGITS}g}")
