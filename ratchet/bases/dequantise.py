"""Make a base from one GGUF file: weights as floats in safetensors, config, tokenizer and chat template.

The file is read by transformers, which silently drops tensors that it has no place for (Llama 3's scaled
rotary positions, biases), and splits text like GPT-2 if it does not know the file's pre-tokenizer. Both cases
are refused here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from importlib.metadata import version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ratchet.bases.files import UNKNOWN, Source, first_line
from ratchet.errors import BaseModelError
from ratchet.files import require_space
from ratchet.models.gguf import FILE, WHOLE_WORDS, require_gguf
from ratchet.models.loading import check_complete, quiet

# Values of `tokenizer.ggml.pre` with which llama.cpp splits text as GPT-2 does, and those with which it first
# separates each digit (llama-vocab.cpp, `llama_vocab_pre_type`).
LIKE_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo")
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
ELSEWHERE = "take the model's own folder with safetensors"


class Dequantised(NamedTuple):
    """What the file says about itself; `kind` is its type of quantisation (`Q4_K_M`, `F16` …)."""

    kind: str
    lossy: bool  # the weights were rounded to fewer than 16 bits
    name: str
    licence: str


def dequantise(source: Source, folder: Path) -> Dequantised:
    """Write the base to `folder`. Raises BaseModelError if the file cannot be read faithfully."""
    require_gguf()
    header, metadata = _read_head(source)
    dtype = _dtype(header)
    require_space(folder, 2 * sum(prod(info.shape) for info in header.tensors), "the base as floats")
    with TemporaryDirectory(prefix="ratchet-gguf-") as alone:
        # In a folder of its own: transformers would also read a tokenizer_config.json beside the file.
        (Path(alone) / FILE).symlink_to(source.path.resolve())
        tokenizer = _read_tokenizer(source, metadata, Path(alone))
        model = _load(source, dtype, Path(alone))
    _check_used(source, model, header)
    with quiet():
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return Dequantised(
        _kind(metadata, header),
        header.has_quantized_weights,
        str(metadata.get("general.name") or ""),
        str(metadata.get("general.license") or UNKNOWN),
    )


def _read_head(source: Source) -> tuple[Any, dict[str, Any]]:
    """Return the header with the table of tensors, and the metadata. Raises BaseModelError."""
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(source.path))
        header = GgufHeader.from_file(str(source.path))
    except Exception as error:  # noqa: BLE001  (a truncated file raises any error of struct, numpy, utf-8)
        raise BaseModelError(
            f"{source.told} is no GGUF file that transformers {version('transformers')} can read: "
            f"{type(error).__name__}: {str(error)[:300]}",
            remedy=source.remedy,
        ) from None
    end = max((header.data_start + info.offset + info.nbytes for info in header.tensors), default=0)
    if (size := source.path.stat().st_size) < end:
        raise BaseModelError(
            f"{source.told} has {size:,} bytes, but its header describes {end:,}: the file is cut off",
            remedy=source.remedy,
        )
    if (parts := int(metadata.get("split.count") or 1)) > 1:
        raise BaseModelError(
            f"{source.told} is one of {parts} parts, wanted one file",
            remedy="join them: llama-gguf-split --merge FIRST_PART model.gguf",
        )
    return header, metadata


def _dtype(header: Any) -> Any:
    """Return the file's float type, or float16 for quantised blocks, whose scales are float16.

    Rounding the product of scale and level to float16 changes it by 2^-11 at most, relative to itself; the
    rounding of the quantisation is about a tenth.
    """
    import torch

    return header.dtype or torch.float16


def _kind(metadata: dict[str, Any], header: Any) -> str:
    from gguf import GGMLQuantizationType, LlamaFileType

    try:
        return LlamaFileType(metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):  # not every program writes this key
        matrices = Counter(info.ggml_type for info in header.tensors if len(info.shape) > 1)
        return GGMLQuantizationType(matrices.most_common(1)[0][0]).name


def _load(source: Source, dtype: Any, alone: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=FILE,
                quantization_config=GgufConfig(dequantize=True),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, NotImplementedError, KeyError, OSError, RuntimeError, IndexError, TypeError) as error:
        raise BaseModelError(
            f"{source.told} is a GGUF file that transformers {version('transformers')} cannot load: "
            f"{first_line(error)}",
            remedy=ELSEWHERE,
        ) from None
    model, found = loaded
    check_complete(found["missing_keys"], source.told)
    if left := found["unexpected_keys"]:
        raise _left_out(source, left)
    if odd := [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]:
        raise BaseModelError(
            f"{source.told} holds {len(odd)} weights that are not finite in {dtype}, the first {odd[0]}",
            remedy=ELSEWHERE,
        )
    return model


def _check_used(source: Source, model: Any, header: Any) -> None:
    """Refuse a file with tensors that the model has no place for: the model would compute something else.

    The newer reader of transformers reports such tensors; the older one, used for most architectures, does
    not. The numbers of weights are compared first, since looking the names up takes as long as loading.
    """
    from transformers.integrations.gguf.utils import is_gguf_arch_supported
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    held = {weight.data_ptr(): weight.numel() for weight in model.state_dict().values()}
    in_file = sum(prod(info.shape) for info in header.tensors)
    if is_gguf_arch_supported(header.architecture) or sum(held.values()) == in_file:
        return
    kind: Any = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)
    find: Any = get_gguf_hf_weights_map
    if left := {info.name for info in header.tensors} - set(find(model, kind(config=model.config.to_dict()))):
        raise _left_out(source, left)


def _left_out(source: Source, names: Collection[str]) -> BaseModelError:
    return BaseModelError(
        f"{source.told} holds {len(names)} tensors that transformers {version('transformers')} leaves out, "
        f"the first {min(names)}: the model would compute something else",
        remedy=ELSEWHERE,
    )


def _read_tokenizer(source: Source, metadata: dict[str, Any], alone: Path) -> Any:
    """Load the tokenizer with the pre-tokenizer that the file names. Raises BaseModelError."""
    from transformers import AutoTokenizer

    pre = str(metadata.get("tokenizer.ggml.pre") or "")
    by_bytes = metadata.get("tokenizer.ggml.model") == "gpt2"
    if by_bytes and not _is_known(pre):
        raise BaseModelError(
            f"{source.told} splits text by {pre or 'an unnamed way'!r}, which transformers "
            f"{version('transformers')} cannot follow: words would become other tokens than in its training",
            remedy=ELSEWHERE,
        )
    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                alone,
                gguf_file=FILE,
                local_files_only=True,
                trust_remote_code=False,
            )
    except (ValueError, OSError, KeyError, TypeError, NotImplementedError) as error:
        raise BaseModelError(
            f"{source.told} has no tokenizer that transformers {version('transformers')} can read: "
            f"{first_line(error)}",
            remedy=ELSEWHERE,
        ) from None
    if by_bytes:
        _correct_splits(tokenizer.backend_tokenizer, pre)
    return tokenizer


def _is_known(pre: str) -> bool:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return pre in (*LIKE_GPT2, *DIGIT_BY_DIGIT, *GGUF_PRE_TOKENIZER_SPLITS)


def _correct_splits(backend: Any, pre: str) -> None:
    """Split as llama.cpp does, unlike transformers: separate digits, take whole words without merging."""
    from tokenizers import pre_tokenizers

    if pre in DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre in WHOLE_WORDS:
        backend.model.ignore_merges = True
