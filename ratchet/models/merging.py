"""A version as one whole model: the adapter's update added to the base's weights, a quantised base dequantised first.

What was trained on a quantised base fits that base's rounded weights, not the ones it was rounded from: so the rounded ones are
what the update is added to. Not covered: virtual tokens, which are no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.errors import UserError
from ratchet.models.adapters import PREFIXED, base_settings, read_kind
from ratchet.models.loading import load_adapter, load_base, load_full, quiet


def why_unmergeable(adapter: Path) -> str:
    """Empty when it merges."""
    family = read_kind(adapter).family
    return (
        f"`adapter.method: {family}` puts virtual tokens before every row and changes no weight: there is nothing to merge"
        if family in PREFIXED
        else ""
    )


def load_merged(base: Path, adapter: Path) -> Any:
    """A whole model without PEFT; of `full` the one that was trained. Raises UserError: this method does not merge; BaseModelError."""
    import torch

    if reason := why_unmergeable(adapter):
        raise UserError(
            reason, remedy="serve it as an adapter: the gateway does, and so does any program with PEFT"
        )
    if read_kind(adapter).family == "full":
        whole: Any = load_full(adapter)
        return whole.eval()
    model: Any = load_base(base, **base_settings(adapter))
    with quiet():
        if getattr(model, "is_quantized", False):
            model = model.dequantize(dtype=None if torch.cuda.is_available() else torch.float32)
        if not torch.cuda.is_available():
            model = model.float()
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    return merged.eval()
