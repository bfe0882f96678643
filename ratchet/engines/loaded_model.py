"""Keep a model in memory, with the versions that share it.

plain LoRA, rsLoRA, QLoRA   on one base, decoded together (PEFT's mixed batches)
DoRA, (IA)³                 on one base, each version's rows in a batch of their own: PEFT cannot mix them
prefix, prompt              on one base, each version's rows in a batch of their own, after its virtual tokens
biases, whole modules       on a base of their own: they would change a base that others share
full                        a whole model, no base
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ratchet.engines.picture_pooling import watched
from ratchet.errors import BaseModelError, RatchetError
from ratchet.models.adapters import PREFIXED, base_settings, load_base_of, read_kind
from ratchet.models.cache import forward, new_cache
from ratchet.models.loading import WEIGHTS, load_adapter, load_full, quiet
from ratchet.serving.bundle import Bundle

State = tuple[Tensor, Tensor]  # keys and values of a layer: (heads, virtual tokens, width)


def model_place(bundle: Bundle) -> str:
    """Return a key; versions with the same key share a model in memory."""
    kind, base = read_kind(bundle.adapter), base_settings(bundle.adapter)
    family = "virtual tokens" if kind.family in PREFIXED else kind.family
    own = (
        f" of v{bundle.version}"
        if kind.family == "full" or (not kind.shares and kind.family not in PREFIXED)
        else ""
    )
    return f"{base.method} {base.quantisation} {family}{own} on {bundle.base}"


def batch_place(bundle: Bundle) -> str:
    """Return a key; versions with the same key are decoded in one batch."""
    return (
        model_place(bundle)
        if read_kind(bundle.adapter).mixes
        else f"{model_place(bundle)}, v{bundle.version}"
    )


class LoadedModel:
    """A base or a whole model, with its versions; only one thread at a time uses it."""

    def __init__(self, bundle: Bundle) -> None:
        full = read_kind(bundle.adapter).family == "full"
        base: Any = load_full(bundle.adapter) if full else load_base_of(bundle.base, bundle.adapter)
        self._base: Any = base.eval()
        self._model: Any = self._base  # with adapters, once the first is loaded
        self._virtual: dict[int, list[State]] = {}
        self.versions: set[int] = set()

    @property
    def device(self) -> Any:
        return self._base.device

    @property
    def vocab_size(self) -> int:
        return int(self._base.config.get_text_config().vocab_size)

    def add(self, bundle: Bundle) -> None:
        """Load a version onto the model. Raises BaseModelError: its modules or shapes do not fit the base."""
        family = read_kind(bundle.adapter).family
        if family in PREFIXED:
            self._virtual[bundle.version] = self._read_virtual(bundle, family)
        elif family != "full":
            self._add_adapter(bundle)
        self.versions.add(bundle.version)

    def _add_adapter(self, bundle: Bundle) -> None:
        try:
            self._model = load_adapter(self._model, bundle.adapter, name=_name(bundle.version))
        except Exception as error:
            self._drop(_name(bundle.version))
            if isinstance(error, RatchetError):
                raise
            raise BaseModelError(
                f"v{bundle.version} cannot be loaded: {error}",
                remedy="ratchet retrain makes another; the log of the gateway has the whole message",
            ) from error
        self._model.eval()

    def remove(self, version: int) -> None:
        self.versions.discard(version)
        self._virtual.pop(version, None)
        self._drop(_name(version))

    def _drop(self, name: str) -> None:
        adapters = getattr(self._model, "peft_config", {})
        if name in adapters and len(adapters) > 1:
            with quiet():
                self._model.delete_adapter(name)

    # --- virtual tokens ---

    @torch.inference_mode()
    def _read_virtual(self, bundle: Bundle, family: str) -> list[State]:
        """Compute each layer's keys and values of the virtual tokens.

        They precede every row and do not depend on it, so they are computed once.
        """
        from safetensors.torch import load_file
        from transformers import DynamicCache

        learned = load_file(bundle.adapter / WEIGHTS).get("prompt_embeddings")
        config = self._base.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.hidden_size if family == "prompt" else 2 * config.num_hidden_layers * heads * size
        if learned is None or learned.ndim != 2 or learned.shape[1] != width:
            seen = (
                "no prompt_embeddings"
                if learned is None
                else f"virtual tokens of shape {tuple(learned.shape)}"
            )
            raise BaseModelError(
                f"v{bundle.version} does not fit the base: it holds {seen}, wanted a width of {width}",
                remedy="it was trained on another base: retrain it",
            )
        learned = learned.to(self.device, self._base.dtype)
        if family == "prefix":
            states = learned.view(len(learned), 2 * config.num_hidden_layers, heads, size)
            states = states.permute(1, 2, 0, 3)  # (2 · layers, heads, virtual tokens, width)
            return [(states[2 * layer], states[2 * layer + 1]) for layer in range(config.num_hidden_layers)]
        cache: Any = DynamicCache()
        self._base(inputs_embeds=learned[None], past_key_values=cache, use_cache=True)
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def num_virtual(self, version: int) -> int:
        return int(self._virtual[version][0][0].shape[1]) if version in self._virtual else 0

    def new_cache(self, version: int, num_rows: int) -> Any:
        """Return a cache for `num_rows` rows that begins with the version's virtual tokens, if any."""
        cache = new_cache(self._base)
        for layer, states in enumerate(self._virtual.get(version, [])):
            keys, values = (state.expand(num_rows, -1, -1, -1) for state in states)
            cache.update(keys, values, layer)
        return cache

    # --- computing ---

    def watched(self) -> AbstractContextManager[list[Tensor]]:
        """Collect what the passes within a block give to the language model: (batch, seq, width) each."""
        return watched(self._base)

    def find_positions(
        self, ids: Tensor, mask: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor] | None:
        """Return the positions of prompts with pictures, and how far they fall behind the number of tokens.

        `ids` and `mask` are (batch, seq), the positions (axes, batch, seq), the distances (batch,). None: the
        model counts the tokens of pictures like others. Models such as Qwen-VL's place them in two
        dimensions (arXiv 2409.12191), so the text after a picture begins at its longer side.
        """
        inner: Any = getattr(self._base, "model", None)
        if "image_grid_thw" not in inputs or not hasattr(inner, "get_rope_index"):
            return None
        positions, distance = inner.get_rope_index(
            ids,
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=mask,
        )
        return positions, distance[:, 0]

    def forward(
        self,
        versions: list[int],
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any,
        *,
        whole: bool,
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        """Return logits: (batch, seq, vocab) if `whole`, else (batch, 1, vocab) of the last position.

        `ids` and `positions` are (batch, seq), `mask` covers the cache as well; `versions` has one entry a
        row; `inputs` is what the model takes of pictures. Rows of a single version skip PEFT's mixed batches,
        which are slower.
        """
        if self._model is self._base:
            return forward(self._base, ids, mask, positions, cache, whole=whole, **inputs)
        names = [_name(version) for version in versions]
        if len(set(names)) > 1:
            return forward(
                self._model, ids, mask, positions, cache, whole=whole, adapter_names=names, **inputs
            )
        if self._model.active_adapters != [names[0]]:
            self._model.base_model.set_adapter(names[0], inference_mode=True)
        return forward(self._model, ids, mask, positions, cache, whole=whole, **inputs)


def _name(version: int) -> str:
    return f"v{version}"
