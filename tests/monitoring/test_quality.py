"""The share of right answers from a judge on all requests and from people on a few: what the estimate owes to
each, which requests people are asked about, and how often the alarm errs.
"""

from __future__ import annotations

import numpy as np
import pytest

from ratchet.monitoring.quality import (
    LEAST,
    Days,
    Labels,
    choose,
    compare,
    estimate,
    find_fall,
    inclusion,
    power,
)

NOBODY = Labels(np.zeros(0, dtype=np.int64), *[np.zeros(0)] * 3)


def judged(
    right: np.ndarray, sensitivity: float, specificity: float, chance: np.random.Generator
) -> np.ndarray:
    drawn = chance.random(len(right))
    return np.where(right > 0, drawn < sensitivity, drawn >= specificity).astype(float)


def stream(
    seed: int, shares: list[float], *, sensitivity=0.9, specificity=0.9, later: float | None = None
) -> tuple[Days, Labels, float]:
    """Days of 500 requests with these shares of right answers, 50 labels each; and the true share of all."""
    chance, labels, requests, scores, all_right = np.random.default_rng(seed), NOBODY, [], [], []
    for day, share in enumerate(shares):
        right = (chance.random(500) < share).astype(float)
        turn = day / max(1, len(shares) - 1)
        able = sensitivity + turn * ((later or sensitivity) - sensitivity)
        score = judged(right, able, specificity, chance)
        chances = inclusion(score, labels, 50)
        chosen = choose(score, chances, chance)
        new = (np.full(500, day), score, right, chances)
        labels = Labels(*(np.concatenate([old, more[chosen]]) for old, more in zip(labels, new, strict=True)))
        requests.append(500.0)
        scores.append(score.sum())
        all_right.append(right)
    return Days(np.array(requests), np.array(scores)), labels, float(np.concatenate(all_right).mean())


def first(days: Days, labels: Labels, count: int) -> tuple[Days, Labels]:
    """What was known after `count` days."""
    seen = labels.day < count
    return Days(*(part[:count] for part in days)), Labels(*(part[seen] for part in labels))


# --- the estimate ---


@pytest.mark.parametrize(("sensitivity", "specificity"), [(1.0, 1.0), (0.97, 0.5), (0.6, 0.9), (0.5, 0.5)])
def test_the_bias_of_a_judge_cancels(sensitivity, specificity):
    errors, told = [], []
    for seed in range(100):
        days, labels, true = stream(seed, [0.8] * 2, sensitivity=sensitivity, specificity=specificity)
        found = estimate(days, labels)
        errors.append(found.share - true)
        told.append(found.variance)
        naive = days.scores.sum() / 1000 - true
    spread = float(np.std(errors))
    assert abs(np.mean(errors)) < 3 * spread / 10 + 1e-9
    assert spread < 1.1 * np.sqrt(np.mean(told))
    if (sensitivity, specificity) == (0.6, 0.9):
        assert abs(naive) > 0.2  # the judge alone is far off


def test_a_good_judge_narrows_the_estimate_and_a_coin_costs_nothing():
    widths = {}
    for name, able in (("perfect", 1.0), ("good", 0.9), ("coin", 0.5)):
        days, labels, _ = stream(1, [0.8] * 10, sensitivity=able, specificity=able)
        widths[name] = np.sqrt(estimate(days, labels).variance)
    people = np.sqrt(0.16 / 500)
    assert widths["perfect"] < 0.6 * people
    assert widths["good"] < 0.85 * people
    assert widths["coin"] == pytest.approx(people, rel=0.12)


def test_the_judge_counts_as_far_as_it_helps():
    good, coin = (power(stream(2, [0.8] * 20, sensitivity=able, specificity=able)[1]) for able in (0.95, 0.5))
    assert good == pytest.approx(0.87, abs=0.12)  # cov / var = 0.16 * 0.9 / (0.77 * 0.23)
    assert abs(coin) < 0.12


def test_people_who_do_not_answer_only_widen_the_estimate():
    days, labels, true = stream(3, [0.8] * 10)
    answered = np.random.default_rng(0).random(len(labels.right)) < 0.3
    some = Labels(*(part[answered] for part in labels))
    whole, part = estimate(days, labels), estimate(days, some)
    assert part.variance > 2 * whole.variance
    assert abs(part.share - true) < 3 * np.sqrt(part.variance)
    assert estimate(days, NOBODY) is None


# --- whom to ask about ---


def test_requests_are_chosen_with_exactly_the_probability_that_is_kept():
    chance, scores = np.random.default_rng(0), np.array([0.0, 0.1, 0.5, 0.5, 0.9, 1.0, 1.0, 0.3])
    chances = np.array([0.5, 0.1, 0.9, 0.3, 0.25, 0.05, 1.0, 0.2])
    counts, sizes = np.zeros(8), set()
    for _ in range(4000):
        chosen = choose(scores, chances, chance)
        counts[chosen] += 1
        sizes.add(len(chosen))
    assert counts / 4000 == pytest.approx(chances, abs=0.03)
    assert sizes == {3, 4}  # their sum is 3.3


def test_scores_on_which_people_are_of_two_minds_are_asked_about_more():
    scores = np.array([0.05] * 50 + [0.5] * 50 + [0.95] * 50)
    labels = Labels(
        np.zeros(90, dtype=np.int64),
        np.repeat([0.05, 0.5, 0.95], 30),
        np.concatenate([np.zeros(30), np.tile([0, 1], 15), np.ones(30)]).astype(float),
        np.full(90, 0.5),
    )
    chances = inclusion(scores, labels, 30)
    assert chances.sum() == pytest.approx(30)
    assert chances[60] > 2 * chances[10] and chances[60] > 2 * chances[110]
    assert chances.min() > 0.05  # nothing is ever out of question: its weight would have no bound
    assert inclusion(scores, NOBODY, 30) == pytest.approx(np.full(150, 0.2))


def test_nobody_is_asked_about_more_than_there_is():
    assert (inclusion(np.array([0.1, 0.9]), NOBODY, 50) == 1).all()
    assert inclusion(np.zeros(0), NOBODY, 2).shape == (0,)
    assert list(choose(np.array([0.3, 0.1]), np.ones(2), np.random.default_rng(0))) == [0, 1]


# --- the alarm ---


def test_a_fall_of_ten_points_is_found_within_days_and_dated():
    waited, dated = [], []
    for seed in range(20):
        days, labels, _ = stream(seed, [0.8] * 14 + [0.7] * 10)
        falls = [(count, find_fall(*first(days, labels, count), rate=0.05)) for count in range(2, 25)]
        alarms = [(count, fall) for count, fall in falls if fall and fall.alarm]
        assert alarms and alarms[0][0] > 14
        waited.append(alarms[0][0] - 14)
        dated.append(falls[-1][1].day)
        assert falls[-1][1].before.share > falls[-1][1].after.share
        assert falls[-1][1].bound < 0
    assert np.median(waited) <= 4
    assert np.median(dated) == pytest.approx(14, abs=1)


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "later"), [(0.9, 0.9, None), (0.95, 0.85, 0.7), (0.5, 0.5, None)]
)
def test_a_judge_that_errs_drifts_or_throws_coins_raises_no_alarm(sensitivity, specificity, later):
    alarms = 0
    for seed in range(60):
        days, labels, _ = stream(
            seed, [0.8] * 30, sensitivity=sensitivity, specificity=specificity, later=later
        )
        falls = (find_fall(*first(days, labels, count), rate=0.05) for count in range(2, 31))
        alarms += any(fall is not None and fall.alarm for fall in falls)
    assert alarms <= 8  # the binomial 99 % limit of 5 % in 60


def test_a_judge_that_changes_while_nobody_answers_raises_no_alarm():
    """The judge's scores of a day count as far as people have answered of that day."""
    days, labels, _ = stream(5, [0.8] * 20)
    broken = Days(days.requests, np.where(np.arange(20) < 10, days.scores, 0.3 * days.scores))
    silent = Labels(*(part[labels.day < 9] for part in labels))
    assert broken.scores[10:].sum() < 0.5 * days.scores[10:].sum()
    assert not find_fall(broken, silent, rate=0.05).alarm
    assert estimate(broken, silent).share == pytest.approx(estimate(*first(days, labels, 9)).share, abs=1e-9)


def test_a_fall_within_the_margin_is_none():
    for seed in range(5):
        days, labels, _ = stream(seed, [0.8] * 15 + [0.72] * 15, sensitivity=0.98, specificity=0.98)
        assert find_fall(days, labels, rate=0.05).alarm
        assert not find_fall(days, labels, rate=0.05, margin=0.1).alarm


def test_few_labels_tell_nothing():
    days, labels, _ = stream(0, [0.8, 0.2])
    few = Labels(*(part[np.r_[: LEAST - 1, -LEAST:0]] for part in labels))
    assert find_fall(days, few, rate=0.05) is None
    assert find_fall(days, labels, rate=0.05) is not None
    assert find_fall(Days(days.requests[:1], days.scores[:1]), first(days, labels, 1)[1], rate=0.05) is None


def test_the_difference_of_two_parts_is_that_of_their_own_estimates():
    days, labels, _ = stream(4, [0.8] * 5 + [0.6] * 5)
    found = compare(days, labels, 5)
    assert found.mean == pytest.approx(-0.2, abs=4 * np.sqrt(found.variance))
    assert np.sqrt(found.variance) == pytest.approx(np.sqrt(2 * 0.04**2 / 5), rel=0.35)
