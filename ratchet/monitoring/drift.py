"""Test whether a window of traffic still resembles the reference: one verdict over many columns, at a fixed
rate of false alarms.

The rows of window and reference are mixed and divided `resamples` times into a window and a reference of the
same sizes. This permutation test is exact for any columns and for however few reference rows. Columns over
the same rows share the draws. Within a family the smallest p counts, and among families the smallest weighted
p; each is corrected by those draws (Westfall & Young 1993, min-p). Between families over different rows the
error is divided by weight. A family without a reference is left out and reported; the others share its
weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc, log_ndtr
from scipy.stats import hypergeom

from ratchet.monitoring.novelty import Stems
from ratchet.monitoring.verdicts import Column

Values = NDArray[np.float64]
Draws = NDArray[
    np.float32
]  # (1 + resamples, rows): 1 where a row is in the window; the first is the window itself
# Most of the error goes to the family that detects new subjects best (docs/benchmarks.md); the others detect
# what it cannot. Where requests have pictures or recordings, all families share the error by
# these weights.
WEIGHTS = {
    "pictures": 0.3,
    "recordings": 0.3,
    "what pictures show": 0.3,
    "novelty": 0.45,
    "surprise": 0.15,
    "form and mix": 0.15,
    "answers": 0.05,
    "prompt NLL": 0.05,
    "feedback": 0.05,
    "errors": 0.05,
    "latency": 0.05,
}
PROMPTS = ("novelty", "surprise", "form and mix")  # families over the same rows
COMMON, FREQUENT = 5, 8  # least rows with a word, and of a kind: rarer frequencies say nothing


class Measure(NamedTuple):
    """A statistic for each draw, larger for stronger drift, and the two values that people are shown."""

    name: str
    direction: str
    statistic: Callable[[Draws], Values]
    value: float
    reference: float


class Family(NamedTuple):
    """Measures over the same rows: first the window's, then the reference's."""

    name: str
    window: int
    reference: int
    measures: list[Measure]


class Judged(NamedTuple):
    drift: bool
    p: float  # for all families together
    columns: list[Column]
    moved: list[str]  # as in Verdict


def judge(families: list[Family], *, rate: float, resamples: int, seed: int) -> Judged:
    """Judge whether the families together show drift.

    `rate` is the share of windows without drift that may be called drift.
    """
    total = sum(WEIGHTS[family.name] for family in families)
    columns: list[Column] = []
    moved: dict[str, float] = {}  # family → p, corrected for all others
    together = 1.0
    for number, same_rows in enumerate(_by_rows(families)):
        draws = draw(same_rows[0].window, same_rows[0].reference, resamples, seed + number)
        smallest, alone = np.full(len(draws), np.inf), dict[str, float]()
        for family in same_rows:
            weight = WEIGHTS[family.name] / total
            statistics = [measure.statistic(draws) for measure in family.measures]
            columns += [
                Column(
                    one.name,
                    family.name,
                    one.value,
                    one.reference,
                    float(_p_values(found)[0]),
                    one.direction,
                    weight,
                )
                for one, found in zip(family.measures, statistics, strict=True)
            ]
            lowest = np.min([_log_tail(found) for found in statistics], axis=0)
            weighted = _p_values(-lowest) / weight
            alone[family.name] = float(weighted[0])
            smallest = np.minimum(smallest, weighted)
        share = sum(WEIGHTS[family.name] for family in same_rows) / total
        p = float(_p_values(-smallest)[0]) / share
        together = min(together, p)
        # The clearest family counts as moved even if its own p is over the rate, because p is that of all
        # families over these rows together.
        if p <= rate:
            moved |= {name: found for name, found in alone.items() if found <= max(rate, min(alone.values()))}
    return Judged(together <= rate, min(1.0, together), columns, sorted(moved, key=lambda name: moved[name]))


def _by_rows(families: list[Family]) -> list[list[Family]]:
    prompts = [family for family in families if family.name in PROMPTS]
    assert len({(family.window, family.reference) for family in prompts}) <= 1
    return [*([prompts] if prompts else []), *([family] for family in families if family.name not in PROMPTS)]


def draw(window: int, reference: int, resamples: int, seed: int) -> Draws:
    generator = np.random.default_rng(seed)
    draws = np.zeros(
        (window + reference, resamples + 1), dtype=np.float32
    )  # rows first: what is summed over lies together
    draws[:window, 0] = 1
    block = max(1, 8_000_000 // (window + reference))
    for start in range(1, resamples + 1, block):
        size = min(block, resamples + 1 - start)
        chosen = np.argpartition(
            generator.random((size, window + reference), dtype=np.float32), window - 1, axis=1
        )[:, :window]
        draws[chosen, np.arange(start, start + size)[:, None]] = 1
    return draws.T


def _p_values(statistic: Values) -> Values:
    """Return the p-value of each draw among all draws, itself included, so that it is never 0.

    Statistics that differ only by rounding count as equal.
    """
    below = np.searchsorted(np.sort(statistic), statistic - 1e-4 * statistic.std() - 1e-9, side="left")
    return np.asarray(1.0 - below / len(statistic), dtype=np.float64)


def _log_tail(statistic: Values) -> Values:
    """Return the log of the upper tail's probability, from a Pearson III curve with the draws' mean, variance
    and skew.

    The columns of a family are compared by it. Ranks do not work: the more columns there are, the more draws
    hold some first rank, and a family of small weight could never win. The curve is only approximate, but the
    error is the same for the window and all draws, so the test stays exact.
    """
    z = _standard(statistic)
    skew = float((z**3).mean())
    if skew < 0.02:  # nearly symmetric: the curve is the normal one
        return np.asarray(log_ndtr(-z), dtype=np.float64)
    shape = 4 / skew**2
    tail = gammaincc(shape, np.maximum(0.0, shape + z * np.sqrt(shape)))
    return np.asarray(np.log(np.maximum(tail, 1e-300)), dtype=np.float64)


# --- measures -----------------------------------------------------------------------------------------------


def higher(name: str, values: Values, window: int, *, margin: float = 0.0) -> Measure:
    """Measure whether the window's mean is higher by more than `margin` (one-sided).

    Every row needs a value; a value that only some rows have makes a family of those rows.
    """
    judged = np.where(np.arange(len(values)) < window, values, values + margin)
    return Measure(name, "higher", lambda draws: _difference(judged, draws), *_means(values, window))


def lower(name: str, values: Values, window: int) -> Measure:
    return Measure(name, "lower", lambda draws: -_difference(values, draws), *_means(values, window))


def other(name: str, values: Values, window: int) -> Measure:
    """Measure whether the mean or the spread changed, in either direction (two-sided).

    The spread matters because a mix of short and long values can have the same mean as values of middle
    length.
    """
    centred = values - values.mean()
    spread = centred**2

    def statistic(draws: Draws) -> Values:
        return np.maximum(
            _standard(np.abs(_difference(centred, draws))), _standard(np.abs(_difference(spread, draws)))
        )

    return Measure(name, "other", statistic, *_means(values, window))


def mix(name: str, kinds: NDArray[np.int64], window: int) -> Measure:
    """Measure the frequencies of kinds (such as answers) by the chi-square statistic.

    People are shown the share of the kind that grew most.
    """
    held = _held(kinds)
    return Measure(name, "other", lambda draws: _chi_square(held, draws), *_grown(held, window))


def growth(name: str, kinds: NDArray[np.int64], window: int) -> Measure:
    """Measure the kind that grew most, by how unlikely its frequency is.

    Among hundreds of kinds the chi-square statistic drowns one that grew in the noise of all others. People
    are shown the share of the kind that grew most.
    """
    held = _held(kinds)
    return Measure(name, "higher", lambda draws: _largest_growth(held, draws), *_grown(held, window))


def _held(kinds: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return which rows are of which kind, (rows, kinds), without the rare kinds."""
    held = np.zeros((len(kinds), int(kinds.max()) + 1), dtype=np.float32)
    held[np.arange(len(kinds)), kinds] = 1
    return held[:, held.sum(axis=0) >= FREQUENT]


def _grown(held: NDArray[np.float32], window: int) -> tuple[float, float]:
    """Return the shares, in window and reference, of the kind whose share grew most."""
    if not held.shape[1]:
        return 0.0, 0.0
    shares = held[:window].mean(axis=0), held[window:].mean(axis=0)
    most = int((shares[0] - shares[1]).argmax())
    return float(shares[0][most]), float(shares[1][most])


def subjects(name: str, present: Any, places: NDArray[np.float32], window: int) -> Measure:
    """Measure whether the shares of known subjects changed.

    The statistic is a sum of two: one of the frequencies of known words (`present`, sparse (rows, words)),
    one of the mean place among the subjects. People are shown the distance between the means of window and
    reference, and the distance expected by chance.
    """
    words = present[:, np.asarray(present.sum(axis=0)).ravel() >= COMMON]
    places = places - places.mean(axis=0)

    def statistic(draws: Draws) -> Values:
        return _standard(_chi_square(words, draws)) + _standard(_apart(places, draws))

    apart = float(np.linalg.norm(places[:window].mean(axis=0) - places[window:].mean(axis=0)))
    by_chance = float(np.sqrt(places.var(axis=0).sum() * (1 / window + 1 / (len(places) - window))))
    return Measure(name, "other", statistic, apart, by_chance)


def novelty(rarity: Values, stems: Stems, window: int) -> Measure:
    """Measure rare stems, and rare stems that occur in several rows.

    The statistic is the sum of both, each in standard deviations over all draws. People are shown the rarity.
    """

    def statistic(draws: Draws) -> Values:
        return _standard(_difference(rarity, draws)) + _standard(_recurrence(stems, draws))

    return Measure("novelty", "higher", statistic, *_means(rarity, window))


def _means(values: Values, window: int) -> tuple[float, float]:
    return float(values[:window].mean()), float(values[window:].mean())


def _difference(values: Values, draws: Draws) -> Values:
    """Return the mean inside the window minus the mean outside it, for each draw."""
    window, rows = float(draws[0].sum()), len(values)
    centred = values - values.mean()
    inside = (centred.astype(np.float32) @ draws.T).astype(np.float64)
    return np.asarray(inside / window + inside / (rows - window), dtype=np.float64)


def _recurrence(stems: Stems, draws: Draws) -> Values:
    """Return how much more often rare stems recur in the window than in the reference, for each draw.

    For each stem that at least two window rows contain, take the surplus of its share of window rows over its
    share of reference rows. The result is the weighted sum of the squares.
    """
    window, reference = float(draws[0].sum()), float((1 - draws[0]).sum())
    if not stems.weights.size:
        return np.zeros(len(draws))
    inside = stems.present.T @ draws.T  # (stems, draws)
    outside = np.asarray(stems.present.sum(axis=0)).reshape(-1, 1) - inside
    surplus = np.maximum(inside / window - outside / reference, 0.0) ** 2 * (inside >= 2)
    return np.asarray(stems.weights @ surplus, dtype=np.float64)


def _chi_square(held: Any, draws: Draws) -> Values:
    window, rows = float(draws[0].sum()), draws.shape[1]
    totals = np.asarray(held.sum(axis=0), dtype=np.float64).ravel()
    if not totals.size:
        return np.zeros(len(draws))
    inside = held.T @ draws.T  # (kinds, draws)
    expected = (totals * window / rows).astype(np.float32)[:, None]
    return np.asarray(((inside - expected) ** 2 / expected).sum(axis=0), dtype=np.float64)


def _largest_growth(held: NDArray[np.float32], draws: Draws) -> Values:
    """Return the smallest chance of a kind to be in the window so often, as a negative log, for each draw.

    The chance is hypergeometric: in standard deviations a rare kind would exceed a common one too easily.
    """
    rows, window = draws.shape[1], round(float(draws[0].sum()))
    inside = np.rint(held.T @ draws.T).astype(np.int64)  # (kinds, draws)
    largest = np.zeros(len(draws))
    for count, found in zip(held.sum(axis=0).astype(int), inside, strict=True):
        chances = hypergeom.pmf(np.arange(count + 1), rows, count, window)
        tails = np.maximum(np.cumsum(chances[::-1])[::-1], 1e-300)  # of so many or more
        largest = np.maximum(largest, -np.log(tails[found]))
    return largest


def _apart(places: NDArray[np.float32], draws: Draws) -> Values:
    """Return the squared length of the sum of the places in the window, for each draw.

    The sum over all rows is 0, so this is the squared distance between the two means, times a constant.
    """
    return np.asarray(((places.T @ draws.T) ** 2).sum(axis=0), dtype=np.float64)


def _standard(values: Values) -> Values:
    """Express the values as distances from their mean over all draws, in standard deviations.

    The observed window is one of the draws; without it the test would not be exact.
    """
    return np.asarray((values - values.mean()) / (values.std() + 1e-12), dtype=np.float64)
