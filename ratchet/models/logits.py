"""Compute a model's logits only at the positions that are needed.

The logits take most of a forward pass's memory, and on a small model much of its time.
"""

from __future__ import annotations

from typing import Any

import torch

SEEN = ("input_ids", "attention_mask", "position_ids")


def logits_at(
    model: Any, head: torch.nn.Module, batch: dict[str, torch.Tensor], chosen: torch.Tensor
) -> torch.Tensor:
    """Return float32 logits for the token after each chosen position, (chosen, vocab).

    `chosen` is (batch, seq - 1) and true where the *next* token is a target. `head` is the output layer of
    `model`, a separate argument because `model` may be wrapped (DDP). Columns of `batch` that only a loss
    reads are not passed to the model.
    """

    def choose(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0]  # (batch, virtual tokens + seq, width)
        hidden = hidden[:, hidden.shape[1] - chosen.shape[1] - 1 : -1]
        places = chosen.flatten().nonzero().squeeze(1)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
        return rows[None], *inputs[1:]  # (1, chosen, width)

    hook = head.register_forward_pre_hook(choose)
    try:
        seen = {name: batch[name] for name in SEEN if name in batch}
        logits: torch.Tensor = model(**seen, use_cache=False).logits[0].float()
        return logits
    finally:
        hook.remove()
