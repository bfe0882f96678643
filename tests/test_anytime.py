"""Bounds that hold at every look, against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from ratchet.anytime import FEWEST, Outcomes, compare, estimate, half_width, mismatch


def outcomes(champion: list[float], challenger: list[float], *, step: int = 0, first: int = 0) -> Outcomes:
    values = np.array([*champion, *challenger], dtype=float)
    arm = np.repeat([False, True], [len(champion), len(challenger)])
    return Outcomes(values, arm, np.full(len(values), step), np.arange(first, first + len(values)))


def together(*parts: Outcomes) -> Outcomes:
    return Outcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def test_the_difference_is_that_of_the_means_and_lies_between_its_bounds():
    bounds = compare(outcomes([0.0, 1.0] * 50, [1.0, 1.0, 1.0, 0.0] * 25), alpha=0.05, spread=0.5, pairs=100)
    assert bounds is not None
    assert bounds.mean == pytest.approx(0.25)
    assert bounds.low < 0.25 < bounds.high


def test_arms_are_not_pooled_over_steps():
    """Simpson: the arms are alike in each step; a hard step with few of the challenger's users must not make it look better."""
    easy = outcomes([0.9, 0.7] * 10, [0.9, 0.7] * 50)
    hard = outcomes([0.3, 0.1] * 50, [0.3, 0.1] * 10, step=1, first=1000)
    found = together(easy, hard)
    assert found.values[found.challenger].mean() - found.values[~found.challenger].mean() > 0.3
    assert estimate(found)[0] == pytest.approx(0.0)


def test_a_step_with_few_users_of_an_arm_says_nothing():
    assert compare(outcomes([0.0, 1.0] * 50, [1.0] * (FEWEST - 1)), alpha=0.05, spread=0.5, pairs=100) is None
    enough = outcomes([0.0, 1.0] * 50, [0.0, 1.0] * 50)
    assert estimate(together(enough, outcomes([0.0] * 50, [1.0] * (FEWEST - 1), step=1, first=200))) == estimate(enough)


def test_units_without_an_outcome_change_nothing():
    known = outcomes([0.0, 1.0] * 20, [0.0, 1.0, 1.0] * 20)
    unknown = outcomes([np.nan] * 30, [np.nan] * 30, first=100)
    assert estimate(together(known, unknown)) == estimate(known)
    assert compare(unknown, alpha=0.05, spread=0.5, pairs=100) is None


def test_no_units_are_no_bounds():
    assert compare(outcomes([], []), alpha=0.05, spread=0.5, pairs=100) is None


def test_equal_outcomes_are_no_proof_that_there_is_no_variance():
    """8 of 8 against 90 of 100: without the borrowed variance the challenger's would be 0."""
    bounds = compare(outcomes([1.0] * 90 + [0.0] * 10, [1.0] * 8), alpha=0.05, spread=0.5, pairs=100)
    assert bounds is not None
    assert bounds.low < 0


def test_a_users_outcomes_in_two_steps_count_as_one_persons():
    """The same users once more in a second step bring hardly any news; other users do."""
    generator = np.random.default_rng(0)
    champion, challenger = generator.random(200).round(), generator.random(200).round()
    first = outcomes(list(champion), list(challenger))
    same = outcomes(list(champion), list(challenger), step=1)
    others = outcomes(list(champion), list(challenger), step=1, first=1000)
    alone, again, news = (estimate(found)[1] for found in (first, together(first, same), together(first, others)))
    assert again == pytest.approx(alone, rel=0.05)
    assert news == pytest.approx(alone / 2, rel=0.05)


def test_a_user_who_changed_sides_counts_against_himself():
    values = list(np.random.default_rng(1).random(200))
    before = outcomes(values, list(np.random.default_rng(2).random(200)))
    crossed = Outcomes(before.values, ~before.challenger, before.step + 1, before.unit)
    assert estimate(together(before, crossed))[1] < estimate(before)[1] / 10


def test_the_bound_is_that_of_the_paper():
    """arXiv 2103.06476, one-sided: sigma * sqrt(2 (t r^2 + 1) / (t^2 r^2) * log(1 + sqrt(t r^2 + 1) / (2 alpha)))."""
    alpha, pairs, time, spread = 0.02, 100.0, 250.0, 0.4
    mixed = pairs / (2 * np.log(1 / alpha) + np.log(1 + 2 * np.log(1 / alpha)))
    squared = 1 / mixed
    sigma = np.sqrt(2) * spread  # of a pair's difference
    wanted = sigma * np.sqrt(2 * (time * squared + 1) / (time**2 * squared) * np.log(1 + np.sqrt(time * squared + 1) / (2 * alpha)))
    assert half_width(sigma**2 / time, alpha=alpha, spread=spread, pairs=pairs) == pytest.approx(wanted)


@pytest.mark.parametrize("pairs", [10.0, 100.0, 1000.0])
def test_looking_after_each_pair_is_wrong_no_more_often_than_alpha(pairs):
    """2,000 walks of 2,000 steps, looked at after each; the fixed-time bound is crossed by half of them."""
    alpha, walks = 0.05, 2000
    steps = np.random.default_rng(3).standard_normal((walks, 2000)) * np.sqrt(2) * 0.5
    counts = np.arange(1, 2001)
    means = np.cumsum(steps, axis=1) / counts
    widths = np.array([half_width(0.5 / count, alpha=alpha, spread=0.5, pairs=pairs) for count in counts])
    crossed = (means > widths).any(axis=1)
    assert crossed.mean() < alpha + 2.33 * np.sqrt(alpha * (1 - alpha) / walks)
    assert (means > 1.645 * np.sqrt(0.5 / counts)).any(axis=1).mean() > 0.4


def test_arms_of_the_wrong_size_are_found_and_right_ones_are_not():
    assert mismatch(60, 940, 0.05) < 10
    assert mismatch(250, 750, 0.05) > 1000
    assert mismatch(0, 300, 0.05) > 1000
    assert mismatch(0, 0, 0.5) == pytest.approx(1.0)
    assert mismatch(0, 100_000, 0.5) > 1e100


def test_a_step_without_two_arms_has_no_mismatch():
    assert mismatch(0, 1000, 0.0) == mismatch(1000, 0, 1.0) == 1.0


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_a_mismatch_is_alarmed_of_in_time_no_more_often_than_promised(share):
    """E-value above 20 at any of 60 looks: at most 5 % of rollouts."""
    generator = np.random.default_rng(4)
    counts = np.cumsum(generator.binomial(20, share, (1000, 60)), axis=1)
    worst = [max(mismatch(int(count), 20 * (look + 1) - int(count), share) for look, count in enumerate(row)) for row in counts]
    assert np.mean(np.array(worst) > 20) < 0.05 + 2.33 * np.sqrt(0.05 * 0.95 / 1000)
