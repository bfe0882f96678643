"""Intervals: of paired differences and of means by the bootstrap (Efron & Tibshirani 1993, chapter 13), of shares by Wilson's score."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean between a lower and an upper bound, each one-sided at `alpha`."""

    mean: float
    low: float
    high: float


def wilson(values: Values, *, alpha: float) -> Interval:
    """Score interval of a share (Wilson 1927); for values that are 0 or 1. Unlike the bootstrap it is honest about 0 of n."""
    rows, mean = len(values), float(values.mean())
    z = NormalDist().inv_cdf(1 - alpha)
    centre = (mean + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * float(np.sqrt(mean * (1 - mean) / rows + z * z / (4 * rows * rows)))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def bootstrap_mean(values: Values, *, alpha: float, resamples: int, seed: int) -> Interval:
    """Percentile interval of the mean; of paired differences when `values` are those. Raises ValueError: no values, or not all finite."""
    return bootstrap_means(values[:, None], alpha=alpha, resamples=resamples, seed=seed)[0]


def bootstrap_means(table: Values, *, alpha: float, resamples: int, seed: int) -> list[Interval]:
    """The same for every column of (rows, columns), from the same draws: drawing is what takes the time."""
    rows = len(table)
    if rows == 0:
        raise ValueError("no values: there is nothing to average")
    if not np.isfinite(table).all():
        raise ValueError(f"{int((~np.isfinite(table)).any(axis=1).sum())} of {rows} values are not finite")
    generator = np.random.default_rng(seed)
    # Resampling rows = multinomial counts; in blocks, since resamples times rows can be large.
    block = max(1, 4_000_000 // rows)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = np.concatenate([generator.multinomial(rows, np.full(rows, 1 / rows), size) @ table for size in sizes]) / rows
    lows, highs = np.quantile(means, [alpha, 1 - alpha], axis=0)
    return [Interval(float(mean), float(low), float(high)) for mean, low, high in zip(table.mean(axis=0), lows, highs, strict=True)]
