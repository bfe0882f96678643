"""Aggregate the adapters of nodes, so that the new global update is the weighted mean of theirs.

A layer of LoRA adds B·A, times a scale, to its weight. The mean of the A times the mean of the B is not the
mean of the products, so averaging them apart, as is usual, trains another model than the nodes' mean
(FedEx-LoRA, arXiv 2410.09432). Here both means become the new adapter, and what they miss of the mean product
is kept beside them as a residual of low rank. All is computed in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ratchet.errors import UserError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
ZERO = 1e-12  # singular values below this share of the largest one are rounding

Adapter = Mapping[str, Tensor]  # weights by the names that PEFT saves them under


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: the last bits of a decomposition depend on how many there are.

    A coordinator that goes on with another `OMP_NUM_THREADS` is to end in the same bytes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LowRank(NamedTuple):
    """A matrix as up·down: `up` is (out, rank), `down` is (rank, in), both float64."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        return self.up @ self.down

    @one_thread()
    def cut(self, rank: int | None = None) -> tuple[LowRank, float]:
        """Return the nearest matrix of at most `rank`, and the Frobenius norm of what is missing.

        The nearest one comes from the largest singular values (Eckart and Young, 1936). None: as many as are
        not rounding.
        """
        q_up, r_up = torch.linalg.qr(self.up)
        q_down, r_down = torch.linalg.qr(self.down.T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T)
        kept = int((values > ZERO * values.max().clamp(min=1e-300)).sum())
        kept = max(1, kept if rank is None else min(rank, kept))
        roots = values[:kept].sqrt()
        nearest = LowRank(q_up @ left[:, :kept] * roots, (roots[:, None] * right[:kept]) @ q_down.T)
        return nearest, float(values[kept:].norm())

    def __add__(self, other: object) -> LowRank:
        assert isinstance(other, LowRank)
        return LowRank(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down]))


class Aggregate(NamedTuple):
    """A global adapter, and the part of the mean update that its factors miss, by layer.

    The update of a layer is scale · (B·A + residual). Layers whose factors miss nothing have no residual.
    """

    adapter: dict[str, Tensor]
    residual: dict[str, LowRank]


def layers_of(adapter: Adapter) -> list[str]:
    """Return the names of the layers that have an update of a rank, sorted."""
    return sorted(name.removesuffix(DOWN) for name in adapter if name.endswith(DOWN))


def update_of(adapter: Adapter, layer: str) -> LowRank:
    """Return the update B·A of a layer, without its scale."""
    return LowRank(adapter[layer + UP].double(), adapter[layer + DOWN].double())


def normalised(weights: Sequence[float]) -> list[float]:
    """Return weights that sum up to 1. Raises UserError: one is negative or not finite, or none is over 0."""
    total = sum(weights)
    if not weights or not 0 < total < float("inf") or min(weights) < 0:
        raise UserError(
            f"the nodes' weights are {list(weights)}; wanted numbers of at least 0, one of them more",
            remedy="a node's weight is its number of training rows: leave out nodes without any",
        )
    return [weight / total for weight in weights]


def mean_exactly(adapters: Sequence[Adapter], weights: Sequence[float]) -> Aggregate:
    """Return the aggregate whose update is the weighted mean of the adapters' updates, in every layer.

    Weights that are no factors of an update (biases, embeddings, modules trained whole) are averaged.
    """
    shares = normalised(weights)
    mean = mean_of_weights(adapters, weights)
    residual = {}
    for layer in layers_of(adapters[0]):
        ups, downs = ([each[layer + part].double() for each in adapters] for part in (UP, DOWN))
        if _all_equal(ups) or _all_equal(downs):
            continue  # one factor is common, so the mean of the other one misses nothing
        average = update_of(mean, layer)
        residual[layer] = LowRank(
            torch.cat([*(share * up for share, up in zip(shares, ups, strict=True)), -average.up], 1),
            torch.cat([*downs, average.down]),
        ).cut()[0]
    return Aggregate(mean, residual)


def mean_of_weights(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return the weighted mean of each tensor by itself: what FedAvg does (arXiv 1602.05629).

    Tensors that are equal in all adapters stay as they are, to the bit.
    """
    shares = normalised(weights)
    return {
        name: _mean([adapter[name] for adapter in adapters], shares).to(first.dtype)
        for name, first in adapters[0].items()
    }


def _mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    start = tensors[0].double()
    # Added as differences, so that equal tensors give themselves and no rounding.
    return start + sum(
        (share * (tensor.double() - start) for share, tensor in zip(shares, tensors, strict=True)),
        torch.zeros_like(start),
    )


def _all_equal(tensors: Sequence[Tensor]) -> bool:
    return all(torch.equal(tensors[0], tensor) for tensor in tensors[1:])


class Folded(NamedTuple):
    """An adapter without a residual.

    `rank` is that of all layers, `missing` the largest share of a layer's update (Frobenius norm) that the
    rank has no room for.
    """

    adapter: dict[str, Tensor]
    rank: int
    missing: float


def fold(aggregate: Aggregate, most: int) -> Folded:
    """Put the residual into the factors, at the lowest rank up to `most` that holds all of it."""
    adapter = dict(aggregate.adapter)
    if not aggregate.residual:
        rank = max(adapter[layer + DOWN].shape[0] for layer in layers_of(adapter))
        return Folded(adapter, rank, 0.0)
    wholes = {}
    for layer in layers_of(adapter):
        own = update_of(adapter, layer)
        wholes[layer] = own + aggregate.residual[layer] if layer in aggregate.residual else own
    cut = {layer: whole.cut(most) for layer, whole in wholes.items()}
    rank = max(found.rank for found, _ in cut.values())
    missing = 0.0
    for layer, (found, lost) in cut.items():
        dtype = adapter[layer + DOWN].dtype
        adapter[layer + UP] = _widen(found.up, rank, 1).to(dtype)
        adapter[layer + DOWN] = _widen(found.down, rank, 0).to(dtype)
        whole = math.hypot(float(found.dense().norm()), lost)
        missing = max(missing, lost / whole if whole else 0.0)
    return Folded(adapter, rank, missing)


def _widen(matrix: Tensor, rank: int, axis: int) -> Tensor:
    shape = list(matrix.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([matrix, matrix.new_zeros(shape)], axis).contiguous()


# --- nodes that send poison ---


def trimmed_mean(adapters: Sequence[Adapter], outermost: int) -> dict[str, Tensor]:
    """Return the mean of each weight without its `outermost` lowest and highest values (arXiv 1803.01498).

    Raises UserError: nothing would be left.
    """
    if 2 * outermost >= len(adapters):
        raise UserError(
            f"a trimmed mean of {len(adapters)} nodes without {outermost} on either side has none left",
            remedy=f"trim at most {(len(adapters) - 1) // 2}, or wait for more nodes",
        )
    found = {}
    for name, first in adapters[0].items():
        values = torch.stack([adapter[name].double() for adapter in adapters]).sort(0).values
        found[name] = values[outermost : len(adapters) - outermost].mean(0).to(first.dtype)
    return found


def distances(adapters: Sequence[Adapter]) -> Tensor:
    """Return the Frobenius distances between the updates of adapters, over all layers, (nodes, nodes)."""
    count = len(adapters)
    inner = torch.zeros(count, count, dtype=torch.float64)
    for layer in layers_of(adapters[0]):
        updates = [update_of(adapter, layer) for adapter in adapters]
        for one in range(count):
            for other in range(one, count):
                # <B₁A₁, B₂A₂> is the sum over (B₁ᵀB₂) ∘ (A₁A₂ᵀ), so no matrix of the layer's size is needed.
                ups = updates[one].up.T @ updates[other].up
                downs = updates[one].down @ updates[other].down.T
                inner[one, other] += (ups * downs).sum()
                inner[other, one] = inner[one, other]
    squares = inner.diagonal()
    return (squares[:, None] + squares[None] - 2 * inner).clamp(min=0).sqrt()


def krum(adapters: Sequence[Adapter], poisoned: int) -> int:
    """Return the node that `krum_order` puts first (Krum, arXiv 1703.02757). Raises UserError."""
    return krum_order(adapters, poisoned)[0]


def krum_order(adapters: Sequence[Adapter], poisoned: int) -> list[int]:
    """Return the nodes, those with the nearest neighbours first, if `poisoned` nodes may send anything.

    arXiv 1703.02757: a node's score is the sum of its squared distances to the nodes - poisoned - 2 nearest
    ones. Raises UserError: it needs 2 · poisoned + 3 nodes.
    """
    count = len(adapters)
    if count < 2 * poisoned + 3:
        raise UserError(
            f"Krum against {poisoned} poisoned nodes needs {2 * poisoned + 3} nodes, and {count} took part",
            remedy="wait for more nodes, or expect fewer poisoned ones",
        )
    squares = distances(adapters).square()
    squares.fill_diagonal_(float("inf"))
    nearest = squares.sort(1).values[:, : count - poisoned - 2]
    return [int(node) for node in nearest.sum(1).argsort(stable=True)]
