"""Compute a model's logits only at the positions where they are wanted.

The output layer's logits take the most memory of a forward pass, and on a small model much of its time.
"""

from __future__ import annotations

from typing import Any

import torch

SEEN = ("input_ids", "attention_mask", "position_ids")


def logits_at(
    model: Any, head: torch.nn.Module, batch: dict[str, torch.Tensor], chosen: torch.Tensor
) -> torch.Tensor:
    """Return float32 logits over the token after each chosen position, (chosen, vocab).

    `chosen` is (batch, seq - 1) and true where the *next* token is a target. `head` is the output layer of
    `model`; it is given apart because `model` may be wrapped (DDP). The model sees tokens alone, none of the
    columns that only a loss reads.
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
