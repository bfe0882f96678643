"""The audit: it never refutes a mechanism that keeps its ε, and refutes one that leaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.canaries import make_audit_canaries
from ratchet.files import write_json
from ratchet.gate.privacy import judge_claim, judge_privacy
from ratchet.privacy.accountant import Mechanism, epsilon_of
from ratchet.privacy.audit import (
    FILE,
    SHARES,
    Claim,
    Guesses,
    add_guesses,
    bound_of,
    check_guesses,
    guess,
    lower_bound,
    p_value,
)
from ratchet.privacy.ledger import Promise

Scores = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]


def randomised_response(epsilon: float, canaries: int, random: np.random.Generator) -> tuple[Scores, Coins]:
    """The mechanism that leaks as much as ε allows: each coin is told, and truly so with e^ε / (1 + e^ε)."""
    planted = random.random(canaries) < 0.5
    told = planted ^ (random.random(canaries) > 1 / (1 + math.exp(-epsilon)))
    return told + 1e-3 * random.random(canaries), planted


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_a_known_epsilon_is_refuted_no_more_often_than_allowed(epsilon: float) -> None:
    random = np.random.default_rng(5)
    bounds = [
        lower_bound(*randomised_response(epsilon, 400, random), delta=0.0, alpha=0.05).epsilon
        for _ in range(50)
    ]
    assert sum(bound > epsilon for bound in bounds) <= 7  # of a Binomial(50, 0.05), 99 %
    assert float(np.median(bounds)) > 0.4 * epsilon, "the bound is of use"


def test_a_gaussian_mechanism_is_never_refuted() -> None:
    random = np.random.default_rng(6)
    epsilon = epsilon_of([Mechanism(1.0, 1.0, 1)], 1e-5)
    for _ in range(25):
        planted = random.random(500) < 0.5
        found = lower_bound(planted + random.normal(size=500), planted, delta=1e-5, alpha=0.05)
        assert 0 < found.epsilon < epsilon


def test_a_model_that_knows_its_canaries_is_refuted() -> None:
    planted = np.random.default_rng(7).random(300) < 0.5
    found = lower_bound(planted + 0.0, planted, delta=1e-5, alpha=0.05)
    assert found.epsilon > 2.5
    assert found.right == found.guesses


def test_the_bound_over_several_nodes_holds_as_over_one() -> None:
    """Each node guesses about its own canaries; only the counts are added up."""
    random = np.random.default_rng(9)
    bounds = []
    for _ in range(50):
        parts = [guess(*randomised_response(1.0, canaries, random)) for canaries in (60, 140, 200)]
        together = add_guesses(parts)
        assert together.canaries == 400
        bounds.append(bound_of(together, delta=0.0, alpha=0.05).epsilon)
    assert sum(bound > 1.0 for bound in bounds) <= 7  # of a Binomial(50, 0.05), 99 %
    assert float(np.median(bounds)) > 0.4


@pytest.mark.parametrize(
    ("made", "right", "told"),
    [
        ([2] * 4, [1] * 4, "wanted 5 each"),
        ([2] * 5, [3] * 5, "contradict"),
        ([12] * 5, [3] * 5, "contradict"),
        ([2] * 5, [-1] * 5, "contradict"),
    ],
)
def test_counts_that_cannot_be_are_refused(made: list[int], right: list[int], told: str) -> None:
    assert told in str(check_guesses(Guesses(10, made, right)))
    assert check_guesses(Guesses(10, [2] * 5, [1] * 5)) is None


def test_a_large_delta_weakens_the_bound() -> None:
    values = [p_value(200, 60, 55, 1.0, delta) for delta in (0.0, 1e-5, 1e-3)]
    assert values[0] < values[1] < values[2] <= 1.0
    assert p_value(200, 60, 0, 1.0, 1e-5) == 1.0


def test_coins_are_fair_and_always_the_same() -> None:
    found = make_audit_canaries(2000, "sha")
    assert found[:50] == make_audit_canaries(50, "sha")
    assert not set(found).intersection(make_audit_canaries(2000, "another champion's"))
    assert sum(planted for _, planted in found) == pytest.approx(1000, abs=80)
    assert len({canary.name + canary.secret for canary, _ in found}) == 2000


# --- the gate's rule ---

CONFIG = GateConfig()


def promise(**changes: float) -> Promise:
    values = {"epsilon": 1.0, "epsilon_together": 1.0, "moved": 0.5, **changes}
    return Promise(
        run_key="key",
        adapter_sha256="sha",
        mechanism=Mechanism(1.0, 0.1, 20),
        delta=1e-5,
        unit="row",
        units=900,
        batches=["may"],
        max_grad_norm=1.0,
        **values,
    )


def table(gain: float, canaries: int = 200) -> pd.DataFrame:
    """The candidate's loss is smaller by `gain` nats for planted canaries."""
    random, coins = np.random.default_rng(8), make_audit_canaries(canaries, "")
    planted = np.array([coin for _, coin in coins])
    names, losses = [canary.name for canary, _ in coins], 5 + random.normal(size=canaries)
    frames = [
        pd.DataFrame({"name": names, "planted": planted, "model": model, "nll": nll})
        for model, nll in (
            ("base", losses),
            ("candidate", losses + 0.1 * random.normal(size=canaries) - gain * planted),
        )
    ]
    return pd.concat(frames, ignore_index=True)


def test_a_claim_that_holds_passes_and_is_told() -> None:
    check = judge_privacy(promise(epsilon_together=1.8), table(0.0), 200, CONFIG)
    assert check.result == "pass"
    for part in ("ε = 1, δ = 1e-05 for each of 900 rows", "ε = 1.8 with earlier trainings", "200 canaries"):
        assert part in check.reason


def test_a_claim_that_its_canaries_refute_fails() -> None:
    check = judge_privacy(promise(), table(1.0), 200, CONFIG)
    assert check.result == "fail"
    assert "the claim is refuted" in check.reason
    assert judge_privacy(promise(epsilon=8.0), table(1.0), 200, CONFIG).result == "pass"


def test_weights_that_did_not_move_fail() -> None:
    check = judge_privacy(promise(moved=0.0), None, 0, CONFIG)
    assert check.result == "fail"
    assert judge_privacy(promise(), None, 0, CONFIG).reason.endswith("not audited")


def test_a_partial_audit_is_an_error() -> None:
    whole = table(0.0)
    for part in (whole.iloc[:-1], whole[whole.model == "candidate"], pd.concat([whole, whole.iloc[-1:]])):
        with pytest.raises(RatchetError, match="were measured"):
            judge_privacy(promise(), part, 200, CONFIG)
    with pytest.raises(RatchetError, match="not finite"):
        judge_privacy(promise(), whole.assign(nll=np.inf), 200, CONFIG)


# --- a federation ---


def judged(folder: Path, **values: Any) -> tuple[str, str]:
    claim = Claim(1.0, 1e-5, 900, **{"moved": 0.3, **values})
    write_json(folder / FILE, msgspec.to_builtins(claim))
    (check,) = judge_claim(folder / FILE, CONFIG)
    return check.result, check.reason


def test_a_federations_claim_passes_until_its_canaries_refute_it(tmp_path: Path) -> None:
    made = [2 * max(1, round(share * 120)) for share in SHARES]
    nodes = {"canaries": 40, "nodes": ["north", "south", "west"]}
    result, reason = judged(tmp_path, guesses=Guesses(120, made, [count // 2 for count in made]), **nodes)
    assert result == "pass"
    assert "ε = 1, δ = 1e-05 for each of 900 rows at the nodes" in reason
    assert "guesses about 120 canaries of 3 nodes are right" in reason
    result, reason = judged(tmp_path, guesses=Guesses(120, made, made), left_out={"east": "away"}, **nodes)
    assert result == "fail" and "the claim is refuted; without east" in reason


def test_a_federations_claim_needs_the_audit_that_was_asked_for_and_weights_that_moved(
    tmp_path: Path,
) -> None:
    assert judged(tmp_path)[0] == "pass" and "not audited" in judged(tmp_path)[1]
    assert judged(tmp_path, canaries=40, left_out={"north": "away"})[0] == "fail"
    assert judged(tmp_path, moved=0.0)[0] == "fail"
    assert judge_claim(tmp_path / "none.json", CONFIG) == []
