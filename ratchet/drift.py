"""Is a window of traffic still what the reference is? One verdict over many columns, with a false-alarm rate that is kept.

Each family of columns is tested by permutation: window and reference rows are mixed and drawn again, `resamples` times, into a window
and a reference of the same sizes, so that the null holds whatever the columns look like and however few reference rows there are.
Within a family the smallest p counts, corrected by the same draws (Westfall & Young 1993, min-p); families share the error by weight.
A family that has no reference yet is left out and said; its weight goes to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratchet.regions import Topic
from ratchet.surprise import Stems

Values = NDArray[np.float64]
Draws = NDArray[np.float32]  # (1 + resamples, rows): 1 where a row is in the window; the first is the window itself
# Most of the error goes to what tells new subjects best (docs/benchmarks.md); what it cannot see, the others must.
WEIGHTS = {"novelty": 0.5, "surprise": 0.15, "form and mix": 0.15, "answers": 0.1, "service": 0.1}
COMMON, CLUSTER_ROWS = 5, 8  # rows that hold a word, rows a cluster: under these a frequency says nothing


class Column(msgspec.Struct, frozen=True):
    """`value` and `reference` are means of the window and of the reference, in the column's own unit; `p` is the column's own, not corrected."""

    name: str
    family: str
    value: float
    reference: float
    p: float


class Verdict(msgspec.Struct, frozen=True):
    """`p` is of all columns together: `drift` where it is at most the false-alarm rate. None where the window is too small: `needed` distinct prompts are."""

    verdict: str  # "drift", "no drift", "too few"
    p: float | None
    rows: int
    distinct: int
    needed: int
    columns: list[Column] = []
    topics: list[Topic] = []
    missing: list[str] = []  # families without a reference, with the reason


class Measure(NamedTuple):
    """A statistic for each draw, larger where it speaks of drift more; and what people are shown."""

    name: str
    statistic: Callable[[Draws], Values]
    value: float
    reference: float


class Family(NamedTuple):
    """Measures over the same rows: the window's first, then the reference's."""

    name: str
    window: int
    reference: int
    measures: list[Measure]


def judge(families: list[Family], *, rate: float, resamples: int, seed: int) -> tuple[str, float, list[Column]]:
    """("drift" or "no drift", p of all together, columns)."""
    total = sum(WEIGHTS[family.name] for family in families)
    columns: list[Column] = []
    together = 1.0
    for number, family in enumerate(families):
        draws = draw(family.window, family.reference, resamples, seed + number)
        ranks = np.stack([_p_values(measure.statistic(draws)) for measure in family.measures])  # (measures, draws)
        columns += [Column(measure.name, family.name, measure.value, measure.reference, float(ranks[place, 0])) for place, measure in enumerate(family.measures)]
        smallest = ranks.min(axis=0)
        corrected = float((smallest <= smallest[0] + 1e-12).mean())
        together = min(together, corrected / (WEIGHTS[family.name] / total))
    return ("drift" if together <= rate else "no drift"), together, columns


def draw(window: int, reference: int, resamples: int, seed: int) -> Draws:
    generator = np.random.default_rng(seed)
    draws = np.zeros((resamples + 1, window + reference), dtype=np.float32)
    draws[0, :window] = 1
    block = max(1, 8_000_000 // (window + reference))
    for start in range(1, resamples + 1, block):
        size = min(block, resamples + 1 - start)
        chosen = np.argpartition(generator.random((size, window + reference), dtype=np.float32), window - 1, axis=1)[:, :window]
        np.put_along_axis(draws[start : start + size], chosen, 1, axis=1)
    return draws


def _p_values(statistic: Values) -> Values:
    """Of each draw among all of them, itself included (so never 0)."""
    ordered = np.sort(statistic)
    return 1.0 - (np.searchsorted(ordered, statistic - 1e-9 * (1 + np.abs(statistic)), side="left")) / len(statistic)


# --- measures ----------------------------------------------------------------------------------------------------------


def higher(name: str, values: Values, window: int) -> Measure:
    """One-sided: the window's mean is higher."""
    return Measure(name, lambda draws: _difference(values, draws), float(values[:window].mean()), float(values[window:].mean()))


def lower(name: str, values: Values, window: int) -> Measure:
    return Measure(name, lambda draws: -_difference(values, draws), float(values[:window].mean()), float(values[window:].mean()))


def other(name: str, values: Values, window: int) -> Measure:
    """Two-sided in the mean and in the spread: short and long ones together are other than middling ones."""
    centred = values - values.mean()
    spread = centred**2

    def statistic(draws: Draws) -> Values:
        return np.maximum(_standard(np.abs(_difference(centred, draws))), _standard(np.abs(_difference(spread, draws))))

    return Measure(name, statistic, float(values[:window].mean()), float(values[window:].mean()))


def mix(name: str, kinds: NDArray[np.int64], window: int) -> Measure:
    """Frequencies of kinds (clusters, answers): the chi-square statistic. Shown: the share of the kind that grew most."""
    held = np.zeros((len(kinds), int(kinds.max()) + 1), dtype=np.float32)
    held[np.arange(len(kinds)), kinds] = 1
    held = held[:, held.sum(axis=0) >= CLUSTER_ROWS]
    shares = (held[:window].mean(axis=0), held[window:].mean(axis=0)) if held.shape[1] else (np.zeros(1), np.zeros(1))
    most = int((shares[0] - shares[1]).argmax())
    return Measure(name, lambda draws: _chi_square(held, draws), float(shares[0][most]), float(shares[1][most]))


def words(name: str, present: Any, window: int) -> Measure:
    """Known words in another frequency: squared differences of the shares of rows that hold them, over what chance would give; `present` is sparse (rows, words)."""
    counts = np.asarray(present.sum(axis=0)).ravel()
    kept = present[:, counts >= COMMON]
    return Measure(name, lambda draws: _chi_square(kept, draws), float(kept[:window].sum(axis=1).mean()), float(kept[window:].sum(axis=1).mean()))


def novelty(rarity: Values, stems: Stems, window: int) -> Measure:
    """Rare stems, and the same ones in several rows: the sum of both, each in its null's standard deviations. Shown: the rarity."""

    def statistic(draws: Draws) -> Values:
        return _standard(_difference(rarity, draws)) + _standard(_recurrence(stems, draws))

    return Measure("novelty", statistic, float(rarity[:window].mean()), float(rarity[window:].mean()))


def _recurrence(stems: Stems, draws: Draws) -> Values:
    """Squared surplus of the share of window rows over that of reference rows, of stems that two window rows hold at least."""
    window, reference = float(draws[0].sum()), float((1 - draws[0]).sum())
    if not stems.weights.size:
        return np.zeros(len(draws))
    inside = np.asarray(stems.present.T @ draws.T)  # (stems, draws)
    outside = np.asarray(stems.present.sum(axis=0)).reshape(-1, 1) - inside
    surplus = np.maximum(inside / window - outside / reference, 0.0) ** 2 * (inside >= 2)
    return np.asarray(stems.weights @ surplus, dtype=np.float64)


def _difference(values: Values, draws: Draws) -> Values:
    """Mean inside minus mean outside, for each draw."""
    window, rows = float(draws[0].sum()), len(values)
    inside = draws @ values
    return np.asarray(inside / window - (values.sum() - inside) / (rows - window), dtype=np.float64)


def _chi_square(held: Any, draws: Draws) -> Values:
    window, rows = float(draws[0].sum()), draws.shape[1]
    totals = np.asarray(held.sum(axis=0), dtype=np.float64).ravel()
    if not totals.size:
        return np.zeros(len(draws))
    inside = np.asarray(held.T @ draws.T)  # (kinds, draws)
    expected = (totals * window / rows)[:, None]
    return np.asarray(((inside - expected) ** 2 / expected).sum(axis=0), dtype=np.float64)


def _standard(values: Values) -> Values:
    """In standard deviations of the draws."""
    return np.asarray((values - values[1:].mean()) / (values[1:].std() + 1e-12), dtype=np.float64)
