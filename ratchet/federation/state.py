"""Keep, send and split the global adapter of a federation: two factors a layer, and their residual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ratchet.federation import aggregation
from ratchet.federation.aggregation import DOWN, UP, Aggregate, LowRank, layers_of
from ratchet.files import write_bytes
from ratchet.models.adapters import RESIDUAL

GLOBAL, KEPT = "global:", f"{RESIDUAL}:"  # before the names of tensors in files and messages


def state_tensors(aggregate: Aggregate) -> dict[str, Tensor]:
    """Return the tensors of the global adapter and of its residual, which has one rank in all layers."""
    tensors = {f"{GLOBAL}{name}": tensor for name, tensor in aggregate.adapter.items()}
    if aggregate.residual:
        rank = max(part.rank for part in aggregate.residual.values())
        for layer in layers_of(aggregate.adapter):
            up, down = aggregate.adapter[layer + UP], aggregate.adapter[layer + DOWN]
            part = aggregate.residual.get(layer)
            wide_up, wide_down = torch.zeros(up.shape[0], rank), torch.zeros(rank, down.shape[1])
            if part is not None:
                wide_up[:, : part.rank], wide_down[: part.rank] = part.up.float(), part.down.float()
            tensors |= {f"{KEPT}{layer}{UP}": wide_up, f"{KEPT}{layer}{DOWN}": wide_down}
    return tensors


def write_state(path: Path, aggregate: Aggregate) -> None:
    """Write the global adapter, its residual in float64: rounding must not grow with the rounds."""
    tensors = {f"{GLOBAL}{name}": tensor for name, tensor in aggregate.adapter.items()}
    for layer, part in aggregate.residual.items():
        tensors |= {
            f"{KEPT}{layer}{UP}": part.up.contiguous(),
            f"{KEPT}{layer}{DOWN}": part.down.contiguous(),
        }
    write_bytes(path, [save(tensors)])


def read_state(path: Path) -> Aggregate:
    tensors = load_file(path)
    adapter = {
        name.removeprefix(GLOBAL): tensor for name, tensor in tensors.items() if name.startswith(GLOBAL)
    }
    residual = {
        name.removeprefix(KEPT).removesuffix(DOWN): LowRank(tensors[name.removesuffix(DOWN) + UP], tensor)
        for name, tensor in tensors.items()
        if name.startswith(KEPT) and name.endswith(DOWN)
    }
    return Aggregate(adapter, residual)


def updates_of(aggregate: Aggregate) -> dict[str, LowRank]:
    """Return the whole update of each layer, without its scale."""
    found = {}
    for layer in layers_of(aggregate.adapter):
        own = aggregation.update_of(aggregate.adapter, layer)
        found[layer] = own + aggregate.residual[layer] if layer in aggregate.residual else own
    return found


def distance(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Return the Frobenius norm of the difference of two updates, over all layers, without their scale."""
    total = 0.0
    for layer, part in one.items():
        gap = LowRank(torch.cat([part.up, -other[layer].up], 1), torch.cat([part.down, other[layer].down]))
        total += float(((gap.up.T @ gap.up) * (gap.down @ gap.down.T)).sum())
    return math.sqrt(max(total, 0.0))


def split(adapter: Mapping[str, Tensor], rank: int, factor: float = 1.0) -> Aggregate:
    """Return an adapter as factors of `rank` and a residual: its largest singular values, and the others.

    `factor` is the adapter's scale divided by that of the federation. An adapter that has the rank already
    and the same scale stays as it is.
    """
    if factor == 1.0 and all(adapter[layer + DOWN].shape[0] == rank for layer in layers_of(adapter)):
        return Aggregate(dict(adapter), {})
    own, residual = dict(adapter), {}
    for layer in layers_of(adapter):
        whole = aggregation.update_of(adapter, layer)
        whole = LowRank(whole.up * factor, whole.down)
        first, missing = whole.cut(rank)
        dtype = adapter[layer + DOWN].dtype
        up = torch.zeros(whole.up.shape[0], rank, dtype=torch.float64)
        down = torch.zeros(rank, whole.down.shape[1], dtype=torch.float64)
        up[:, : first.rank], down[: first.rank] = first.up, first.down
        own[layer + UP], own[layer + DOWN] = up.to(dtype), down.to(dtype)
        kept = aggregation.update_of(own, layer)
        rest = LowRank(torch.cat([whole.up, -kept.up], 1), torch.cat([whole.down, kept.down])).cut()[0]
        if missing > aggregation.ZERO:
            residual[layer] = rest
    return Aggregate(own, residual)
