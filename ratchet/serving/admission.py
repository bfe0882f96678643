"""Check that a version can be served beside the champion; this reads only files, so serving continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ratchet.errors import BaseModelError
from ratchet.models.adapters import FAMILIES
from ratchet.models.loading import is_full, weights_file
from ratchet.models.manifests import describe_base, read_base_manifest, read_trained_manifest
from ratchet.serving.bundle import Bundle

MAX_RANK = 512
# Options of PEFT that the methods trained here do not use: they would change the base that other versions
# share (as PiSSA does), or are untested.
MUST_BE_OFF = (
    *("lora_bias", "use_qalora", "use_bdlora", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    "prefix_projection",
)
OFF: tuple[Any, ...] = (None, False, "none", [], {})
HARMLESS_STARTS = (True, False, "gaussian")  # of init_lora_weights; loading overwrites the initial weights


def check_adapter_fits(bundle: Bundle) -> None:
    """Raise BaseModelError for another base, a method that is not served, a rank over 512, or NaN weights."""
    _check_base(bundle)
    if not is_full(bundle.adapter):
        _check_config(bundle.adapter, bundle.base)
    _check_weights(weights_file(bundle.adapter))


def _check_base(bundle: Bundle) -> None:
    theirs, ours = read_trained_manifest(bundle.adapter).base, read_base_manifest(bundle.base)
    if (theirs.model, theirs.revision) != (ours.model, ours.revision):
        raise BaseModelError(
            f"v{bundle.version} was trained on {describe_base(theirs)}; "
            f"the base here is {describe_base(ours)}",
            remedy="the adapter and its base come from one commit; "
            "the folder .ratchet/serving may be removed",
        )


def _check_config(folder: Path, base: Path) -> None:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        ranks = (
            [config["r"], *(config.get("rank_pattern") or {}).values()]
            if config.get("peft_type") == "LORA"
            else []
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelError(
            f"adapter_config.json cannot be read: {error!r}", remedy="`ratchet retrain` makes another"
        ) from None
    if odd := [rank for rank in ranks if not isinstance(rank, int) or not 0 < rank <= MAX_RANK]:
        raise BaseModelError(
            f"the adapter's rank is {odd[0]!r}, wanted 1 to {MAX_RANK}",
            remedy="set `adapter.rank` and retrain",
        )
    unlike = [key for key in MUST_BE_OFF if config.get(key) not in OFF]
    unlike += [] if config.get("peft_type") in FAMILIES else ["peft_type"]
    unlike += [] if _only_new(config.get("trainable_token_indices"), base) else ["trainable_token_indices"]
    unlike += [] if config.get("init_lora_weights", True) in HARMLESS_STARTS else ["init_lora_weights"]
    if unlike:
        said = ", ".join(f"{key} {config.get(key)!r}" for key in unlike)
        raise BaseModelError(
            f"adapter_config.json asks for more than `adapter.method` offers: {said}",
            remedy="only adapters that were trained here are served",
        )


def _only_new(trained: Any, base: Path) -> bool:
    """Return whether embeddings were trained for the base's `new_tokens` only."""
    ids = [token.id for token in read_base_manifest(base).new_tokens]
    return not trained or (isinstance(trained, dict) and all(of == ids for of in trained.values()))


def _check_weights(path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(
            f"{path} is no safetensors file: {error}", remedy="remove .ratchet/serving; it is fetched again"
        ) from None
    if broken := [name for name, weight in weights.items() if not torch.isfinite(weight.float()).all()]:
        raise BaseModelError(
            f"{len(broken)} of {len(weights)} weights are not finite, the first {broken[0]}",
            remedy="the training diverged: lower `train.learning_rate`",
        )
