"""Sum the clipped gradients of single rows, and add noise: the step of DP-SGD (arXiv 1607.00133).

The trained weights are matrices of linear layers, LoRA's A and B. The gradient of a row is the product of
what went into the layer and of the loss's gradient by what came out of it, summed over the row's tokens. Both
are at hand in one backward pass of the whole batch, because rows do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ratchet.errors import ConfigError
from ratchet.privacy.noise import normal


class RowGradients:
    """The sum of the rows' clipped gradients of one step, for the trained weights of `model`.

    Raises ConfigError if a trained weight is no matrix of a linear layer, or a layer does not see one row
    after another.
    """

    def __init__(self, model: torch.nn.Module, max_grad_norm: float) -> None:
        self._max_norm = max_grad_norm
        self._layers = _trained_layers(model)
        self._sums: dict[str, Tensor] = {}
        self.clipped = self.seen = 0  # units of this step whose gradient was too long, and all

    def add(self, losses: Callable[[], Tensor], units: Tensor) -> Tensor:
        """Add the gradients of a forward pass; return its losses, (rows,).

        `losses()` computes one loss a row. `units`, (rows,), numbers from 0 what is clipped as one: the row,
        or all rows of a user, whose loss is their mean and who must all be in this pass.
        """
        rows_of_unit = torch.bincount(units)  # (units,)
        count = len(rows_of_unit)
        with self._recorded(len(units)) as passes:
            found = losses()
        total = (found / rows_of_unit[units]).sum()
        gradients = torch.autograd.grad(total, [each.output for each in passes], allow_unused=True)
        by_unit: dict[str, Tensor] = {}  # (units, out, in)
        for each, gradient in zip(passes, gradients, strict=True):
            if gradient is not None:
                part = torch.einsum("rto,rti->roi", gradient.float(), each.seen.float())
                if count < len(units):
                    part = part.new_zeros(count, *part.shape[1:]).index_add(0, units, part)
                by_unit[each.layer] = by_unit[each.layer] + part if each.layer in by_unit else part
        squares = [parts.flatten(1).square().sum(1) for parts in by_unit.values()]
        norms = torch.stack(squares).sum(0).sqrt() if squares else found.new_zeros(count)  # (units,)
        scale = (self._max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
        for name, parts in by_unit.items():
            part = torch.einsum("u,uoi->oi", scale, parts)
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        self.seen += count
        self.clipped += int((norms > self._max_norm).sum())
        return found.detach()

    def release(self, key: bytes, number: int, *, noise_multiplier: float, divisor: float) -> None:
        """Set each weight's `grad` to (sum + noise) / `divisor`, and begin the next step.

        The noise of step `number` has the standard deviation `noise_multiplier` times the clipping norm. A
        step without rows gets noise, too.
        """
        for part, (name, layer) in enumerate(self._layers.items()):
            weight = layer.weight
            noise = torch.from_numpy(normal(key, number, weight.numel(), part)).view(weight.shape)
            total = noise.to(weight.device) * (noise_multiplier * self._max_norm)  # float64
            if name in self._sums:
                total = total + self._sums[name]
            weight.grad = (total / divisor).to(weight.dtype)
        self._sums = {}
        self.clipped = self.seen = 0

    @property
    def sums(self) -> dict[str, Tensor]:
        """The clipped sums so far, by the layer's name, (out, in) each, without noise."""
        return self._sums

    @contextmanager
    def _recorded(self, count: int) -> Iterator[list[_Pass]]:
        passes: list[_Pass] = []
        hooks = [
            layer.register_forward_hook(self._record(name, count, passes))
            for name, layer in self._layers.items()
        ]
        try:
            yield passes
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _record(name: str, count: int, passes: list[_Pass]) -> Callable[..., None]:
        def record(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0].detach()
            if seen.ndim != 3 or len(seen) != count:
                raise ConfigError(
                    f"`train.privacy`: the layer {name} sees {tuple(seen.shape)}, wanted (rows, tokens, "
                    f"width) of {count} rows: its gradients cannot be told apart by row",
                    remedy="leave it out of `adapter.target_modules`: name attention layers",
                )
            passes.append(_Pass(name, seen, output))

        return record


class _Pass(NamedTuple):
    """What went into a layer, (rows, tokens, in), and what came out, (rows, tokens, out)."""

    layer: str
    seen: Tensor
    output: Tensor


def _trained_layers(model: torch.nn.Module) -> dict[str, Any]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    }
    known = {f"{name}.weight" for name in found}
    if odd := next(
        (name for name, weight in model.named_parameters() if weight.requires_grad and name not in known), ""
    ):
        raise ConfigError(
            f"`train.privacy`: the weight {odd} is no matrix of a linear layer",
            remedy="train only updates of linear layers: `adapter.method: lora`, `adapter.target_modules: "
            "all-linear`",
        )
    if not found:
        raise ConfigError("`train.privacy`: no weight is trained", remedy="set `adapter.method: lora`")
    return found
