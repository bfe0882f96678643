"""Accounting: Opacus's figures against closed forms, integrals and composition, and the ledger's budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scipy import optimize, stats

from ratchet.config.training import PrivacyConfig
from ratchet.errors import ConfigError, DataError, RatchetError
from ratchet.privacy.accountant import Mechanism, epsilon_of, noise_for
from ratchet.privacy.ledger import (
    Spending,
    add_spending,
    check_budget,
    read_spendings,
    spent_by_batch,
)

DELTA = 1e-5
ONE = Mechanism(1.2, 0.05, 100)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact δ of the Gaussian mechanism (Balle and Wang 2018, theorem 8); k steps have mu = √k / σ."""
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    )


def sampled_delta(epsilon: float, noise: float, rate: float) -> float:
    """The δ of one step, integrated: neighbours draw from N(0, σ²) and from (1 - q) N(0, σ²) + q N(1, σ²)."""
    grid = np.linspace(-12 * noise, 1 + 12 * noise, 400_001)
    without = stats.norm.pdf(grid, 0, noise)
    with_row = (1 - rate) * without + rate * stats.norm.pdf(grid, 1, noise)
    ways = ((with_row, without), (without, with_row))
    step = grid[1] - grid[0]
    return max(float(np.clip(a - math.exp(epsilon) * b, 0, None).sum() * step) for a, b in ways)


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 1), (5.0, 50), (20.0, 300)])
def test_whole_batches_spend_what_the_gaussian_mechanism_does(noise: float, steps: int) -> None:
    exact = optimize.brentq(lambda e: gaussian_delta(e, math.sqrt(steps) / noise) - DELTA, 1e-3, 50)
    found = epsilon_of([Mechanism(noise, 1.0, steps)], DELTA)
    assert exact <= found <= 1.2 * exact + 0.05


@pytest.mark.parametrize(("noise", "rate"), [(0.8, 0.1), (1.0, 0.5)])
def test_one_step_spends_what_the_integral_says(noise: float, rate: float) -> None:
    exact = optimize.brentq(lambda e: sampled_delta(e, noise, rate) - DELTA, 1e-4, 50)
    assert exact <= epsilon_of([Mechanism(noise, rate, 1)], DELTA) <= exact + 0.05


def test_trainings_together_spend_less_than_their_sum_and_more_than_one() -> None:
    other = Mechanism(1.5, 0.1, 60)
    one, two = epsilon_of([ONE], DELTA), epsilon_of([other], DELTA)
    together = epsilon_of([ONE, other], DELTA)
    assert max(one, two) < together < one + two
    assert epsilon_of([ONE, ONE], DELTA) == pytest.approx(
        epsilon_of([Mechanism(1.2, 0.05, 200)], DELTA), abs=0.02
    )
    assert epsilon_of([], DELTA) == 0.0


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(0.5, 0.05, 60), (3.0, 0.05, 60), (0.5, 1.0, 10), (8.0, 1.0, 10)]
)
def test_the_noise_is_the_least_that_keeps_the_promise(epsilon: float, rate: float, steps: int) -> None:
    found = noise_for(epsilon, DELTA, rate, steps)
    assert epsilon_of([found], DELTA) <= epsilon
    assert epsilon_of([Mechanism(found.noise_multiplier * 0.97, rate, steps)], DELTA) > epsilon * 0.99
    assert len(f"{found.noise_multiplier:.10g}".replace(".", "").lstrip("0")) <= 4


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise gives ε"):
        noise_for(1e-5, 1e-9, 1.0, 1000)


# --- the ledger ---


def spending(number: int, batches: list[str], mechanism: Mechanism = ONE) -> Spending:
    return Spending(f"key{number}", f"sha{number}", mechanism, 1.7, DELTA, "row", 500, batches)


def test_the_ledger_adds_up_by_batch(tmp_path: Path) -> None:
    path = tmp_path / "reports/privacy.json"
    assert read_spendings(path) == []
    assert add_spending(path, spending(1, ["may"]))
    assert add_spending(path, spending(2, ["may", "june"]))
    assert not add_spending(path, spending(2, ["may", "june"])), "the same weights count once"
    found = {line.batch: line for line in spent_by_batch(read_spendings(path), DELTA, ["july"])}
    assert {batch: line.trainings for batch, line in found.items()} == {"july": 0, "june": 1, "may": 2}
    assert found["may"].epsilon == epsilon_of([ONE, ONE], DELTA)
    assert found["june"].epsilon == epsilon_of([ONE], DELTA) > found["july"].epsilon == 0


def test_a_user_may_have_rows_in_every_batch() -> None:
    privacy = PrivacyConfig(epsilon=2.5, delta=DELTA, unit="user", budget=4.0)
    users = msgspec.structs.replace(spending(1, ["may"]), unit="user")
    assert check_budget([users], ONE, ["june"], privacy) == epsilon_of([ONE, ONE], DELTA)
    assert [line.trainings for line in spent_by_batch([users], DELTA, ["june"], unit="user")] == [1, 1]
    with pytest.raises(DataError, match="1 earlier trainings protected single rows"):
        check_budget([users, spending(2, ["may"])], ONE, ["june"], privacy)


def test_a_broken_ledger_is_an_error_and_not_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    path.write_text('{"trainings": [{"run_key": 3}]}')
    with pytest.raises(RatchetError, match="is no ledger of ε"):
        read_spendings(path)


@pytest.mark.parametrize(
    ("batches", "settings", "refused"),
    [
        (["june"], {}, ""),
        (["may", "june"], {}, r"of may: 1 trainings.*train\.privacy\.epsilon` is 2\.5"),
        (["may", "june"], {"budget": 4.0}, ""),
        (["may"], {"budget": 3.0}, r"together 3\.\d+ with δ = 1e-05; `train\.privacy\.budget` is 3"),
    ],
)
def test_only_rows_with_budget_left_are_trained_on(
    batches: list[str], settings: dict[str, Any], refused: str
) -> None:
    privacy = PrivacyConfig(epsilon=2.5, delta=DELTA, **settings)
    past = [spending(1, ["may"])]
    if refused:
        with pytest.raises(DataError, match=refused):
            check_budget(past, ONE, batches, privacy)
    else:
        most = check_budget(past, ONE, batches, privacy)
        assert most == epsilon_of([ONE] * (1 + ("may" in batches)), DELTA)
