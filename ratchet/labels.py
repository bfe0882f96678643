"""Answers that are labels: whether they are, and the macro F1 over them with its interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ratchet.evaluation.metrics import as_label
from ratchet.evaluation.statistics import Interval, Values

MIN_ROWS = 5  # of a reference, to count as a label


def are_labels(references: Sequence[str]) -> bool:
    """At least half of the rows have a reference that comes five times or more, and there is more than one such."""
    counts = Counter(map(as_label, references))
    common = {label for label, count in counts.items() if count >= MIN_ROWS}
    return len(common) > 1 and sum(counts[label] for label in common) >= len(references) / 2


def macro_f1(answers: Sequence[str], references: Sequence[str], *, alpha: float, resamples: int, seed: int) -> Interval:
    """The mean of the F1 of each label that the references hold, as scikit-learn's `f1_score(average="macro", labels=…)`; bounds by the bootstrap over rows."""
    answered, wanted = list(map(as_label, answers)), list(map(as_label, references))
    labels = {label: place for place, label in enumerate(sorted(set(wanted)))}
    said, true = (_one_hot(side, labels) for side in (answered, wanted))
    rows = len(wanted)
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), resamples)
    means = _mean_f1(counts @ (said * true), counts @ said, counts @ true)
    low, high = np.quantile(means, [alpha, 1 - alpha])
    mean = float(_mean_f1((said * true).sum(0)[None], said.sum(0)[None], true.sum(0)[None])[0])
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def _one_hot(side: list[str], labels: dict[str, int]) -> Values:
    """(rows, labels); a row that says no known label is empty."""
    found = np.zeros((len(side), len(labels)))
    places = [(row, labels[label]) for row, label in enumerate(side) if label in labels]
    found[tuple(np.array(places, dtype=int).reshape(-1, 2).T)] = 1.0
    return found


def _mean_f1(hits: Values, said: Values, true: Values) -> Values:
    """(draws,) from counts of (draws, labels). A label that a draw lacks, and nobody says, does not count there."""
    both = said + true
    score = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(score.sum(1) / np.maximum(1, (both > 0).sum(1)), dtype=np.float64)
