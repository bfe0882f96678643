"""The verdict's arithmetic: exact p, one rate for all columns together, ties, rows without a value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import binom

from ratchet.monitoring.drift import (
    WEIGHTS,
    Family,
    draw,
    higher,
    judge,
    lower,
    mix,
    novelty,
    other,
    subjects,
)
from ratchet.monitoring.novelty import Stems


def p_of(measure, window: int, rows: int, *, resamples: int = 400) -> float:
    return judge(
        [Family("novelty", window, rows - window, [measure])], rate=0.05, resamples=resamples, seed=3
    ).p


def test_p_is_a_rank_among_the_draws_and_the_window_is_one_of_them():
    values = np.array([100.0] * 20 + [0.0] * 200)
    assert p_of(higher("x", values, 20), 20, 220) == pytest.approx(1 / 401)
    assert p_of(lower("x", values, 20), 20, 220) == 1.0


def test_values_that_are_all_alike_say_nothing():
    assert p_of(higher("x", np.zeros(300), 100), 100, 300) == 1.0
    assert p_of(other("x", np.full(300, 0.1), 100), 100, 300) == 1.0


def test_the_same_window_gives_the_same_p():
    values = np.random.default_rng(0).normal(size=300)
    assert p_of(higher("x", values, 100), 100, 300) == p_of(higher("x", values, 100), 100, 300)


def test_p_of_a_rare_event_is_that_of_fishers_exact_test():
    from scipy.stats import fisher_exact

    values = np.zeros(400)
    values[[0, 1, 2, 3, 4, 250, 300]] = 1  # five of 100 rows against two of 300
    exact = fisher_exact([[5, 95], [2, 298]], alternative="greater").pvalue
    assert p_of(higher("x", values, 100), 100, 400, resamples=8000) == pytest.approx(
        exact, abs=4 * math.sqrt(exact / 8000)
    )


def test_many_columns_of_five_families_keep_one_rate():
    chance, alarms, windows = np.random.default_rng(5), 0, 400
    for number in range(windows):
        families = [
            Family(
                name,
                60,
                90,
                [
                    make("x", values, 60)
                    for make in (higher, lower, other)
                    for values in chance.gamma(0.5, size=(2, 150))
                ],
            )
            for name in ("novelty", "surprise", "form and mix")
        ]
        families += [
            Family(
                name,
                50,
                40,
                [
                    higher("x", (chance.random(90) < 0.1).astype(float), 50),
                    other("y", chance.normal(size=90), 50),
                ],
            )
            for name in ("answers", "errors")
        ]
        alarms += judge(families, rate=0.05, resamples=199, seed=number).drift
    assert alarms <= binom.ppf(0.99, windows, 0.05)


def test_columns_that_say_the_same_cost_nothing():
    values = np.concatenate(
        [np.random.default_rng(2).normal(0.4, 1, 60), np.random.default_rng(3).normal(0, 1, 200)]
    )
    families = [
        Family(name, 60, 200, [higher("x", values, 60)] * 5)
        for name in ("novelty", "surprise", "form and mix")
    ]
    assert judge(families, rate=0.05, resamples=999, seed=1).p == pytest.approx(
        p_of(higher("x", values, 60), 60, 260, resamples=999), abs=0.02
    )


def test_a_family_without_rows_leaves_its_weight_to_the_others():
    values = np.concatenate([np.ones(30), np.zeros(100)])
    columns = judge(
        [
            Family("surprise", 30, 100, [higher("x", values, 30)]),
            Family("errors", 30, 100, [higher("y", values, 30)]),
        ],
        rate=0.05,
        resamples=200,
        seed=1,
    ).columns
    assert {column.name: column.weight for column in columns} == pytest.approx({"x": 0.75, "y": 0.25})
    assert WEIGHTS["surprise"] / (WEIGHTS["surprise"] + WEIGHTS["errors"]) == pytest.approx(0.75)


def test_columns_tell_their_direction():
    values = np.arange(100.0)
    measures = [make("x", values, 40) for make in (higher, lower, other)]
    assert [
        column.direction
        for column in judge([Family("answers", 40, 60, measures)], rate=0.05, resamples=200, seed=1).columns
    ] == ["higher", "lower", "other"]


def test_a_wider_spread_around_the_same_mean_is_seen():
    values = np.concatenate([np.tile([-4.0, 4.0], 50), np.tile([-1.0, 1.0], 150)])
    assert p_of(other("x", values, 100), 100, 400) < 0.01


def test_rare_stems_that_come_again_are_seen_where_the_mean_is_blind():
    rarity = np.full(400, 0.2)
    again = csr_matrix(np.array([[1.0] * 3] * 12 + [[0.0] * 3] * 388))
    once = csr_matrix(np.eye(400)[:, :60])
    assert p_of(novelty(rarity, Stems(again, np.ones(3)), 100), 100, 400) < 0.01
    assert p_of(novelty(rarity, Stems(once, np.ones(60)), 100), 100, 400) == 1.0


def test_known_subjects_in_other_shares_are_seen_and_shown_beside_chance():
    chance = np.random.default_rng(7)
    places = np.eye(4, dtype=np.float32)[
        np.concatenate([chance.choice(4, 200, p=[0.55, 0.15, 0.15, 0.15]), chance.choice(4, 400)])
    ]
    measure = subjects("x", csr_matrix(places), places, 200)
    assert p_of(measure, 200, 600) < 0.01 and measure.value > 3 * measure.reference
    alike = subjects("x", csr_matrix(places[200:]), places[200:], 150)
    assert p_of(alike, 150, 400) > 0.05 and alike.value < 2 * alike.reference


def test_nothing_frequent_is_no_fault():
    assert p_of(mix("x", np.arange(40), 20), 20, 40) == 1.0
    assert p_of(subjects("x", csr_matrix((40, 0)), np.zeros((40, 3), dtype=np.float32), 20), 20, 40) == 1.0
    assert p_of(novelty(np.zeros(40), Stems(csr_matrix((40, 0)), np.zeros(0)), 20), 20, 40) == 1.0


def test_draws_hold_each_row_as_often_as_another():
    share = draw(30, 70, 4000, seed=2)[1:].mean(axis=0)
    assert abs(share - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 4000)


def test_a_family_of_small_weight_and_many_columns_can_raise_the_alarm_with_few_draws():
    chance = np.random.default_rng(4)
    calm = Family("novelty", 200, 400, [higher("x", chance.normal(size=600), 200)])
    errors = np.concatenate([chance.random(200) < 0.2, chance.random(400) < 0.02]).astype(float)
    noisy = Family(
        "answers",
        200,
        400,
        [
            higher("errors", errors, 200),
            *(other(str(number), chance.normal(size=600), 200) for number in range(6)),
        ],
    )
    found = judge([calm, noisy], rate=0.05, resamples=200, seed=2)
    assert found.drift and found.moved == ["answers"]


def test_what_moved_is_named_the_clearest_first_and_nothing_else():
    chance = np.random.default_rng(6)
    shifted = [
        np.concatenate([chance.normal(by, 1, 100), chance.normal(0, 1, 300)]) for by in (3.0, 0.65, 0.0)
    ]
    families = [
        Family(name, 100, 300, [higher("x", values, 100)])
        for name, values in zip(("feedback", "latency", "errors"), shifted, strict=True)
    ]
    assert judge(families, rate=0.05, resamples=2000, seed=1).moved == ["feedback", "latency"]
    assert judge(families[2:], rate=0.05, resamples=2000, seed=1).moved == []


def test_families_that_are_clear_only_together_name_the_clearest():
    """Three columns of the same rows that say the same: corrected for each other they cost nothing, each by
    its weight alone would.
    """
    values = np.concatenate(
        [np.random.default_rng(2).normal(0.22, 1, 60), np.random.default_rng(3).normal(0, 1, 200)]
    )
    families = [
        Family(name, 60, 200, [higher("x", values, 60)]) for name in ("novelty", "surprise", "form and mix")
    ]
    found = judge(families, rate=0.05, resamples=999, seed=1)
    assert found.drift and found.moved == ["novelty"] and found.columns[0].p / found.columns[0].weight > 0.05
