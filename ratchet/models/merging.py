"""Merge a version into one whole model: add the adapter's update to the base's weights.

A quantised base is dequantised first, because the adapter was trained for the rounded weights, not for the
original ones. Not covered: virtual tokens, which change no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.errors import UserError
from ratchet.models.adapters import PREFIXED, load_base_of, read_kind
from ratchet.models.loading import load_adapter, load_full, quiet


def why_unmergeable(adapter: Path) -> str:
    """Return why a version cannot be merged, or ""."""
    family = read_kind(adapter).family
    if family not in PREFIXED:
        return ""
    return (
        f"`adapter.method: {family}` puts virtual tokens before every row and changes no weight: "
        "there is nothing to merge"
    )


def require_mergeable(adapter: Path) -> None:
    """Raise UserError for a version that cannot be merged."""
    if reason := why_unmergeable(adapter):
        raise UserError(
            reason, remedy="serve it as an adapter: the gateway does, and so does any program with PEFT"
        )


def load_merged(base: Path, adapter: Path) -> Any:
    """Return the version as a whole model without PEFT; for `full`, the trained model itself.

    Raises UserError: the method cannot be merged; BaseModelError: base or adapter cannot be loaded.
    """
    import torch

    require_mergeable(adapter)
    if read_kind(adapter).family == "full":
        whole: Any = load_full(adapter)
        return whole.eval()
    model: Any = load_base_of(base, adapter)
    with quiet():
        if getattr(model, "is_quantized", False):
            model = model.dequantize(dtype=None if torch.cuda.is_available() else torch.float32)
        if not torch.cuda.is_available():
            model = model.float()
        merged = load_adapter(model, adapter).merge_and_unload(safe_merge=True)
    return merged.eval()
