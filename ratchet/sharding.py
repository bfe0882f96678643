"""A model in parts (FSDP2): each process keeps its share of every weight, and gathers a layer's only while it computes that layer.

What is saved is whole: weights and the optimizer's state are gathered on the way out, and cut again on the way in.
`whole`, and what calls it, has to be called by all processes together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ratchet.models.loading import layers_of, without_adapter
from ratchet.training.distributed import rank, world_size


def shard(model: Any) -> None:
    """In place, a layer at a time. The processes have to know each other already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # otherwise it is whole after an evaluation, and what is read then is no part
    without_adapter(model)._is_distributed_loading_by_transformers = True  # so the Trainer neither moves it nor wraps it in DDP
    model._is_fsdp_managed_module = True  # and adds gradients up before it exchanges them


def local(weight: Tensor) -> Tensor:
    """What this process holds of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(value: Any) -> Any:
    """`value` with whole tensors in place of parts; in other processes than the first with empty ones."""
    if isinstance(value, DTensor):
        found = value.full_tensor()
        return found.cpu() if rank() == 0 else torch.empty(0)
    if isinstance(value, dict):
        return {key: whole(part) for key, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def as_parts(held: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process holds of `weights`' likes, as parts that `whole` can put together."""
    return {name: _part(tensor, weights[name]) for name, tensor in held.items()}


def _part(held: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return held
    return DTensor.from_local(held.to(weight.device), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride())


def cut(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of whole tensors what this process holds of `weights`."""
    return {name: local(_cut(tensor, weights[name])) for name, tensor in tensors.items()}


def cut_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors as this one wants it: those of a weight's shape in parts."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def fit(value: Any, weight: Tensor) -> Any:
        return _cut(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value

    return {**state, "state": {index: {name: fit(value, weights[index]) for name, value in kept.items()} for index, kept in state["state"].items()}}


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else tensor
