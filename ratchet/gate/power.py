"""Estimate how likely the gate promotes a candidate that is better by a given effect, and how many rows that
takes.

It draws tables of paired gains and judges them as the gate does: the success metric at the look's alpha, the
guardrails on past batches (each by the joint estimate of `ratchet.gate.parts`) and on the golden set.All
other guardrails are assumed to pass: those on the NLL, the base and slices, and those that are off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.statistics import Values
from ratchet.gate.parts import Sums, posterior, scale_of

DRAWS = 20_000  # the standard error of a power of 80 % is then 0.3 points
MOST_ROWS = 2_000_000  # the search for the needed rows ends here


class Spread(NamedTuple):
    """Describe how paired gains vary.

    For scores of 0 and 1, `differing` is the share of rows in which the models differ. For other scores it is
    None, and `deviation` is used.
    """

    differing: float | None
    deviation: float
    explained: float = 0.0  # share of a gain's variance that the gain in likelihood explains

    def at(self, effect: float) -> float:
        """Return the standard deviation of a row's gain under that effect."""
        return (
            self.deviation
            if self.differing is None
            else math.sqrt(max(self.differing, abs(effect)) - effect * effect)
        )


class Plan(NamedTuple):
    effect: float
    alpha: float
    rows: int
    power: float
    success: float  # power of the success metric alone
    needed: int | None  # test rows for the wanted power; None when more test rows alone never reach it
    smallest: float | None  # smallest effect that is promoted with the wanted power on `rows`


def spread_of(gains: Values, likelihood: Values) -> Spread:
    """Measure the spread of an evaluation's gains in the metric, given those in the answers' likelihood."""
    binary = bool(np.isin(gains, (-1.0, 0.0, 1.0)).all())
    both = bool(gains.std() and likelihood.std())
    correlation = float(np.corrcoef(gains, likelihood)[0, 1]) if both else 0.0
    return Spread(
        float((gains != 0).mean()) if binary else None, float(gains.std()), max(0.0, correlation) ** 2
    )


def plan(
    effect: float,
    batches: Mapping[str, int],
    seen: Sequence[str],
    golden: int,
    spread: Spread,
    alpha: float,
    config: GateConfig,
    *,
    rows: int | None = None,
    wished: float = 0.8,
) -> Plan:
    """Plan a comparison: its power on these rows, the rows that it needs, and the smallest effect that it
    finds.

    `batches` holds each batch's present number of test rows; with `rows` they are scaled in proportion.
    """
    today = sum(batches.values())
    wanted = rows or today

    def power(at: float, count: int) -> tuple[float, float]:
        return _power(at, _scaled(batches, count), seen, golden, spread, alpha, config)

    found, success = power(effect, wanted)
    needed = _least(lambda count: power(effect, count)[0] >= wished, max(config.min_rows, 2))
    most = 1.0 if spread.differing is not None else 10 * max(spread.deviation, 1e-9)
    smallest = _smallest(lambda gain: power(config.min_gain + gain, wanted)[0] >= wished, most)
    return Plan(
        effect,
        alpha,
        wanted,
        found,
        success,
        needed,
        None if smallest is None else config.min_gain + smallest,
    )


def _power(
    effect: float,
    batches: Mapping[str, int],
    seen: Sequence[str],
    golden: int,
    spread: Spread,
    alpha: float,
    config: GateConfig,
) -> tuple[float, float]:
    """Return (power of the whole gate, power of the success metric alone)."""
    if sum(batches.values()) < config.min_rows:
        return 0.0, 0.0
    generator = np.random.default_rng(config.seed)
    parts = {name: _draw(generator, rows, effect, spread) for name, rows in batches.items() if rows}
    whole = _join(list(parts.values()))
    success = (whole.low(alpha) > config.min_gain) & whole.beyond_chance(alpha)
    past = [part for name, part in parts.items() if name in seen]
    kept = success.copy()
    if past:
        kept &= _join(past).low(config.guardrail_alpha) >= -config.past_margin
    judged = [part for part in past if len(past) > 1 and part.rows >= config.min_slice_rows]
    if judged:
        found = posterior(_sums(generator, judged, effect, spread.explained), scale_of(config))
        kept &= (found.below(-config.past_margin) <= config.part_alpha).all(axis=-1)
    if golden:
        kept &= _draw(generator, golden, effect, spread).low(config.guardrail_alpha) >= -config.golden_margin
    return float(kept.mean()), float(success.mean())


class _Draws(NamedTuple):
    """Sums over `rows` rows, one value per draw: gains, their squares, and rows won and lost (for scores of 0
    and 1).
    """

    rows: int
    total: Values
    squares: Values
    won: NDArray[np.int64] | None
    lost: NDArray[np.int64] | None

    @property
    def mean(self) -> Values:
        return self.total / self.rows

    @property
    def error(self) -> Values:
        """Return the standard error of the mean."""
        return np.asarray(
            np.sqrt(np.maximum(0.0, self.squares / self.rows - self.mean**2) / self.rows), dtype=np.float64
        )

    def low(self, alpha: float) -> Values:
        return np.asarray(self.mean - NormalDist().inv_cdf(1 - alpha) * self.error)

    def beyond_chance(self, alpha: float) -> NDArray[np.bool_]:
        """Apply the gate's sign test (`ratchet.evaluation.statistics.chance_of`)."""
        from scipy.stats import binom

        if self.won is None or self.lost is None:
            return np.ones(len(self.total), dtype=np.bool_)
        return np.asarray(binom.sf(self.won - 1, self.won + self.lost, 0.5) <= alpha)


def _draw(generator: np.random.Generator, rows: int, effect: float, spread: Spread) -> _Draws:
    if spread.differing is None:
        total = rows * effect + math.sqrt(rows) * spread.deviation * generator.standard_normal(DRAWS)
        return _Draws(rows, total, np.full(DRAWS, rows * (spread.deviation**2 + effect**2)), None, None)
    differing = max(spread.differing, abs(effect))
    counts = generator.multinomial(
        rows, [(differing + effect) / 2, max(0.0, (differing - effect) / 2), max(0.0, 1 - differing)], DRAWS
    )
    won, lost = counts[:, 0], counts[:, 1]
    return _Draws(rows, (won - lost).astype(np.float64), (won + lost).astype(np.float64), won, lost)


def _sums(generator: np.random.Generator, parts: list[_Draws], effect: float, explained: float) -> Sums:
    """Divide the parts' means into what the likelihood tells, in which the effect shows, and the rest."""
    means = np.column_stack([part.mean for part in parts])  # (draws, parts)
    errors = np.column_stack([part.error for part in parts])
    apart = math.sqrt(explained * (1 - explained)) * errors * generator.standard_normal(means.shape)
    told = effect + explained * (means - effect) + apart
    return Sums(told, math.sqrt(explained) * errors, means - told, math.sqrt(1 - explained) * errors)


def _join(parts: list[_Draws]) -> _Draws:
    won, lost = (
        [part.won for part in parts if part.won is not None],
        [part.lost for part in parts if part.lost is not None],
    )
    return _Draws(
        sum(part.rows for part in parts),
        np.sum([part.total for part in parts], axis=0),
        np.sum([part.squares for part in parts], axis=0),
        np.sum(won, axis=0) if won else None,
        np.sum(lost, axis=0) if lost else None,
    )


def _scaled(batches: Mapping[str, int], rows: int) -> dict[str, int]:
    today = sum(batches.values())
    return {name: round(count * rows / today) for name, count in batches.items()}


def _least(holds: Callable[[int], bool], start: int) -> int | None:
    """Find the smallest number from which `holds` is true, to within 1 %, by doubling and then halving; None
    over MOST_ROWS.
    """
    high = start
    while not holds(high):
        high *= 2
        if high > MOST_ROWS:
            return None
    low = high // 2
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _smallest(holds: Callable[[float], bool], most: float) -> float | None:
    """Find the smallest gain from which `holds` is true, to within a thousandth of `most`."""
    if not holds(most):
        return None
    low, high = 0.0, most
    while high - low > most / 1000:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
