"""Estimate the gains of several parts of the rows, such as past batches, jointly.

A part of 200 rows tells its gain in a score of 0 and 1 to some 3 points, which is too little to rule out a
loss of 5. Two things tell more:

- The likelihood of the right answer, measured on the same rows, varies far less from row to row. The gain is
  regressed on the gain in likelihood within the parts, as on a control variate (CUPED: Deng, Xu, Kohavi &
  Walker, WSDM 2013), and the mean gain in likelihood of a part then predicts its gain.
- What the prediction misses is a residual of each part. Residuals of parts are alike, so each is drawn to the
  mean of all, the more the less they differ (a normal hierarchical model with a half-normal prior on their
  spread: Gelman, Bayesian Analysis 2006).

The bounds are quantiles of the posterior. A loss that does not show in the likelihood is in the residual
alone and is believed more slowly; benchmarks/gate_models.py measures both kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.statistics import Interval, Values

TAUS = 33  # points of the grid for the spread of the residuals
WIDEST = 4.0  # the grid ends there, in scales of the prior
BORROWED = 10  # rows' weight by which the variance of a part is drawn to that of all parts
LEAST_SCALE = 0.01  # by which residuals are expected to differ where no loss is accepted
HALVINGS = 50  # of the interval in which a quantile lies


class Part(NamedTuple):
    """The paired gains of a part's rows in the metric and in the right answer's likelihood, each (rows,)."""

    gains: Values
    likelihood: Values


class Sums(NamedTuple):
    """What the rows of all parts tell, each of shape (..., parts).

    `told` is the gain that the likelihood predicts, `rest` the mean residual, each with its standard error.
    """

    told: Values
    told_error: Values
    rest: Values
    rest_error: Values


def scale_of(config: GateConfig) -> float:
    """Return the spread of residuals that is expected beforehand: the loss that is still taken."""
    return max(config.past_margin, LEAST_SCALE)


def estimate_parts(parts: Mapping[str, Part], scale: float, alpha: float) -> dict[str, Interval]:
    """Return the posterior mean of each part's gain with bounds that are one-sided at `alpha`.

    `scale`: see `scale_of`, in the metric's unit. Raises ValueError when a part has no rows or holds a value
    that is not finite.
    """
    for name, part in parts.items():
        if not len(part.gains) or not (np.isfinite(part.gains).all() and np.isfinite(part.likelihood).all()):
            raise ValueError(f"part {name} has no rows, or values that are not finite")
    found = posterior(sums_of(list(parts.values())), scale)
    low, high = found.quantile(alpha), found.quantile(1 - alpha)
    return {
        name: Interval(float(mean), float(below), float(above))
        for name, mean, below, above in zip(parts, found.mean, low, high, strict=True)
    }


def sums_of(parts: list[Part]) -> Sums:
    slope = _slope(parts)
    rest = [part.gains - slope * part.likelihood for part in parts]
    return Sums(
        slope * np.array([part.likelihood.mean() for part in parts]),
        slope * _errors([part.likelihood for part in parts]),
        np.array([values.mean() for values in rest]),
        _errors(rest),
    )


def _slope(parts: list[Part]) -> float:
    """Return by how much the gain rises with the likelihood's, within the parts; 0 where it does not rise."""
    told = np.concatenate([part.likelihood - part.likelihood.mean() for part in parts])
    gains = np.concatenate([part.gains - part.gains.mean() for part in parts])
    spread = float(told @ told)
    return max(0.0, float(told @ gains) / spread) if spread else 0.0


def _errors(values: list[Values]) -> Values:
    """Return the standard error of each part's mean.

    Few rows in which nothing differs do not prove that it is 0, so the variance borrows from the other parts.
    """
    squares = np.array([float(((part - part.mean()) ** 2).sum()) for part in values])
    rows = np.array([len(part) for part in values], dtype=np.float64)
    shared = squares.sum() / rows.sum()
    return np.asarray(np.sqrt((squares + BORROWED * shared) / (rows + BORROWED) / rows))


class Posterior(NamedTuple):
    """A mixture of normal distributions for each part, over the grid of spreads (the last axis).

    `means` and `errors` have the shape (..., parts, TAUS), `weights` (..., 1, TAUS).
    """

    weights: Values
    means: Values
    errors: Values

    @property
    def mean(self) -> Values:
        return np.asarray((self.weights * self.means).sum(axis=-1))

    def below(self, bound: Values | float) -> Values:
        """Return the probability that the gain of each part is under `bound`."""
        at = np.asarray(bound)[..., None]
        return np.asarray((self.weights * ndtr((at - self.means) / self.errors)).sum(axis=-1))

    def quantile(self, share: float) -> Values:
        low = (self.means - 10 * self.errors).min(axis=-1)
        high = (self.means + 10 * self.errors).max(axis=-1)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            under = self.below(middle) < share
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return np.asarray((low + high) / 2)


def posterior(sums: Sums, scale: float) -> Posterior:
    """Return the posterior of every part's gain; the mean of all residuals has a flat prior."""
    tau = np.linspace(0.0, WIDEST * scale, TAUS)
    rest, error = sums.rest[..., None], np.maximum(sums.rest_error[..., None], 1e-9)  # (..., parts, 1)
    spread = error**2 + tau**2  # (..., parts, TAUS)
    centre_error = 1 / (1 / spread).sum(axis=-2, keepdims=True)  # squared, (..., 1, TAUS)
    centre = (rest / spread).sum(axis=-2, keepdims=True) * centre_error
    fit = (
        np.log(centre_error)
        - np.log(spread).sum(axis=-2, keepdims=True)
        - ((rest - centre) ** 2 / spread).sum(axis=-2, keepdims=True)
        - (tau / scale) ** 2
    ) / 2
    weights = np.exp(fit - fit.max(axis=-1, keepdims=True))
    kept = tau**2 / spread  # how much of its own residual a part keeps
    means = sums.told[..., None] + kept * rest + (1 - kept) * centre
    errors = np.sqrt(sums.told_error[..., None] ** 2 + kept * error**2 + (1 - kept) ** 2 * centre_error)
    return Posterior(weights / weights.sum(axis=-1, keepdims=True), means, errors)
