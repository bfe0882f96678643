"""Base models and adapters on disk: what they are, whether they are whole, and how they are loaded.

`models/base/` always holds manifest.json, the tokenizer and the chat template; the weights are there too for `demo`, and
in the hub's cache for a hub id. Adapters are PEFT folders (safetensors). Nothing is unpickled, no remote code is run.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ratchet.config import AdapterConfig
from ratchet.errors import BaseModelError
from ratchet.files import read_json, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_base(folder: Path, *, method: str = "lora") -> PreTrainedModel:
    """The base in the precision that the machine and the method ask for (see `precision`). Raises BaseModelError."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    manifest = read_json(folder / MANIFEST)
    source, revision = (folder, None) if manifest["model"] == "demo" else (manifest["model"], manifest["revision"])
    settings: dict[str, Any] = {"dtype": getattr(torch, precision(method)[0]), "attn_implementation": "sdpa"}
    if method == "qlora":
        settings["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        settings["device_map"] = {"": device()}
    with quiet():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(source, revision=revision, trust_remote_code=False, local_files_only=True, use_safetensors=True, **settings)
        except OSError as error:
            raise BaseModelError(
                f"the weights of {manifest['model']}@{revision} are not on this machine: {str(error).splitlines()[0]}",
                remedy="dvc repro --force base (with network), or pull the cache",
            ) from None
    if method == "qlora":
        _keep_differentiable(model)
    return cast("PreTrainedModel", model if method == "qlora" else model.to(device()))


def _keep_differentiable(model: Any) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks NF4 weights at the first evaluation, for a kernel that has no backward pass and wants widths of 64.

    Training goes on all the same, with gradients that miss the base's part (cosine to the true ones: 0.88 in three layers).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def precision(method: str) -> tuple[str, str]:
    """(dtype, why). bfloat16 saves half the memory where the GPU computes in it; CPUs are exact and often faster in float32."""
    import torch

    if torch.cuda.is_available():
        return ("bfloat16", "the GPU computes in bfloat16") if torch.cuda.is_bf16_supported() else ("float16", "the GPU has no bfloat16")
    return ("bfloat16", "NF4 computes in bfloat16") if method == "qlora" else ("float32", "no GPU: float32 is exact and repeatable on a CPU")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_quantised(base: Any) -> Any:
    """A base in NF4 made ready for training: norms and embeddings in float32, its weights frozen."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]


def add_adapter(base: Any, config: AdapterConfig, *, seed: int) -> Any:
    """A fresh adapter on `base`, its weights drawn from `seed`; with it, the model computes what the base does."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": targets}
    set_seed(seed)  # PEFT draws from torch's global generator
    with quiet():
        return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def load_adapter(base: Any, folder: Path, *, name: str = "default", trainable: bool = False) -> Any:
    """`base` with the adapter of `folder`; PEFT's own loading accepts missing and foreign keys without a word, this one raises BaseModelError."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).exists():
        raise BaseModelError(f"{folder} holds no {WEIGHTS}", remedy="dvc pull brings what a training saved; pickled adapters are never loaded")
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
    return BaseModelError(f"{folder} does not fit the base: {what}", remedy="the adapter was trained on another base or with other target modules; set `train.start_from: base`")


def adapter_sha256(folder: Path) -> str:
    return sha256_file(folder / WEIGHTS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides notes of the libraries that nobody can act upon (missing optional kernels, deprecations of their own)."""
    loggers = [logging.getLogger(name) for name in ("transformers", "bitsandbytes", "peft", "torchao")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
