"""The joint estimate of parts, by simulation: what it promises, and what it tells more than a part alone."""

from __future__ import annotations

import numpy as np
import pytest

from ratchet.evaluation.statistics import Values
from ratchet.gate.parts import Part, Sums, estimate_parts, posterior, sums_of

MARGIN = 0.05


def draw(
    generator: np.random.Generator, effects: list[float], rows: int = 200, *, shown: float = 1.0
) -> list[Part]:
    """Draw parts of two models that differ in 20 % of the rows, as twins do; a gain is -1, 0 or 1.

    The likelihood correlates with a gain by a half, and its mean moves by a quarter of the effect, times
    `shown`: about 1 between twins, 2 and more where a domain was spoilt (benchmarks/gate_models.py).
    """
    parts = []
    for effect in effects:
        gains = generator.choice([1.0, -1.0, 0.0], rows, p=[0.1 + effect / 2, 0.1 - effect / 2, 0.8])
        noise = generator.normal(0, 0.08, rows)
        parts.append(Part(gains, 0.1 * (gains - effect) + 0.25 * shown * effect + noise * 0.87))
    return parts


def worst(parts: list[Part]) -> float:
    """Return the largest probability that a part lost more than the margin."""
    return float(posterior(sums_of(parts), MARGIN).below(-MARGIN).max())


def alone(parts: list[Part], quantile: float = 1.645) -> bool:
    return all(
        part.gains.mean() - quantile * part.gains.std() / np.sqrt(len(part.gains)) >= -MARGIN
        for part in parts
    )


def test_one_part_alone_has_the_bounds_of_its_own_rows():
    (part,) = draw(np.random.default_rng(0), [0.02], 2000)
    found = estimate_parts({"one": Part(part.gains, np.zeros(2000))}, MARGIN, 0.05)["one"]
    error = part.gains.std() / np.sqrt(2000)
    assert found.mean == pytest.approx(part.gains.mean(), abs=1e-9)
    assert (found.low, found.high) == pytest.approx(
        (found.mean - 1.645 * error, found.mean + 1.645 * error), abs=0.02 * error
    )


def test_the_same_model_has_gained_and_lost_nothing():
    found = estimate_parts({name: Part(np.zeros(60), np.zeros(60)) for name in "abc"}, MARGIN, 0.1)
    assert all(abs(bound) < 1e-6 for interval in found.values() for bound in interval)


def test_bounds_hold_as_often_as_they_say_where_parts_differ_as_the_prior_says():
    generator, low, high, rounds = np.random.default_rng(1), 0, 0, 600
    for _ in range(rounds):
        error, tau = np.array([0.03, 0.02, 0.04, 0.03]), abs(generator.normal(0, MARGIN))
        true = generator.normal(0.01, tau, 4)
        sums = Sums(np.zeros(4), np.zeros(4), true + error * generator.normal(size=4), error)
        found = posterior(sums, MARGIN)
        low += int((found.quantile(0.1) > true).sum())
        high += int((found.quantile(0.9) < true).sum())
    # 240 of 2,400 are expected on each side; parts of a round depend on each other
    assert low == pytest.approx(240, abs=60) and high == pytest.approx(240, abs=60)


def test_a_domain_that_lost_5_points_is_kept_out_where_the_likelihood_shows_it():
    generator = np.random.default_rng(2)
    passed = sum(
        worst(draw(generator, [-0.05, 0.02, 0.02, 0.02, 0.02], shown=2.0)) <= 0.1 for _ in range(400)
    )
    assert passed <= 20  # 5 %


def test_a_loss_that_only_the_answers_show_is_believed_more_slowly():
    """What it costs to trust the likelihood, written down so that a change of the estimate shows it."""
    generator = np.random.default_rng(3)
    passed = sum(
        worst(draw(generator, [-0.05, 0.02, 0.02, 0.02, 0.02], shown=0.0)) <= 0.1 for _ in range(400)
    )
    assert 40 < passed < 160


def test_five_parts_of_a_better_model_pass_where_each_alone_seldom_does():
    generator = np.random.default_rng(4)
    drawn = [draw(generator, [0.02] * 5) for _ in range(300)]
    together, apart = (sum(map(rule, drawn)) for rule in (lambda parts: worst(parts) <= 0.1, alone))
    assert together > 200 > 100 > apart


def test_a_clear_loss_fails_and_does_not_drag_the_others_along():
    generator = np.random.default_rng(5)
    parts = dict(zip("abcd", draw(generator, [-0.2, 0.0, 0.0, 0.0], 400), strict=True))
    found = estimate_parts(parts, MARGIN, 0.1)
    assert found["a"].high < -MARGIN
    assert all(found[name].low > -MARGIN for name in "bcd")


def test_a_likelihood_that_says_nothing_changes_nothing():
    generator = np.random.default_rng(6)
    parts = [Part(part.gains, np.zeros(len(part.gains))) for part in draw(generator, [0.0, 0.03])]
    opposite = [
        Part(part.gains, -part.gains) for part in parts
    ]  # it falls where the gain rises: no predictor
    for found in (sums_of(parts), sums_of(opposite)):
        assert np.allclose(found.told, 0) and np.allclose(found.rest, [part.gains.mean() for part in parts])


@pytest.mark.parametrize("values", [np.array([]), np.array([0.0, np.nan])])
def test_values_that_cannot_be_averaged_are_refused(values: Values):
    whole = Part(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="part b has no rows, or values that are not finite"):
        estimate_parts({"a": whole, "b": Part(values, np.zeros(len(values)))}, MARGIN, 0.1)
