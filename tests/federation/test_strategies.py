"""Strategies: what a round's adapters become, with any number of nodes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drawn import SHAPES, draw, update
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ratchet.errors import ConfigError, DataError, UserError
from ratchet.federation.aggregation import DOWN, UP, Adapter, layers_of, update_of
from ratchet.federation.strategies import FedAdam, FedAvg, Krum, Strategy, TrimmedMean, make_strategy


def near(seed: int, spread: float = 0.05) -> dict[str, torch.Tensor]:
    away = draw(seed, spread)
    return {name: weight + away[name] for name, weight in draw(0).items()}


def equal(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


ALL: list[Strategy] = [FedAvg(), FedAvg(exact=False), FedAdam(), TrimmedMean(1), Krum(1), Krum(1, 4)]


@settings(deadline=None, max_examples=20)
@given(weights=st.lists(st.integers(1, 5000), min_size=2, max_size=8), seed=st.integers(0, 99))
def test_the_exact_mean_is_that_of_whole_updates(weights: list[int], seed: int) -> None:
    nodes = [near(100 * seed + number) for number in range(len(weights))]
    found = FedAvg().combine(draw(0), nodes, weights, {})
    assert found.state == {}
    for layer in SHAPES:
        wanted = sum(
            weight / sum(weights) * update_of(each, layer).dense()
            for weight, each in zip(weights, nodes, strict=True)
        )
        assert isinstance(wanted, torch.Tensor)
        assert (update(found.aggregate, layer) - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_factors_averaged_apart_give_another_update() -> None:
    nodes = [draw(1), draw(2), draw(3)]
    apart = FedAvg(exact=False).combine(draw(0), nodes, [1, 1, 1], {}).aggregate
    exact = FedAvg().combine(draw(0), nodes, [1, 1, 1], {}).aggregate
    assert apart.residual == {}
    assert equal(apart.adapter, exact.adapter)  # what is missing is in the residual alone
    assert (update(apart, "q") - update(exact, "q")).norm() > 0.5 * update(exact, "q").norm()


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvg(exact=False)])
def test_one_node_gives_its_own_bytes(strategy: Strategy) -> None:
    found = strategy.combine(draw(0), [draw(5)], [17], {}).aggregate
    assert found.residual == {} and equal(found.adapter, draw(5))


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvg(exact=False), TrimmedMean(1), Krum(1), Krum(1, 3)])
def test_equal_nodes_give_what_one_of_them_has(strategy: Strategy) -> None:
    found = strategy.combine(draw(0), [draw(5)] * 5, [3, 1000, 7, 1, 1], {}).aggregate
    assert found.residual == {}
    assert all(torch.allclose(found.adapter[name], weight, atol=1e-6) for name, weight in draw(5).items())


@pytest.mark.parametrize("strategy", ALL)
def test_the_order_of_the_nodes_changes_nothing(strategy: Strategy) -> None:
    nodes, weights = [near(seed) for seed in range(1, 6)], [1.0, 20.0, 3.0, 4.0, 5.0]
    one = strategy.combine(draw(0), nodes, weights, {}).aggregate
    other = strategy.combine(draw(0), nodes[::-1], weights[::-1], {}).aggregate
    for layer in SHAPES:
        assert torch.allclose(update(one, layer), update(other, layer), atol=1e-5)


# --- FedAdam ---


def test_fedadam_takes_the_steps_of_the_paper() -> None:
    """Two rounds by hand: algorithm 2 of arXiv 2003.00295."""
    strategy = FedAdam(learning_rate=0.1, beta_1=0.9, beta_2=0.99, tau=0.01)
    place = torch.zeros(1, dtype=torch.float64)
    first, second = 0.0, 0.01**2
    before, state = {"w": place.float()}, {}
    for moves in ([0.2, 0.4], [-0.1, 0.5]):
        mean = 0.25 * moves[0] + 0.75 * moves[1]
        first, second = 0.9 * first + 0.1 * mean, 0.99 * second + 0.01 * mean**2
        place = place + 0.1 * first / (second**0.5 + 0.01)
        nodes = [{"w": before["w"] + move} for move in moves]
        found = strategy.combine(before, nodes, [1, 3], state)
        before, state = found.aggregate.adapter, found.state
        assert float(before["w"]) == pytest.approx(float(place), rel=1e-5)


def test_the_state_of_fedadam_survives_a_file(tmp_path: Path) -> None:
    nodes, weights = [near(seed) for seed in (1, 2, 3)], [1.0, 2.0, 3.0]
    one = FedAdam().combine(draw(0), nodes, weights, {})
    save_file(one.state, tmp_path / "state.safetensors")
    again = FedAdam().combine(
        one.aggregate.adapter, nodes, weights, load_file(tmp_path / "state.safetensors")
    )
    kept = FedAdam().combine(one.aggregate.adapter, nodes, weights, one.state)
    assert equal(again.aggregate.adapter, kept.aggregate.adapter) and equal(again.state, kept.state)
    anew = FedAdam().combine(one.aggregate.adapter, nodes, weights, {})
    assert not equal(anew.aggregate.adapter, kept.aggregate.adapter)


def test_nodes_that_learned_nothing_leave_fedadam_where_it_was() -> None:
    found = FedAdam().combine(draw(0), [draw(0), draw(0)], [1, 2], {})
    assert equal(found.aggregate.adapter, draw(0))


def test_a_state_of_another_adapter_is_refused() -> None:
    state = FedAdam().combine(draw(0), [draw(1)], [1], {}).state
    wider = {name: torch.cat([weight, weight]) for name, weight in draw(0).items()}
    with pytest.raises(DataError, match="state holds"):
        FedAdam().combine(wider, [wider], [1], state)


# --- poison ---


@pytest.mark.parametrize("factor", [10.0, -1.0, -100.0])
def test_robust_strategies_bear_one_poisoned_node_of_five(factor: float) -> None:
    honest = [near(seed) for seed in range(1, 5)]
    poison = {name: weight * (factor if name.endswith(UP) else 1) for name, weight in near(9).items()}
    nodes = [*honest[:2], poison, *honest[2:]]
    wanted = FedAvg().combine(draw(0), honest, [1] * 4, {}).aggregate

    def harm(strategy: Strategy) -> float:
        found = strategy.combine(draw(0), nodes, [1, 1, 1000, 1, 1], {}).aggregate
        return max(
            float((update(found, layer) - update(wanted, layer)).norm() / update(wanted, layer).norm())
            for layer in layers_of(wanted.adapter)
        )

    assert harm(FedAvg()) > 0.9
    assert harm(TrimmedMean(1)) < 0.1
    assert harm(Krum(1)) < 0.2
    assert harm(Krum(1, kept=4)) < 1e-6  # the honest ones, and no other
    assert harm(Krum(1, kept=None)) < 1e-6


# --- what is refused ---


@pytest.mark.parametrize("strategy", ALL)
def test_too_few_nodes_are_refused(strategy: Strategy) -> None:
    few = strategy.least_nodes - 1
    with pytest.raises(UserError, match=f"{few} nodes took part, .* at least {strategy.least_nodes} nodes"):
        strategy.combine(draw(0), [draw(1)] * few, [1] * few, {})
    strategy.combine(draw(0), [draw(1)] * (few + 1), [1] * (few + 1), {})


@pytest.mark.parametrize("strategy", ALL)
def test_an_adapter_unlike_the_one_before_is_refused_with_its_draw(strategy: Strategy) -> None:
    good = [near(seed) for seed in range(1, 5)]
    broken = {
        "lacks q.lora_A.weight": {name: weight for name, weight in near(5).items() if name != "q" + DOWN},
        "has besides more": near(5) | {"more": torch.ones(1)},
        r"q.lora_A.weight of node 2 of 5 holds \[8, 32\], wanted \[4, 32\]": near(5)
        | {"q" + DOWN: torch.ones(8, 32)},
        "norm.weight of node 2 of 5 holds values that are not finite": near(5)
        | {"norm.weight": torch.full((8,), torch.nan)},
    }
    for said, adapter in broken.items():
        with pytest.raises(DataError, match=said):
            strategy.combine(draw(0), [*good[:2], adapter, *good[2:]], [1] * 5, {})


def test_a_strategy_has_a_name() -> None:
    assert make_strategy("fedavg", exact=False) == FedAvg(exact=False)
    assert make_strategy("krum", poisoned=2).least_nodes == 7
    assert make_strategy("krum") == Krum(1, None)
    assert make_strategy("krum", kept=6) == Krum(1, 6) and Krum(1, 6).least_nodes == 7
    assert make_strategy("trimmed_mean", poisoned=2).least_nodes == 5
    assert isinstance(make_strategy("fedadam"), FedAdam)
    with pytest.raises(ConfigError, match="unknown"):
        make_strategy("best")  # type: ignore[arg-type]
