"""Adapters with random factors, and the update that an aggregate makes of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ratchet.federation.aggregation import DOWN, UP, Aggregate, update_of

SHAPES = {"q": (24, 32), "up": (64, 32)}  # layer → (out, in)
RANK = 4


def draw(
    seed: int, spread: float = 1.0, shapes: Mapping[str, tuple[int, int]] = SHAPES, *, norm: bool = True
) -> dict[str, torch.Tensor]:
    """An adapter of rank 4; with `norm` it has a weight that is no factor."""
    chance = torch.Generator().manual_seed(seed)
    made = {}
    for layer, (rows, columns) in shapes.items():
        made[layer + DOWN] = torch.randn(RANK, columns, generator=chance) * spread
        made[layer + UP] = torch.randn(rows, RANK, generator=chance) * spread
    return made | ({"norm.weight": torch.randn(8, generator=chance)} if norm else {})


def update(found: Aggregate, layer: str) -> torch.Tensor:
    own = update_of(found.adapter, layer).dense()
    return own + found.residual[layer].dense() if layer in found.residual else own
