"""Serve nodes whose rows differ: an adapter for each node, or one for each cluster of nodes that are alike.

A personal adapter is a mixture of the global one with one that the node trained on its own rows and never
sends (model interpolation, arXiv 2002.10619; APFL, arXiv 2003.13461). The node chooses the share of its own
by the loss on its own held-out rows. Both ends are among the choices, so that on those rows the mixture is no
worse than the node alone, and no worse than the global adapter.

Clusters join nodes by the direction of their updates (arXiv 1910.01991, 2004.11791). The coordinator has to
see single updates for this, so it does not go together with secure aggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ratchet.errors import UserError
from ratchet.federation.aggregation import (
    Adapter,
    Aggregate,
    LowRank,
    distances,
    layers_of,
    mean_of_weights,
    update_of,
)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a node's own adapter
# Kaufman and Rousseeuw, "Finding Groups in Data" (1990): a mean silhouette below this tells of no clusters.
LEAST_SILHOUETTE = 0.25


# --- one adapter for each node ---


class Choice(NamedTuple):
    """What a node took: the mixture, the share of its own adapter in it, and the loss on its own rows."""

    mixture: Aggregate
    share: float
    loss: float


def mix(common: Aggregate, own: Aggregate, share: float) -> Aggregate:
    """Return the aggregate whose updates are (1 - share) of the common ones and `share` of a node's own."""
    if share in (0.0, 1.0):
        return own if share else common
    mean = mean_of_weights([common.adapter, own.adapter], [1 - share, share])
    residual = {}
    for layer in layers_of(mean):
        wanted = _scaled(common, layer, 1 - share) + _scaled(own, layer, share)
        residual[layer] = (wanted + _scaled(Aggregate(mean, {}), layer, -1.0)).cut()[0]
    return Aggregate(mean, residual)


def _scaled(aggregate: Aggregate, layer: str, factor: float) -> LowRank:
    whole = update_of(aggregate.adapter, layer)
    if layer in aggregate.residual:
        whole = whole + aggregate.residual[layer]
    return LowRank(factor * whole.up, whole.down)


def choose_mixture(
    common: Aggregate,
    own: Aggregate,
    loss: Callable[[Aggregate], float],
    shares: Sequence[float] = SHARES,
) -> Choice:
    """Return the mixture with the least loss; of equal ones, the one with least of the node's own.

    `loss` measures an aggregate on rows of the node that none of both was trained on.
    """
    choices = []
    for share in sorted(shares):
        mixture = mix(common, own, share)
        choices.append(Choice(mixture, share, loss(mixture)))
    return min(choices, key=lambda choice: choice.loss)


# --- one adapter for each cluster ---


def cosine_distances(before: Adapter, adapters: Sequence[Adapter]) -> Tensor:
    """Return 1 - cosine of the angle between what nodes added to the updates of `before`, (nodes, nodes).

    A node that added nothing is at 1 from all others.
    """
    squares = distances([before, *adapters]).square()
    length = squares[0, 1:]
    inner = (length[:, None] + length[None] - squares[1:, 1:]) / 2
    norms = (length[:, None] * length[None]).sqrt()
    cosines = torch.where(norms > 0, inner / norms.clamp(min=1e-300), torch.zeros_like(inner))
    found = (1 - cosines).clamp(0, 2)
    found.fill_diagonal_(0)
    return found


def cluster_nodes(apart: Tensor, most: int, *, least_nodes: int = 1) -> list[int]:
    """Return the cluster of each node, numbered from 0 in the order of the nodes.

    Nodes are joined by the mean distance between clusters. Of 2 to `most` clusters those with the highest
    mean silhouette are taken; one for all where none has `least_nodes` in each cluster, or the silhouette
    tells of no clusters. Raises UserError: `most` or `least_nodes` is below 1.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    if most < 1 or least_nodes < 1:
        raise UserError(
            f"clusters: at most {most}, with {least_nodes} nodes at least; wanted 1 or more of both",
            remedy="one cluster at most is the same as none",
        )
    table = apart.numpy()
    best, found = LEAST_SILHOUETTE, [0] * len(table)
    for count in range(2, min(most, len(table) - 1) + 1):
        joined = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit(table)
        labels = joined.labels_.tolist()
        if min(labels.count(label) for label in set(labels)) < least_nodes:
            continue
        score = float(silhouette_score(table, labels, metric="precomputed"))
        if score > best:
            best, found = score, labels
    order = list(dict.fromkeys(found))
    return [order.index(label) for label in found]
