"""Load base models and adapters from disk, and check that they are complete.

`models/base/` always contains manifest.json, the tokenizer and the chat template. It also contains the
weights, except for a hub id, whose weights are in the hub's cache. Adapters are PEFT folders (safetensors).
No pickles are loaded, and no remote code is run.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ratchet.errors import BaseModelError, ConfigError
from ratchet.files import sha256_file
from ratchet.models.chat_template import NO_MEDIA, ChatFormat
from ratchet.models.manifests import MANIFEST as MANIFEST
from ratchet.models.manifests import NewToken, read_base_manifest, read_ends
from ratchet.models.processors import load_processor, reads_media

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
WHOLE = "model.safetensors"  # instead of an adapter, if all weights were trained


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_chat(folder: Path, media: Mapping[str, bytes] = NO_MEDIA) -> ChatFormat:
    """Load tokenizer, chat template, end tokens and processor of media of a base or a version.

    `media` has the pictures and recordings of rows, by name. Raises BaseModelError as `ChatFormat` does.
    """
    return ChatFormat(load_tokenizer(folder), read_ends(folder), load_processor(folder), media)


def _source(folder: Path) -> tuple[Any, str | None]:
    """Return the folder or hub id of the base's weights, and the revision of a hub id."""
    manifest = read_base_manifest(folder)
    return (manifest.model, manifest.revision) if manifest.revision else (folder, None)


def read_model_config(folder: Path) -> Any:
    """Read the configuration of a base's model, without its weights."""
    from transformers import AutoConfig

    place, revision = _source(folder)
    return AutoConfig.from_pretrained(
        place, revision=revision, trust_remote_code=False, local_files_only=True
    )


class Checkpoint(NamedTuple):
    """What a checkpoint says in addition to its weights."""

    missing: list[str]  # weights of the model that the checkpoint lacks, or has in another shape
    unexpected: list[str]  # weights of the checkpoint that the model has no place for
    generation: dict[str, Any]  # generation settings in its generation_config.json and its config


def load_base(
    folder: Path, *, method: str = "lora", quantisation: str = "nf4", in_parts: bool = False
) -> PreTrainedModel:
    """Load the base in the precision that suits machine and method (see `precision`). Raises BaseModelError.

    `quantisation` applies only to `qlora`. `in_parts` prepares the model for sharding among processes: unless
    quantised it stays on the CPU, so that no GPU has to hold all of it.
    """
    attention = read_base_manifest(folder).attention
    model, _ = load_checkpoint(
        folder,
        attention=attention,
        method=method,
        quantisation=quantisation,
        in_parts=in_parts,
    )
    return model


def load_checkpoint(
    folder: Path,
    *,
    attention: str | None = None,
    method: str = "lora",
    quantisation: str = "nf4",
    in_parts: bool = False,
) -> tuple[PreTrainedModel, Checkpoint]:
    """Load the base as `load_base` does, and return it with the other facts of its checkpoint.

    Without `attention` the model gets the fastest implementation that its class supports. Raises
    BaseModelError.
    """
    import torch

    manifest = read_base_manifest(folder)
    source, revision = _source(folder)
    settings: dict[str, Any] = {
        "dtype": getattr(torch, precision(method)[0]),
        "attn_implementation": attention,
        "revision": revision,
    }
    if method == "qlora":
        kept = _kept_exact(folder) if reads_media(folder) else None
        settings |= {
            "quantization_config": _quantised(quantisation, kept, in_parts=in_parts),
            "device_map": {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"},
        }
    try:
        model, checkpoint = _load(source, media=reads_media(folder), **settings)
    except OSError as error:
        raise BaseModelError(
            f"the weights of {manifest.told} are not on this machine: {str(error).splitlines()[0]}",
            remedy="dvc repro --force base (with network), or pull the cache",
        ) from None
    check_complete(checkpoint.missing, manifest.told)
    if method == "qlora":
        _keep_differentiable(model)
    _add_embeddings(model, manifest.new_tokens)
    return model if method == "qlora" or in_parts else model.to(device()), checkpoint


def load_hub(name: str, revision: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from the hub's cache. Raises BaseModelError."""
    import torch
    from transformers import AutoTokenizer

    try:
        model, _ = _load(name, dtype=getattr(torch, precision("lora")[0]), revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False, local_files_only=True
        )
    except OSError as error:
        raise BaseModelError(
            f"{name}@{revision} is not on this machine: {str(error).splitlines()[0]}",
            remedy=f"with network: hf download {name} --revision {revision}",
        ) from None
    return cast("PreTrainedModel", model.to(device())), tokenizer


def load_full(folder: Path, *, training: bool = False, in_parts: bool = False) -> PreTrainedModel:
    """Load the whole model that `adapter.method: full` wrote; `in_parts`: see `load_base`.

    Raises BaseModelError for missing weights, which transformers would initialise at random, with a warning.
    """
    import torch

    try:
        dtype = getattr(torch, precision("full" if training else "lora")[0])
        model, found = _load(folder, media=reads_media(folder), dtype=dtype)
    except (OSError, RuntimeError, ValueError) as error:
        raise BaseModelError(
            f"{folder} holds no whole model: {str(error).splitlines()[0]}",
            remedy="dvc pull brings what a training saved",
        ) from None
    if odd := sorted([*found.missing, *found.unexpected]):
        raise _misfit(folder, f"{len(odd)} weights differ, the first {odd[0]}")
    return cast("PreTrainedModel", model if in_parts else model.to(device()))


def auto_class(*, media: bool) -> Any:
    """Return the class of transformers that loads a causal language model, or one of pictures or sound."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if media else AutoModelForCausalLM


def _load(source: Any, *, media: bool = False, **settings: Any) -> tuple[Any, Checkpoint]:
    """Load a model, and replace its own generation settings by the defaults.

    Settings such as repetition_penalty or min_new_tokens would change answers of `generate` in the
    evaluation, but not in other programs that serve the model.
    """
    from transformers import GenerationConfig

    with quiet():
        loaded: Any = auto_class(media=media).from_pretrained(
            source,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    model, found = loaded
    generation = {"eos_token_id": model.config.get_text_config().eos_token_id}
    generation |= {
        key: value
        for key, value in (model.generation_config.to_diff_dict() if model.generation_config else {}).items()
        if value is not None
    }
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    missing = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    return model, Checkpoint(sorted(missing), sorted(found["unexpected_keys"]), generation)


def check_complete(missing: Collection[str], told: str) -> None:
    """Raise BaseModelError if weights are missing, which transformers initialises at random."""
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        raise BaseModelError(
            f"{told} lacks {len(missing)} of its weights, or has them in another shape: {some}; "
            "they would be random",
            remedy="take a checkpoint that is whole, and of a causal language model",
        )


def _add_embeddings(model: Any, new_tokens: list[NewToken]) -> None:
    """Add input and output embeddings for `base.new_tokens`: each is the mean of its pieces' embeddings."""
    if not new_tokens:
        return
    import torch

    if (rows := 1 + max(token.id for token in new_tokens)) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        # If both tables are tied, the second pass writes the same values again.
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for token in new_tokens:
                table[token.id] = table[token.pieces].mean(0)  # (width)


def _kept_exact(folder: Path) -> list[str]:
    """Return the modules of a base with pictures that are not quantised: tower, projector, output layer.

    They are small beside the language model, and what a picture shows should not depend on rounding.
    """
    import torch
    from transformers.quantizers.base import get_keys_to_not_convert

    with torch.device("meta"):
        bare = auto_class(media=True).from_config(read_model_config(folder), trust_remote_code=False)
    outside = outside_language(bare) or "(?!)"
    found = {
        name
        for name, module in bare.named_modules()
        if re.fullmatch(outside, name) and isinstance(module, torch.nn.Linear)
    }
    return sorted({*found, *get_keys_to_not_convert(bare)})


def _quantised(kind: str, kept: list[str] | None, *, in_parts: bool) -> Any:
    """Return bitsandbytes' settings; for FSDP, which shards only floating types, NF4 is stored in one.

    `kept`: names of modules that are not quantised; None: the output layer.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16 if in_parts else torch.uint8,
    )


def _keep_differentiable(model: Any) -> None:
    """Prevent that NF4 weights are repacked for a kernel without a backward pass, which needs widths of 64.

    bitsandbytes 0.50 repacks them at the first evaluation on CPUs with AVX512-BF16. Training would then go on
    with gradients that lack the base's part (cosine to the true ones in three layers: 0.88).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def precision(method: str) -> tuple[str, str]:
    """Return (dtype of the base's weights, the reason).

    Half precision halves the memory on a GPU; a CPU is exact, and often faster, in float32.
    """
    import torch

    if torch.cuda.is_available() and method == "full":
        return (
            "float32",
            "the weights that an optimizer moves stay float32; the GPU computes in half precision",
        )
    if torch.cuda.is_available():
        return _half_of_gpu()
    if method == "qlora":
        return "bfloat16", "a quantised base computes in bfloat16"
    return "float32", "no GPU: float32 is exact and repeatable on a CPU"


def _half_of_gpu() -> tuple[str, str]:
    import torch

    if torch.cuda.is_bf16_supported():
        return "bfloat16", "the GPU computes in bfloat16"
    return "float16", "the GPU has no bfloat16"


def compute_dtype(setting: str) -> tuple[str, str]:
    """Return (dtype of the forward and backward passes for `train.precision`, the reason).

    Raises ConfigError if the machine cannot compute in this type.
    """
    import torch

    if torch.cuda.is_available():
        best, why = _half_of_gpu()
        able = {"float32", "float16", best}
    elif torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        best, why = "bfloat16", "this CPU computes in it, twice as fast as in float32"
        able = {"float32", "bfloat16"}
    else:
        best, why, able = "float32", "this CPU has no instructions for bfloat16", {"float32", "bfloat16"}
    if setting == "auto":
        return best, why
    if setting not in able:
        raise ConfigError(
            f"this machine cannot compute in `train.precision: {setting}`; "
            f"it can in {', '.join(sorted(able))}",
            remedy="set `train.precision: auto`",
        )
    return setting, "`train.precision` asks for it"


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def without_adapter(model: Any) -> Any:
    """Return the model of transformers, unwrapped if PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers_of(model: Any) -> list[Any]:
    """Return the decoder layers, found by the class names that transformers never splits over devices."""
    base = without_adapter(model)
    return [module for module in base.modules() if type(module).__name__ in base._no_split_modules]


def language_model(base: Any) -> str | None:
    """Return the name of the language model inside one that sees or hears; None for a text model."""
    if not has_tower(base):
        return None
    decoder = base.get_decoder()
    return next(str(name) for name, module in base.named_modules() if module is decoder)


def has_tower(base: Any) -> bool:
    """Tell whether a model reads pictures or recordings, with a tower of its own."""
    return any(getattr(base.config, name, None) is not None for name in ("vision_config", "audio_config"))


def outside_language(base: Any) -> str | None:
    """Return a pattern of the modules that see or hear (tower and projector); None for a text model."""
    if (inside := language_model(base)) is None:
        return None
    head = base.get_output_embeddings()
    kept = [inside, *(name for name, module in base.named_modules() if module is head)]
    return rf"(?!(?:{'|'.join(map(re.escape, kept))})(?:\.|$)).*"


def load_adapter(base: Any, folder: Path, *, name: str = "default", trainable: bool = False) -> Any:
    """Return `base` with the adapter in `folder`.

    Raises BaseModelError for missing and unknown keys, which PEFT accepts silently.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).exists():
        whole = " but a whole model" if (folder / WHOLE).exists() else ""
        raise BaseModelError(
            f"{folder} holds no {WEIGHTS}{whole}",
            remedy="dvc pull brings what a training saved; pickled adapters are never loaded",
        )
    wanted = set(load_file(folder / WEIGHTS))
    try:
        with quiet():
            if isinstance(base, PeftModel):
                base.load_adapter(folder, adapter_name=name, is_trainable=trainable)
                model = base
            else:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=trainable)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise _misfit(folder, str(error).splitlines()[1].strip()) from None
    loaded = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    if odd := sorted(loaded ^ wanted):
        raise _misfit(folder, f"{len(odd)} weights differ, the first {odd[0]}")
    return model


def _misfit(folder: Path, what: str) -> BaseModelError:
    return BaseModelError(
        f"{folder} does not fit the base: {what}",
        remedy="the adapter was trained on another base or with other target modules; "
        "set `train.start_from: base`",
    )


def weights_file(folder: Path) -> Path:
    """Return the weight file of a version: an adapter, or the whole model of `adapter.method: full`.

    Raises BaseModelError if there is neither, or both.
    """
    found = [folder / name for name in (WEIGHTS, WHOLE) if (folder / name).exists()]
    if len(found) != 1:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        names = ", ".join(path.name for path in paths[:6]) if folder.is_dir() else "nothing"
        raise BaseModelError(
            f"{folder.name} holds {names}; wanted one of {WEIGHTS} and {WHOLE}",
            remedy="dvc pull, or ratchet retrain makes it anew",
        )
    return found[0]


def is_full(folder: Path) -> bool:
    return (folder / WHOLE).exists() and not (folder / WEIGHTS).exists()


def adapter_sha256(folder: Path) -> str:
    """Return the sha256 of the trained weights, for any method."""
    return sha256_file(weights_file(folder))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide libraries' warnings on which no user can act: missing optional kernels, their own deprecations."""
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "peft", "torchao")]
    levels = [logger.level for logger in loggers]
    try:
        _set_levels(loggers, [logging.ERROR] * len(loggers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _set_levels(loggers, levels)


def _set_levels(loggers: list[logging.Logger], levels: list[int]) -> None:
    """Set the levels, if they differ from the present ones.

    `setLevel` clears the caches of all loggers, thousands of them (1 to 3 ms), so it is called only once.
    """
    if levels != [logger.level for logger in loggers]:
        for logger, level in zip(loggers, levels, strict=True):
            logger.level = level
        loggers[-1].setLevel(levels[-1])
