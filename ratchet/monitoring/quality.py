"""Estimate the share of right answers from a judge on all requests and from people on a few, and test at
every look whether it fell.

The estimate is prediction-powered (Angelopoulos et al., arXiv 2301.09633): the judge's mean over all
requests, plus what people correct in it, each answer of theirs weighted by the inverse of its probability to
be asked about. The judge counts by the factor lambda that leaves the least variance (PPI++, arXiv
2311.01453), so a judge that knows nothing counts nothing. Errors of the judge, constant or not, cancel.

The test compares each day, with all days after it, with all days before it. The difference of two such
estimates, times its information (1 / variance), is nearly a Brownian motion in that information, so a normal
mixture gives an e-process for each day on which a fall may have begun (Robbins 1970; the asymptotic
confidence sequence of arXiv 2103.06476). The e-processes of `MONTH` days are averaged, which is an e-process
again: by Ville's inequality it exceeds 1 / rate in at most a share `rate` of the months without a fall,
however often it is looked at. The guarantee is asymptotic: it needs tens of labels (`LEAST`), and whether
people answer must not depend on whether an answer is right.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

Values = NDArray[np.float64]
Places = NDArray[np.int64]
MONTH = 30  # days that share the error
LEAST = 20  # labels that each side of a comparison needs
PRIOR = 50  # labels' weight of the spread of all residuals, beside a side's own
# The mixture is tightest at about 14 times this information, where a fall of 0.1 is 4 standard errors.
TUNED_TO = 110.0
STRATA = np.array([0.2, 0.4, 0.6, 0.8])  # edges of the judge's score, for the chance to be asked about
FLOOR = 0.1  # least assumed standard deviation of a label in a stratum


class Days(NamedTuple):
    """What the judge said of all requests, by day: shapes (days,)."""

    requests: Values
    scores: Values  # the sum of the judge's scores


class Labels(NamedTuple):
    """What people said of the requests they were asked about: shapes (labels,)."""

    day: Places  # place of the request's day
    score: Values  # of the judge, 0 to 1
    right: Values  # 0 or 1
    inclusion: Values  # probability with which the request was chosen


class Estimate(NamedTuple):
    share: float
    variance: float
    labels: int


class Fall(NamedTuple):
    """The day from which a fall is likeliest, with the shares of right answers before it and since.

    `bound` is the largest difference `after - before` that the rate leaves possible, for this day at every
    look. `evidence` is the e-value of all days together, in months' blocks the largest.
    """

    day: int
    before: Estimate
    after: Estimate
    bound: float
    evidence: float
    alarm: bool


def estimate(days: Days, labels: Labels) -> Estimate | None:
    """Estimate the share of right answers over all days; None without labels."""
    if not len(labels.right):
        return None
    weight = power(labels)
    whole = _sums(days, labels, weight).sum(axis=1)
    return _estimate(whole, weight, float(_spread(whole)))


class Difference(NamedTuple):
    mean: float
    variance: float


def compare(days: Days, labels: Labels, day: int) -> Difference:
    """Estimate the share of right answers from `day` on, minus that before it; both need labels."""
    weight = power(labels)
    sums = _sums(days, labels, weight)
    before, after = sums[:, :day].sum(axis=1), sums[:, day:].sum(axis=1)
    pooled = float(_spread(sums.sum(axis=1)))
    return Difference(
        float(_share(after, weight) - _share(before, weight)),
        float(_variance(after, pooled) + _variance(before, pooled)),
    )


def power(labels: Labels) -> float:
    """Return lambda: the weighted regression coefficient of people's answers on the judge's scores.

    One more label, on which the judge is no help, keeps it near 0 while there are few.
    """
    weights = labels.inclusion**-2
    if not len(weights):
        return 0.0
    score, right = (values - np.average(values, weights=weights) for values in (labels.score, labels.right))
    return float((weights * score * right).sum() / ((weights * score**2).sum() + 0.25 * weights.mean()))


def find_fall(days: Days, labels: Labels, *, rate: float, margin: float = 0.0) -> Fall | None:
    """Find the day since which the share of right answers is likeliest lower by more than `margin`.

    `rate` is the share of months without such a fall that may end in an alarm. None while no day has `LEAST`
    labels before it and since.
    """
    count = len(days.requests)
    if count < 2:
        return None
    weight = power(labels)
    sums = np.cumsum(_sums(days, labels, weight), axis=1)
    whole, places = sums[:, -1], np.arange(1, count)
    before, after = (
        sums[:, :-1],
        whole[:, None] - sums[:, :-1],
    )  # (sums, days - 1): a fall before day `places`
    told = (before[LABELS] >= LEAST) & (after[LABELS] >= LEAST)
    if not told.any():
        return None
    places, before, after = places[told], before[:, told], after[:, told]
    pooled = float(_spread(whole))
    information = 1.0 / (_variance(before, pooled) + _variance(after, pooled))
    fallen = _share(before, weight) - _share(after, weight) - margin
    logs = _log_e_value(fallen, information)
    evidence = np.ones((count + MONTH - 1) // MONTH)  # a day without enough labels has the e-value 1
    np.add.at(evidence, places // MONTH, np.expm1(np.minimum(logs, 600.0)) / MONTH)
    best = int(logs.argmax())
    width = _radius(float(information[best]), rate / MONTH)
    return Fall(
        int(places[best]),
        _estimate(before[:, best], weight, pooled),
        _estimate(after[:, best], weight, pooled),
        float(width - fallen[best] - margin),
        float(evidence.max()),
        bool(evidence.max() >= 1 / rate),
    )


def _log_e_value(fallen: Values, information: Values) -> Values:
    """Return the log of the e-value of each fall: a half-normal mixture over its size."""
    total = information + TUNED_TO
    z = fallen * information / np.sqrt(total)
    return np.asarray(math.log(2) + 0.5 * np.log(TUNED_TO / total) + z**2 / 2 + log_ndtr(z), dtype=np.float64)


def _radius(information: float, alpha: float) -> float:
    """Return the distance at which the e-value is about 1 / alpha (its normal factor taken as 1)."""
    total = information + TUNED_TO
    return math.sqrt(total * (math.log(total / TUNED_TO) + 2 * math.log(1 / (2 * alpha)))) / information


# --- sums by day, from which every side of every comparison is computed -------------------------------------

REQUESTS, SCORES, LABELS, WEIGHTS, RESIDUALS, SQUARES, FIRSTS, SECONDS, RIGHTS = range(9)


def _sums(days: Days, labels: Labels, weight: float) -> Values:
    """Return for each day the sums that an estimate needs: shape (9, days).

    A day counts as much as people have answered of it. Else the judge's scores of days that nobody has
    answered yet would count without a correction, and a judge that changed would look like a fall.
    """
    residual, w = labels.right - weight * labels.score, 1 / labels.inclusion
    columns = [np.ones_like(w), w, w * residual, w**2, w**2 * residual, w**2 * residual**2, w * labels.right]
    count = len(days.requests)
    told = [np.bincount(labels.day, weights=column, minlength=count) for column in columns]
    answered = told[1]
    judged = days.scores / np.maximum(days.requests, 1)
    return np.stack([np.minimum(days.requests, answered), judged * answered, *told])


def _share(sums: Values, weight: float) -> Values:
    return np.asarray((weight * sums[SCORES] + sums[RESIDUALS]) / sums[WEIGHTS], dtype=np.float64)


def _variance(sums: Values, pooled: float) -> Values:
    """Return the variance of the estimate: of the requests' own answers, and of estimating them from labels.

    The spread of a side's residuals is drawn towards that of all labels, `pooled`: estimated from the side
    alone it is larger whenever its share of right answers is lower by chance, and the test finds too little.
    """
    own = _spread(sums)
    known = (sums[LABELS] * own + PRIOR * pooled) / (sums[LABELS] + PRIOR)
    sampled = known * sums[SQUARES] / sums[WEIGHTS] ** 2
    right = np.clip(sums[RIGHTS] / sums[WEIGHTS], 0.02, 0.98)
    effective = sums[WEIGHTS] ** 2 / sums[SQUARES]
    explained = np.maximum(right * (1 - right) - sampled * effective, 0)  # by the judge
    return np.asarray(sampled + explained / np.maximum(sums[REQUESTS], sums[LABELS]), dtype=np.float64)


def _spread(sums: Values) -> Values:
    """Return the mean squared residual around its mean, weighted by the squared weights of the labels.

    One more label that is off by half keeps a few equal labels from proving that there is no spread.
    """
    mean = sums[RESIDUALS] / sums[WEIGHTS]
    squares = sums[SECONDS] - 2 * mean * sums[FIRSTS] + mean**2 * sums[SQUARES]
    return np.asarray(
        (np.maximum(squares, 0) + 0.25 * sums[SQUARES] / sums[LABELS])
        / (sums[SQUARES] * (1 + 1 / sums[LABELS])),
        dtype=np.float64,
    )


def _estimate(sums: Values, weight: float, pooled: float) -> Estimate:
    return Estimate(float(_share(sums, weight)), float(_variance(sums, pooled)), int(sums[LABELS]))


# --- whom to ask about --------------------------------------------------------------------------------------


def inclusion(scores: Values, labels: Labels, wanted: float) -> Values:
    """Return with what probability each request is to be asked about, so that `wanted` are expected.

    It is proportional to the standard deviation of people's answers in the score's stratum (Neyman 1934), as
    far as earlier labels tell: a stratum in which people are always of one mind is asked about less.
    """
    strata, known = np.digitize(scores, STRATA), np.digitize(labels.score, STRATA)
    right = np.bincount(known, weights=labels.right, minlength=len(STRATA) + 1)
    said = np.bincount(known, minlength=len(STRATA) + 1)
    mean = (right + 1) / (said + 2)
    doubt = np.maximum(np.sqrt(mean * (1 - mean)), FLOOR)[strata]
    chances = np.zeros(len(scores))
    free = np.ones(len(scores), dtype=bool)
    while free.any() and (left := wanted - chances[~free].sum()) > 0:
        chances[free] = left * doubt[free] / doubt[free].sum()
        if not (over := free & (chances > 1)).any():
            break
        chances[over], free = 1.0, free & ~over
    return np.minimum(chances, 1.0)


def choose(scores: Values, chances: Values, chance: np.random.Generator) -> Places:
    """Choose requests with exactly these probabilities, spread evenly over the judge's scores.

    Systematic sampling along the sorted scores (Madow 1949): the number of chosen ones is the sum of the
    probabilities, rounded up or down. Returns their places.
    """
    order = np.lexsort((chance.random(len(scores)), scores))
    ends = np.cumsum(chances[order]) + chance.random()
    return np.sort(order[np.floor(ends) > np.floor(ends - chances[order])])
