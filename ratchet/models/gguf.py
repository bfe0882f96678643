"""Write a whole Llama model as one GGUF file, for llama.cpp and the programs built on it.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and written with the
package `gguf` (extra `export`). Not covered: other architectures, scaled rotary positions, and tokenizers
whose splits llama.cpp does not know. `why_no_gguf` gives the reason; llama.cpp's own converter may then work.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ratchet.errors import UserError

Array = NDArray[np.float32]
FILE = "model.gguf"
KINDS = ("gguf", "int8", "int4")  # float16, Q8_0, Q4_0
CONVERTER = (
    "`ratchet export … --to merged`, then llama.cpp's convert_hf_to_gguf.py on that folder, "
    "which knows many more"
)
# The regular expression with which meta-llama/Meta-Llama-3-8B splits text.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenizers with which llama.cpp takes a word that is a token as it is; with others it always merges.
WHOLE_WORDS = ("llama-bpe",)
BLOCK = 32  # weights that share a scale in Q8_0 and Q4_0
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def require_gguf() -> None:
    """Raise UserError if the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "the package gguf is not installed", remedy="pip install 'gguf>=0.17' (the extra `export`)"
        )


def why_no_gguf(config: Any, tokenizer: Any) -> str:
    """Return why a model with this config and tokenizer cannot be written faithfully, or ""."""
    if config.model_type != "llama":
        return f"the architecture is {config.model_type}, only llama is written here"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "its linear layers have biases"
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default":
        return f"its rotary positions are scaled ({rope})"
    for token in tokenizer.added_tokens_decoder.values():
        if token.single_word:
            return (
                f"its tokenizer takes {token.content!r} for a token where it is a whole word, "
                "llama.cpp would within other words as well"
            )
        if token.lstrip or token.rstrip:
            return f"its tokenizer drops blanks beside {token.content!r}, llama.cpp would keep them"
    if _pre_tokenizer(_describe(tokenizer)):
        return ""
    return "llama.cpp has no name for the way in which its tokenizer cuts text, or it is no byte-level BPE"


def require_writable(config: Any, tokenizer: Any) -> None:
    """Raise UserError with the reason from `why_no_gguf`, if there is one."""
    if reason := why_no_gguf(config, tokenizer):
        raise UserError(f"no GGUF: {reason}", remedy=CONVERTER)


def write_gguf(model: Any, tokenizer: Any, path: Path, *, name: str, stop_id: int, kind: str) -> None:
    """Write the model to `path`; `stop_id` becomes the token that ends generation, `kind` is one of KINDS.

    Raises UserError with the reason from `why_no_gguf`.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    require_writable(model.config, tokenizer)
    types = GGMLQuantizationType
    wanted = {"gguf": types.F16, "int8": types.Q8_0, "int4": types.Q4_0}[kind]
    writer = GGUFWriter(path, "llama")
    writer.add_file_type(
        {
            "gguf": LlamaFileType.MOSTLY_F16,
            "int8": LlamaFileType.MOSTLY_Q8_0,
            "int4": LlamaFileType.MOSTLY_Q4_0,
        }[kind]
    )
    _add_shape(writer, model.config, name)
    _add_tokenizer(writer, tokenizer, model.config, stop_id)
    for key, weights in _tensors(model):
        # Vectors stay float32: they are small, and norms must not be rounded. Embeddings get at least 8 bits,
        # because they are also the output layer where both are tied.
        fit = types.F32 if weights.ndim == 1 else wanted if weights.shape[-1] % BLOCK == 0 else types.F16
        fit = types.Q8_0 if fit == types.Q4_0 and key in ("token_embd.weight", "output.weight") else fit
        writer.add_tensor(key, quants.quantize(weights, fit), raw_dtype=fit)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_gguf(folder: Path) -> Any:
    """Load the file in float32 with transformers' own reader, which shares no code with `write_gguf`."""
    import torch
    from transformers import AutoModelForCausalLM

    from ratchet.models.loading import device, quiet

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return model.to(device()).eval()


def _add_shape(writer: Any, config: Any, name: str) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: Any) -> Iterator[tuple[str, Array]]:
    """Yield (llama.cpp's name, float32 array) for each tensor. Raises UserError for an unknown tensor."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config, names = model.config, get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(key, try_suffixes=(".weight",))
        if target is None:
            raise UserError(f"no GGUF: llama.cpp has no place for the weights {key}", remedy=CONVERTER)
        weights = tensor.detach().float().cpu().numpy()
        if key.endswith("q_proj.weight"):
            weights = _permute(weights, config.num_attention_heads)
        elif key.endswith("k_proj.weight"):
            weights = _permute(weights, config.num_key_value_heads)
        yield target, np.ascontiguousarray(weights)


def _permute(weights: Array, heads: int) -> Array:
    """Reorder the rows of a query or key projection (heads · width, hidden) for llama.cpp's rotary positions.

    transformers rotates pairs of rows from the two halves of a head, llama.cpp pairs of neighbouring rows
    (see LlamaModel.permute in its convert_hf_to_gguf.py).
    """
    halves = weights.reshape(heads, 2, -1, weights.shape[1])  # (heads, 2, width / 2, hidden)
    return halves.swapaxes(1, 2).reshape(weights.shape)  # (heads · width, hidden)


# --- the tokenizer ---


def _describe(tokenizer: Any) -> Any:
    """Return the content of tokenizer.json; its keys depend on the type of each part."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pre_tokenizer(found: Any) -> str:
    """Return llama.cpp's name for this tokenizer's way to split and merge text, or "" if it has none."""
    name, model = _find_split(found), found["model"]
    other = model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return "" if other or bool(model.get("ignore_merges")) != (name in WHOLE_WORDS) else name


def _find_split(found: Any) -> str:
    """Return llama.cpp's name for the splitting of text before BPE, or ""."""
    cut = found.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    if (
        found.get("normalizer")
        or found["model"].get("type") != "BPE"
        or kinds[-1:] != ["ByteLevel"]
        or steps[-1].get("add_prefix_space")
    ):
        return ""
    by_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
        return "smollm"
    if (
        kinds == ["Split", "ByteLevel"]
        and not by_regex
        and steps[0].get("pattern", {}).get("Regex") == LLAMA3
    ):
        return "llama-bpe"
    return ""


def _add_tokenizer(writer: Any, tokenizer: Any, config: Any, stop_id: int) -> None:
    found, added = _describe(tokenizer), tokenizer.added_tokens_decoder
    named = {id: token for token, id in tokenizer.get_vocab().items()}
    ids = range(max(config.vocab_size, len(named)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(found))
    writer.add_token_list([named.get(id, f"[PAD{id}]") for id in ids])
    types = {id: NORMAL for id in named}
    types |= {id: CONTROL if token.special else USER_DEFINED for id, token in added.items()}
    writer.add_token_types([types.get(id, UNUSED) for id in ids])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    )
    writer.add_eos_token_id(stop_id)
    writer.add_eot_token_id(stop_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the template writes the whole prompt, a BOS token included
    writer.add_chat_template(_template(tokenizer, named[stop_id]))


def _template(tokenizer: Any, stop: str) -> str:
    """Return the chat template, which sets our special tokens if llama.cpp would pass others.

    llama.cpp passes the stop token as `eos_token`, and token 11 for a missing `bos_token`.
    """
    template = str(tokenizer.chat_template)
    ours = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
    theirs = {"bos_token": tokenizer.bos_token, "eos_token": stop}
    settings = [
        f"{{% set {name} = {json.dumps(ours[name])} %}}"
        for name in ours
        if name in template and ours[name] != theirs[name]
    ]
    return "".join(settings) + template
