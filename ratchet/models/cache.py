"""Run a model with a cache of previous tokens, or for its logits at chosen positions only.

The cache serves rows that join and leave a batch at any time.
Attention layers cache keys and values of every token, padded on the left to a common length. So do layers
with a sliding window; the attention mask leaves out tokens outside the window. Layers without attention
(convolutions, linear attention) cache a state of fixed size per row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ratchet.models.loading import without_adapter

UNSEEN = ("labels", "roles", "references", "shift_labels")  # columns of a batch that only a loss reads


def new_cache(model: Any) -> Any:
    """Return an empty cache of the kind that the model, one of transformers, needs."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if not is_hybrid(model):
        return DynamicCache()
    cache = DynamicCache(config=model.config)
    # A sliding-window layer drops old tokens, and then its rows cannot be padded to the length of others.
    cache.layers = [
        DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache


def is_hybrid(model: Any) -> bool:
    """Return whether some layers cache a state instead of keys and values."""
    from transformers import DynamicCache

    return any(hasattr(layer, "conv_states") for layer in DynamicCache(config=model.config).layers)


def join(ours: Any, theirs: Any, length: int) -> None:
    """Append the rows of `theirs` to `ours`, in place, both padded to `length` tokens."""
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        if hasattr(mine, "keys"):
            mine.keys = torch.cat([_widen(mine.keys, length), _widen(other.keys, length)])
            mine.values = torch.cat([_widen(mine.values, length), _widen(other.values, length)])
        for name in ("conv_states", "recurrent_states"):
            states = getattr(mine, name, {})
            states |= {
                key: torch.cat([state, getattr(other, name)[key]])
                for key, state in states.items()
                if state is not None
            }


def select(cache: Any, kept: Sequence[int], start: int) -> None:
    """Keep only the rows `kept`, in place, and of their keys and values the tokens from `start` on."""
    rows = list(kept)
    for layer in cache.layers:
        if hasattr(layer, "keys"):
            layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]
        for name in ("conv_states", "recurrent_states"):
            states = getattr(layer, name, {})
            states |= {key: state[rows] for key, state in states.items() if state is not None}


def align_right(cache: Any, kept: Sequence[int], lengths: Tensor) -> Tensor:
    """Keep only the rows `kept`, in place, and of each its first tokens (`lengths`), padded on the left.

    The cache must be padded on the right before. Returns the mask, (batch, seq): 1 where a row has a token.
    """
    longest = int(lengths.max())
    places = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None])  # (batch, seq)
    rows, source = torch.tensor(kept, device=lengths.device)[:, None], places.clamp(min=0)
    for layer in cache.layers:
        # Advanced indices on either side of a slice put (batch, seq) in front: (batch, seq, heads, width).
        layer.keys = layer.keys[rows, :, source].transpose(1, 2).contiguous()
        layer.values = layer.values[rows, :, source].transpose(1, 2).contiguous()
    return (places >= 0).long()


def forward(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, *, whole: bool, **more: Any
) -> Tensor:
    """Return the logits after new tokens: (batch, seq, vocab) if `whole`, else (batch, 1, vocab) of the last.

    `ids` and `positions` are (batch, seq); `mask`, (batch, cached + seq), covers the cache as well.
    """
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **({} if whole else {"logits_to_keep": 1}),
        **more,
    ).logits
    return logits


def place_rows(
    model: Any, ids: Tensor, positions: Tensor, inputs: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """Return the positions of packed windows as the model takes them, (batch, seq) or (4, batch, seq).

    `positions`, (batch, seq), restart with each row. Models such as Qwen-VL's place pictures in two
    dimensions (arXiv 2409.12191): they take positions on three axes, and the plain ones before them to tell
    rows apart.
    """
    inner: Any = getattr(without_adapter(model), "model", None)
    if not hasattr(inner, "get_rope_index"):
        return positions
    axes = positions.expand(4, -1, -1).clone()
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None or "image_grid_thw" not in inputs:
        return axes
    row = torch.cumsum((positions == 0).flatten(), 0) - 1  # the row of each token, counted over all windows
    counts = torch.bincount(row)
    places = torch.arange(int(counts.max()), device=ids.device) < counts[:, None]  # (rows, longest)
    rows, rows_kinds = torch.zeros_like(places, dtype=ids.dtype), torch.zeros_like(places, dtype=kinds.dtype)
    rows[places], rows_kinds[places] = ids.flatten(), kinds.flatten()
    found, _ = inner.get_rope_index(
        rows,
        mm_token_type_ids=rows_kinds,
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=places.long(),
    )  # (3, rows, longest)
    axes[1:] = found[:, places].view(3, *ids.shape)
    return axes


def _widen(states: Tensor, length: int) -> Tensor:
    """Pad keys or values (batch, heads, seq, width) with zeros on the left, to `length`."""
    return pad(states, (0, 0, length - states.shape[2], 0))


def logits_at(model: Any, head: torch.nn.Module, batch: dict[str, Tensor], chosen: Tensor) -> Tensor:
    """Return float32 logits for the token after each chosen position, (chosen, vocab).

    All logits would take most of a forward pass's memory, and on a small model much of its time.
    `chosen` is (batch, seq - 1) and true where the *next* token is a target. `head` is the output layer of
    `model`, a separate argument because `model` may be wrapped (DDP). Columns of `batch` that only a loss
    reads are not passed to the model.
    """

    def choose(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]  # (batch, virtual tokens + seq, width)
        hidden = hidden[:, hidden.shape[1] - chosen.shape[1] - 1 : -1]
        places = chosen.flatten().nonzero().squeeze(1)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)
        return rows[None], *inputs[1:]  # (1, chosen, width)

    hook = head.register_forward_pre_hook(choose)
    try:
        seen = {name: column for name, column in batch.items() if name not in UNSEEN}
        logits: Tensor = model(**seen, use_cache=False).logits[0].float()
        return logits
    finally:
        hook.remove()
