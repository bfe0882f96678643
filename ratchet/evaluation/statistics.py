"""Compute intervals: by the bootstrap for means and for paired differences (Efron & Tibshirani 1993, chapter
13), by Wilson's score for shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
FEW = 50  # up to so many distinct values, drawing counts of values is faster than drawing rows
MIN_DRAWS = 10  # a bound needs so many resamples beyond it; farther out, the normal distribution is used


class Interval(msgspec.Struct, frozen=True):
    """A mean between a lower and an upper bound, each one-sided at `alpha`."""

    mean: float
    low: float
    high: float

    def __iter__(self) -> Iterator[float]:
        return iter((self.mean, self.low, self.high))

    def on(self, rows: int) -> Estimate:
        return Estimate(self.mean, self.low, self.high, rows)

    def text(self, spec: str = "+.3f") -> str:
        """Format as `mean [low, high]`."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


class Estimate(Interval, frozen=True):
    """An interval with the number of rows that it rests on."""

    rows: int


def estimate_mean(values: Values) -> Interval:
    """Return the mean with its 95 % interval: Wilson's for values of 0 and 1, the bootstrap's for others."""
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(values, alpha=0.025)
    return bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0)


def estimate(values: Values) -> Estimate:
    return estimate_mean(values).on(len(values))


def wilson(values: Values, *, alpha: float) -> Interval:
    """Return the score interval of a share (Wilson 1927), for values that are 0 or 1.

    Unlike the bootstrap's, it has a width even for 0 of n.
    """
    rows, mean = len(values), float(values.mean())
    z = NormalDist().inv_cdf(1 - alpha)
    centre = (mean + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * float(np.sqrt(mean * (1 - mean) / rows + z * z / (4 * rows * rows)))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def bootstrap_mean(values: Values, *, alpha: float, resamples: int, seed: int) -> Interval:
    """Return the percentile interval of the mean, for values or paired differences.

    Raises ValueError when there are no values, or not all are finite.
    """
    return bootstrap_means(values[:, None], alpha=alpha, resamples=resamples, seed=seed)[0]


def bootstrap_means(table: Values, *, alpha: float, resamples: int, seed: int) -> list[Interval]:
    """Return `bootstrap_mean` of every column of (rows, columns).

    All columns use the same draws, because drawing takes most of the time. Where `alpha` is too small for so
    many resamples, the outermost bound that they support is extended by the quantiles of the normal
    distribution.
    """
    rows = len(table)
    if rows == 0:
        raise ValueError("no values: there is nothing to average")
    if not np.isfinite(table).all():
        raise ValueError(f"{int((~np.isfinite(table)).any(axis=1).sum())} of {rows} values are not finite")
    values, counts = _grouped(table)
    generator = np.random.default_rng(seed)
    # Resampling rows is the same as drawing multinomial counts. Blocks of 4 million (32 MB) limit memory.
    block = max(1, 4_000_000 // len(values))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = (
        np.concatenate([generator.multinomial(rows, counts / rows, size) @ values for size in sizes]) / rows
    )
    shown = max(alpha, MIN_DRAWS / resamples)
    lows, highs = np.quantile(means, [shown, 1 - shown], axis=0)
    middle = table.mean(axis=0)
    if shown > alpha:
        stretch = NormalDist().inv_cdf(1 - alpha) / NormalDist().inv_cdf(1 - shown)
        lows, highs = (
            np.maximum(table.min(axis=0), middle - (middle - lows) * stretch),
            np.minimum(table.max(axis=0), middle + (highs - middle) * stretch),
        )
    return [
        Interval(float(mean), float(low), float(high))
        for mean, low, high in zip(middle, lows, highs, strict=True)
    ]


def _grouped(table: Values) -> tuple[Values, Values]:
    """Return (distinct values, how often each occurs).

    Gains of a score of 0 and 1 have three values, and drawing three counts is a hundred times faster than
    drawing a thousand.
    """
    if table.shape[1] == 1:
        values, counts = np.unique(table[:, 0], return_counts=True)
        if len(values) <= FEW:
            return values[:, None], counts.astype(np.float64)
    return table, np.ones(len(table))


def chance_of(gains: Values) -> float:
    """Return the p-value of the exact sign test (McNemar's), for scores of 0 and 1.

    It is the probability that equal models win at least as many of the rows in which they differ. The
    bootstrap is too certain of a gain that comes from a handful of rows: for five won and none lost it says 1
    %, the exact value is 3 %. For other scores the function returns the smallest p that so many differing
    rows can have.
    """
    from scipy.stats import binom

    differing = gains[gains != 0]
    if not np.isin(differing, (-1.0, 1.0)).all():
        return float(0.5 ** len(differing))
    return float(binom.sf(int((differing > 0).sum()) - 1, len(differing), 0.5))
