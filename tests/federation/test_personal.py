"""Nodes that differ: mixtures that are no worse than their parts, and clusters of nodes that are alike."""

from __future__ import annotations

import pytest
import torch
from drawn import RANK, SHAPES, draw, update

from ratchet.errors import UserError
from ratchet.federation.aggregation import DOWN, Aggregate, mean_exactly, update_of
from ratchet.federation.personal import SHARES, choose_mixture, cluster_nodes, cosine_distances, mix


def node(seed: int, spread: float = 1.0) -> dict[str, torch.Tensor]:
    return draw(seed, spread, norm=False)


def common() -> Aggregate:
    return mean_exactly([node(1), node(2), node(3)], [1, 2, 3])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_mixture_has_its_shares_of_both_updates(share: float) -> None:
    shared, own = common(), Aggregate(node(9), {})
    found = mix(shared, own, share)
    for layer in SHAPES:
        wanted = (1 - share) * update(shared, layer) + share * update(own, layer)
        assert (update(found, layer) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert found.adapter[layer + DOWN].shape == (RANK, SHAPES[layer][1])


@pytest.mark.parametrize("best", [0.0, 0.2, 0.45, 1.0])
def test_a_node_takes_the_share_of_the_least_loss(best: float) -> None:
    shared, own = common(), Aggregate(node(9), {})
    target = (1 - best) * update(shared, "q") + best * update(own, "q")

    def loss(found: Aggregate) -> float:
        return float((update(found, "q") - target).norm())

    choice = choose_mixture(shared, own, loss)
    assert choice.share == min(SHARES, key=lambda share: abs(share - best))
    assert choice.loss == loss(choice.mixture) <= min(loss(shared), loss(own))


def test_of_equal_losses_the_common_adapter_is_taken() -> None:
    choice = choose_mixture(common(), Aggregate(node(9), {}), lambda found: 1.0)
    assert (choice.share, choice.loss) == (0.0, 1.0)


# --- clusters ---


def towards(direction: int, seed: int, spread: float = 0.2) -> dict[str, torch.Tensor]:
    away, noise = node(direction), node(1000 + seed, spread)
    return {name: node(0)[name] + 0.1 * (away[name] + noise[name]) for name in away}


def test_cosine_distances_are_those_of_whole_differences() -> None:
    nodes = [towards(1, 1), towards(2, 2), node(0)]
    found = cosine_distances(node(0), nodes)
    rows = [
        torch.cat(
            [
                (update_of(each, layer).dense() - update_of(node(0), layer).dense()).flatten()
                for layer in SHAPES
            ]
        )
        for each in nodes
    ]
    wanted = 1 - torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    assert float(found[0, 1]) == pytest.approx(float(wanted), abs=1e-6)
    assert torch.equal(found, found.T)
    assert found.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert found[2, :2].tolist() == [1.0, 1.0]  # it learned nothing


@pytest.mark.parametrize("groups", [[0, 0, 1, 0, 1, 1], [0, 1, 2, 2, 1, 0]])
def test_nodes_that_learn_alike_share_a_cluster(groups: list[int]) -> None:
    nodes = [towards(50 + group, seed) for seed, group in enumerate(groups)]
    assert cluster_nodes(cosine_distances(node(0), nodes), 4) == groups


def test_nodes_without_clusters_stay_together() -> None:
    nodes = [towards(seed, seed) for seed in range(50, 56)]  # every one in its own direction
    assert cluster_nodes(cosine_distances(node(0), nodes), 4) == [0] * 6


def test_a_cluster_has_as_many_nodes_as_asked_for() -> None:
    nodes = [towards(51 if seed == 3 else 50, seed) for seed in range(6)]
    apart = cosine_distances(node(0), nodes)
    assert cluster_nodes(apart, 2) == [0, 0, 0, 1, 0, 0]
    assert cluster_nodes(apart, 2, least_nodes=2) == [0] * 6


@pytest.mark.parametrize("count", [1, 2])
def test_few_nodes_are_one_cluster(count: int) -> None:
    apart = cosine_distances(node(0), [towards(seed, seed) for seed in range(count)])
    assert cluster_nodes(apart, 4) == [0] * count


def test_no_clusters_at_all_are_refused() -> None:
    with pytest.raises(UserError, match="at most 0"):
        cluster_nodes(torch.zeros(2, 2), 0)
