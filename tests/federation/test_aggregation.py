"""The aggregate of nodes' adapters is the mean of their updates, whatever their number and weights."""

from __future__ import annotations

import drawn
import pytest
import torch
from drawn import RANK, draw, update
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.errors import UserError
from ratchet.federation.aggregation import (
    DOWN,
    UP,
    Adapter,
    LowRank,
    distances,
    fold,
    krum,
    layers_of,
    mean_exactly,
    mean_of_weights,
    trimmed_mean,
    update_of,
)

SHAPES = {**drawn.SHAPES, "down": (32, 64)}


def node(seed: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    return draw(seed, spread, SHAPES)


def mean_update(nodes: list[Adapter], weights: list[float], layer: str) -> torch.Tensor:
    """The mean as it is defined: over whole matrices."""
    parts = [
        weight / sum(weights) * (each[layer + UP].double() @ each[layer + DOWN].double())
        for each, weight in zip(nodes, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(st.integers(0, 5000), min_size=2, max_size=8).filter(any), seed=st.integers(0, 99))
def test_the_update_is_the_weighted_mean_of_all_updates(weights: list[int], seed: int) -> None:
    nodes: list[Adapter] = [node(100 * seed + number) for number in range(len(weights))]
    found = mean_exactly(nodes, weights)
    for layer in SHAPES:
        wanted = mean_update(nodes, list(map(float, weights)), layer)
        assert (update(found, layer) - wanted).abs().max() < 1e-6 * wanted.abs().max()
    other = mean_of_weights(nodes, weights)["norm.weight"]
    assert torch.equal(found.adapter["norm.weight"], other)


def test_the_mean_of_factors_alone_is_another_update() -> None:
    nodes = [node(1), node(2), node(3)]
    apart = mean_of_weights(nodes, [1, 1, 1])
    wanted = mean_update(nodes, [1, 1, 1], "q")
    away = (update_of(apart, "q").dense() - wanted).norm() / wanted.norm()
    assert away > 0.5


def test_one_node_gives_its_own_bytes() -> None:
    only = node(5)
    found = mean_exactly([only], [17])
    assert found.residual == {}
    assert all(torch.equal(found.adapter[name], weight) for name, weight in only.items())


@pytest.mark.parametrize("weights", [[1, 1], [3, 1000, 7]])
def test_equal_nodes_give_what_one_of_them_gives(weights: list[float]) -> None:
    found = mean_exactly([node(5)] * len(weights), weights)
    assert found.residual == {}
    assert all(torch.equal(found.adapter[name], weight) for name, weight in node(5).items())


def test_nodes_with_a_common_factor_need_no_residual() -> None:
    nodes = [node(1), node(2)]
    for layer in SHAPES:
        nodes[1][layer + DOWN] = nodes[0][layer + DOWN]
    found = mean_exactly(nodes, [2, 1])
    assert found.residual == {}
    for layer in SHAPES:
        wanted = mean_update(list(nodes), [2, 1], layer)
        assert (update(found, layer) - wanted).abs().max() < 1e-5


def test_a_node_without_weight_changes_nothing() -> None:
    found, alone = mean_exactly([node(1), node(2)], [4, 0]), node(1)
    for layer in SHAPES:
        assert torch.allclose(update(found, layer), update_of(alone, layer).dense(), atol=1e-6)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_have_no_mean_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights are"):
        mean_exactly([node(1)] * len(weights), weights)


# --- one adapter again ---


def test_folding_keeps_the_update_and_tells_its_rank() -> None:
    nodes = [node(1), node(2), node(3)]
    found = mean_exactly(nodes, [1, 2, 3])
    folded = fold(found, 64)
    assert (folded.rank, folded.missing) == (3 * RANK, pytest.approx(0, abs=1e-9))
    for layer in SHAPES:
        assert folded.adapter[layer + DOWN].shape[0] == folded.rank
        assert folded.adapter[layer + DOWN].dtype == torch.float32
        away = update_of(folded.adapter, layer).dense() - update(found, layer)
        assert away.abs().max() < 1e-5


def test_a_rank_too_low_loses_the_smallest_part_and_says_how_much() -> None:
    found = mean_exactly([node(1), node(2), node(3)], [1, 1, 1])
    folded = fold(found, 5)
    assert folded.rank == 5
    shares = []
    for layer in SHAPES:
        whole = update(found, layer)
        values = torch.linalg.svdvals(whole)
        shares.append(float(values[5:].norm() / whole.norm()))
        away = (update_of(folded.adapter, layer).dense() - whole).norm() / whole.norm()
        assert float(away) == pytest.approx(shares[-1], rel=1e-4)
    assert folded.missing == pytest.approx(max(shares), rel=1e-6)


def test_an_aggregate_without_residual_is_its_own_adapter() -> None:
    found = fold(mean_exactly([node(1)], [1]), 64)
    assert (found.rank, found.missing) == (RANK, 0.0)
    assert all(torch.equal(found.adapter[name], weight) for name, weight in node(1).items())


def test_the_number_of_threads_changes_no_bit() -> None:
    """A coordinator may go on with another one."""
    chance = torch.Generator().manual_seed(7)
    wide = LowRank(*(torch.randn(*shape, generator=chance).double() for shape in ((88, 32), (32, 88))))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(wide.cut()[0])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert torch.equal(found[0].up, found[1].up) and torch.equal(found[0].down, found[1].down)


def test_a_matrix_of_zeros_can_be_cut() -> None:
    nothing, lost = LowRank(torch.zeros(6, 3).double(), torch.zeros(3, 5).double()).cut()
    assert (nothing.rank, lost) == (1, 0.0)
    assert not nothing.dense().any()


# --- poison ---


def attack(honest: list[dict[str, torch.Tensor]], kind: str) -> dict[str, torch.Tensor]:
    factor = {"scaled": 100.0, "flipped": -3.0}[kind]
    return {name: weight * factor for name, weight in honest[0].items()}


def near(seed: int) -> dict[str, torch.Tensor]:
    """A node that learned nearly what others did."""
    away = node(seed, 0.05)
    return {name: weight + away[name] for name, weight in node(7).items()}


@pytest.mark.parametrize("kind", ["scaled", "flipped"])
def test_one_poisoned_node_of_five_does_little_harm(kind: str) -> None:
    honest = [near(seed) for seed in range(1, 5)]
    nodes = [*honest[:2], attack(honest, kind), *honest[2:]]
    wanted = mean_of_weights(honest, [1] * 4)

    def harm(found: Adapter) -> float:
        wholes = {layer: update_of(wanted, layer).dense() for layer in layers_of(wanted)}
        return max(
            float((update_of(found, layer).dense() - whole).norm() / whole.norm())
            for layer, whole in wholes.items()
        )

    assert harm(mean_of_weights(nodes, [1] * 5)) > 0.7
    assert harm(trimmed_mean(nodes, 1)) < 0.1
    chosen = krum(nodes, 1)
    assert chosen != 2
    assert harm(nodes[chosen]) < 0.2


def test_distances_are_those_of_whole_matrices() -> None:
    nodes = [node(1), node(2), node(3)]
    found = distances(nodes)
    for one in range(3):
        for other in range(3):
            squares = [
                float((update_of(nodes[one], layer).dense() - update_of(nodes[other], layer).dense()).norm())
                ** 2
                for layer in SHAPES
            ]
            assert float(found[one, other]) == pytest.approx(sum(squares) ** 0.5, abs=1e-5)


def test_too_few_nodes_for_protection_are_refused() -> None:
    with pytest.raises(UserError, match="needs 5 nodes, and 4"):
        krum([node(seed) for seed in range(4)], 1)
    with pytest.raises(UserError, match="none left"):
        trimmed_mean([node(seed) for seed in range(4)], 2)
