"""The bootstrap: right where theory is, and it refuses what has no mean."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.evaluation.statistics import Interval, bootstrap_mean, bootstrap_means, chance_of, wilson

FINITE = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@pytest.mark.parametrize("alpha", [0.01, 0.025, 0.05])
@pytest.mark.parametrize("kind", ["normal", "hits", "differences"])
def test_bounds_agree_with_the_normal_approximation(kind, alpha):
    generator = np.random.default_rng(1)
    values = {
        "normal": generator.normal(2.0, 3.0, 1000),
        "hits": (generator.random(1000) < 0.3).astype(float),
        "differences": generator.choice([-1.0, 0.0, 1.0], size=1000, p=[0.1, 0.75, 0.15]),
    }[kind]
    found = bootstrap_mean(values, alpha=alpha, resamples=4000, seed=3)
    half = NormalDist().inv_cdf(1 - alpha) * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_the_lower_bound_of_equal_models_exceeds_zero_as_often_as_alpha_says():
    """400 times two models of the same quality that disagree on three rows of ten; 99 % of binomials lie
    within the limit.
    """
    generator, cycles, alpha = np.random.default_rng(2), 400, 0.05
    gains = [generator.choice([-1.0, 0.0, 1.0], size=150, p=[0.15, 0.7, 0.15]) for _ in range(cycles)]
    passed = sum(
        bootstrap_mean(values, alpha=alpha, resamples=500, seed=cycle).low > 0
        for cycle, values in enumerate(gains)
    )
    assert passed <= cycles * alpha + 2.326 * math.sqrt(cycles * alpha * (1 - alpha))
    assert passed >= cycles * alpha - 3.29 * math.sqrt(
        cycles * alpha * (1 - alpha)
    )  # a bound that never passes would prove nothing


@pytest.mark.parametrize("alpha", [0.001, 1e-4, 1e-5])
def test_a_bound_beyond_the_resamples_is_drawn_out_along_the_normal(alpha):
    values = np.random.default_rng(7).choice([-1.0, 0.0, 1.0], size=2000, p=[0.1, 0.75, 0.15])
    found = bootstrap_mean(values, alpha=alpha, resamples=2000, seed=3)
    half = NormalDist().inv_cdf(1 - alpha) * values.std() / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.15 * half
    )


@pytest.mark.parametrize(
    ("won", "lost", "chance"), [(5, 0, 1 / 32), (0, 0, 1.0), (0, 3, 1.0), (8, 2, 56 / 1024), (1, 1, 0.75)]
)
def test_the_chance_of_a_gain_is_mcnemars(won, lost, chance):
    assert chance_of(np.array([1.0] * won + [-1.0] * lost + [0.0] * 30)) == pytest.approx(chance)


def test_few_differing_rows_of_a_graded_score_leave_room_for_chance():
    assert chance_of(np.array([0.3, 0.2, 0.0, 0.0])) == 0.25


def test_columns_have_the_bounds_that_they_have_alone():
    table = np.random.default_rng(8).normal(size=(80, 3))
    together = bootstrap_means(table, alpha=0.05, resamples=400, seed=1)
    assert [tuple(each) for each in together] == [
        pytest.approx(tuple(bootstrap_mean(column, alpha=0.05, resamples=400, seed=1))) for column in table.T
    ]


def test_the_same_seed_gives_the_same_bounds_and_another_one_nearly_the_same():
    values = np.random.default_rng(4).normal(size=300)
    first, again, other = (
        bootstrap_mean(values, alpha=0.05, resamples=4000, seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert other != first
    assert other.low == pytest.approx(first.low, abs=0.02)


def test_more_rows_give_a_narrower_interval():
    values = np.random.default_rng(5).normal(size=6400)
    wide, narrow = (bootstrap_mean(values[:rows], alpha=0.05, resamples=600, seed=0) for rows in (100, 6400))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(8.0, rel=0.25)


def test_bounds_do_not_depend_on_how_resamples_are_cut_into_blocks():
    """With many rows the resamples no longer fit into one block."""
    values = np.random.default_rng(6).normal(size=40_000)
    found = bootstrap_mean(values, alpha=0.05, resamples=250, seed=0)
    assert found.low < values.mean() < found.high
    assert (found.high - found.low) / 2 == pytest.approx(1.645 / math.sqrt(40_000), rel=0.3)


@given(st.lists(FINITE, min_size=1, max_size=40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_bounds_lie_within_the_values(values, seed):
    found = bootstrap_mean(np.array(values), alpha=0.05, resamples=200, seed=seed)
    slack = 1e-9 * max(1.0, *(abs(value) for value in values))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_one_value_is_its_own_interval():
    assert bootstrap_mean(np.array([0.5]), alpha=0.01, resamples=200, seed=0) == Interval(0.5, 0.5, 0.5)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean(np.array([]), alpha=0.05, resamples=200, seed=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_counted(broken):
    with pytest.raises(ValueError, match="2 of 5 values are not finite"):
        bootstrap_mean(np.array([1.0, broken, 0.0, broken, 1.0]), alpha=0.05, resamples=200, seed=0)


@pytest.mark.parametrize(
    ("hits", "rows", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 10, 0.0179, 0.4042),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_the_interval_of_a_share_is_the_published_one(hits, rows, low, high):
    """81 of 263 stands in Newcombe 1998, table I; the others are R's prop.test without correction."""
    found = wilson(np.array([1.0] * hits + [0.0] * (rows - hits)), alpha=0.025)
    assert tuple(found) == pytest.approx((hits / rows, low, high), abs=5e-5)


@given(st.integers(1, 500), st.integers(0, 500), st.sampled_from([0.01, 0.025, 0.05]))
def test_the_interval_of_a_share_holds_the_share_and_stays_within_0_and_1(rows, hits, alpha):
    values = np.array([1.0] * min(hits, rows) + [0.0] * (rows - min(hits, rows)))
    found = wilson(values, alpha=alpha)
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.low < found.high
