"""What is trained on top of the base: one small builder a method (`adapter.method`); the optimisation is the same for all.

What each can and cannot is told in docs/training.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ratchet.config.training import AdapterConfig
from ratchet.errors import BaseModelError, ConfigError, RatchetError
from ratchet.files import read_json
from ratchet.models.loading import MANIFEST, WEIGHTS, is_full, load_adapter, load_base, load_full, quiet

LORA_FAMILY = ("lora", "qlora", "dora", "rslora")
PREFIXED = ("prefix", "prompt")  # these put virtual tokens before every row, so rows cannot share a window
FAMILIES = {
    "LORA": "lora",
    "IA3": "ia3",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
}  # PEFT's peft_type → ours
# What makes two adapters of a method the same shape: what the champion's has to share with the one that goes on from it.
SHAPE = {
    **dict.fromkeys(LORA_FAMILY, ("rank", "alpha", "dropout", "target_modules", "bias", "modules_to_save")),
    "ia3": ("target_modules", "modules_to_save"),
    **dict.fromkeys(PREFIXED, ("virtual_tokens",)),
    "full": (),
}


class Kind(NamedTuple):
    """What a trained version is, told by its files."""

    family: str  # "lora", "ia3", "prefix", "prompt" or "full"
    shares: bool  # a base in memory with others of its family
    mixes: bool  # a batch with others of its family


def read_kind(folder: Path) -> Kind:
    """Raises BaseModelError: an adapter_config.json that cannot be read, or a kind that nobody here trains.

    PEFT 0.21 refuses mixed batches with DoRA; with (IA)³ it lets them pass and gives every row the active adapter.
    """
    if is_full(folder):
        return Kind("full", shares=False, mixes=False)
    try:
        config = read_json(folder / "adapter_config.json")
        family = FAMILIES[config["peft_type"]]
        alone = (
            config.get("bias", "none") != "none"
            or bool(config.get("modules_to_save"))
            or bool(config.get("trainable_token_indices"))
        )
    except (RatchetError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelError(
            f"adapter_config.json of {folder.name} is of no kind that is known here: {error!r}",
            remedy="`ratchet retrain` makes another",
        ) from None
    shares = family in ("lora", "ia3") and not alone
    return Kind(family, shares=shares, mixes=shares and family == "lora" and not config.get("use_dora"))


def load_trainable(
    base: Path, start: Path | None, config: AdapterConfig, *, seed: int, in_parts: bool = False
) -> Any:
    """The model to train: `base` with a fresh adapter, or with the one of `start`; `in_parts` as in load_base. Raises BaseModelError, ConfigError."""
    if config.method == "full":
        return (
            load_full(start, training=True, in_parts=in_parts)
            if start
            else load_base(base, method="full", in_parts=in_parts)
        )
    model = load_base(base, method=config.method, quantisation=config.quantisation, in_parts=in_parts)
    if config.method == "qlora":
        model = prepare_quantised(model)
    if start and config.method in PREFIXED:
        return _put_virtual(add_adapter(model, config, seed=seed), start)
    if start:
        return load_adapter(model, start, trainable=True)
    return add_adapter(
        model,
        config,
        seed=seed,
        new_ids=[token["id"] for token in read_json(base / MANIFEST).get("new_tokens", [])],
    )


def _put_virtual(model: Any, start: Path) -> Any:
    """PEFT loads virtual tokens for inference alone."""
    import torch
    from safetensors.torch import load_file

    weight = model.prompt_encoder["default"].embedding.weight  # (virtual tokens, width)
    kept = load_file(start / WEIGHTS).get("prompt_embeddings")
    if kept is None or kept.shape != weight.shape:
        seen = "no prompt_embeddings" if kept is None else f"virtual tokens of shape {tuple(kept.shape)}"
        raise BaseModelError(
            f"the champion holds {seen}, wanted {tuple(weight.shape)}", remedy="set `train.start_from: base`"
        )
    with torch.no_grad():
        weight.copy_(kept)
    return model


def load_trained(base: Path, folder: Path, *, name: str = "default") -> Any:
    """A version to measure: the base in its method's precision with the adapter of `folder`, or the whole model that stands there."""
    if is_full(folder):
        return load_full(folder)
    return load_adapter(load_base(base, **base_settings(folder)), folder, name=name)


def share_a_base(one: Path, other: Path) -> bool:
    """Whether two versions can be adapters on one base in memory, each computing what it does alone."""
    kinds = {read_kind(one), read_kind(other)}
    return len(kinds) == 1 and next(iter(kinds)).shares and base_settings(one) == base_settings(other)


def can_be_switched_off(folder: Path) -> bool:
    """Whether the untouched base can be had from the loaded version: trained biases and whole modules stay in it, or PEFT only warns."""
    return read_kind(folder).shares


def virtual_tokens(folder: Path) -> int:
    """How many stand before every row; they count against the base's context."""
    kept = read_json(folder / MANIFEST).get("adapter", {})
    return int(kept["virtual_tokens"]) if kept.get("method") in PREFIXED else 0


def base_settings(folder: Path) -> dict[str, Any]:
    """How the base was loaded in the training of `folder`, for load_base."""
    kept = read_json(folder / MANIFEST).get("adapter", {}) if (folder / MANIFEST).exists() else {}
    if kept.get("method") != "qlora":
        return {"method": "lora", "quantisation": "nf4"}
    return {"method": "qlora", "quantisation": kept.get("quantisation", "nf4")}


def prepare_quantised(base: Any) -> Any:
    """A quantised base made ready for training: norms and embeddings in float32, its weights frozen."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]


def add_adapter(base: Any, config: AdapterConfig, *, seed: int, new_ids: Sequence[int] = ()) -> Any:
    """A fresh adapter on `base`, its weights drawn from `seed`; but for `prefix` and `prompt`, the model then computes what the base does.

    `new_ids`: tokens whose embeddings are trained as well.
    """
    from peft import get_peft_model
    from transformers import set_seed

    settings = BUILDERS[config.method](config)
    if new_ids:
        settings.trainable_token_indices = {name: list(new_ids) for name in _embeddings(base)}
    set_seed(seed)  # PEFT draws from torch's global generator
    with quiet():
        try:
            return get_peft_model(base, settings)
        except ValueError as error:
            raise ConfigError(
                f"`adapter` does not fit the base: {str(error).splitlines()[0]}",
                remedy="name modules that the base has in `adapter.target_modules`",
            ) from None


def _embeddings(base: Any) -> list[str]:
    """The names of the table that reads tokens and, where it is another, of the one that writes them."""
    reads, writes = base.get_input_embeddings(), base.get_output_embeddings()
    wanted = [reads] if reads.weight is writes.weight else [reads, writes]
    return [
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if any(module is table for table in wanted)
    ]


def _lora(config: AdapterConfig, **more: Any) -> Any:
    from peft import LoraConfig

    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "bias": config.bias,
        **_modules(config),
        **more,
    }
    return LoraConfig(task_type="CAUSAL_LM", **settings)


def _dora(config: AdapterConfig) -> Any:
    return _lora(config, use_dora=True)  # arXiv 2402.09353


def _rslora(config: AdapterConfig) -> Any:
    return _lora(config, use_rslora=True)  # arXiv 2312.03732


def _ia3(config: AdapterConfig) -> Any:
    """Each layer's output is scaled; none is taken for a feed-forward one, whose input is scaled instead (arXiv 2205.05638)."""
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM", feedforward_modules=[], **_modules(config))


def _prefix(config: AdapterConfig) -> Any:
    from peft import PrefixTuningConfig  # arXiv 2101.00190

    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens)


def _prompt(config: AdapterConfig) -> Any:
    from peft import PromptTuningConfig  # arXiv 2104.08691

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens)


def _modules(config: AdapterConfig) -> dict[str, Any]:
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return {"target_modules": targets, "modules_to_save": list(config.modules_to_save) or None}


BUILDERS: dict[str, Callable[[AdapterConfig], Any]] = {
    "lora": _lora,
    "qlora": _lora,
    "dora": _dora,
    "rslora": _rslora,
    "ia3": _ia3,
    "prefix": _prefix,
    "prompt": _prompt,
}


def save_trained(model: Any, base: Path, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """Safetensors and their config, without a path of this machine: it would be useless elsewhere, and would differ between equal runs.

    `weights`: the whole trained ones, where the model holds parts of them.
    """
    name = read_json(base / MANIFEST)["model"]
    if not hasattr(model, "peft_config"):
        import torch

        from ratchet.models.loading import precision

        model.config.name_or_path = name
        dtype = getattr(torch, precision("lora")[0])
        if weights is None:
            model = model.to(dtype)
        else:
            weights = {key: weight.to(dtype) for key, weight in weights.items()}
        # One file, so that one sum tells which weights they are.
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True, max_shard_size="10TB")
        return
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = name
    if isinstance(getattr(adapter, "target_modules", None), set):
        adapter.target_modules = sorted(
            adapter.target_modules
        )  # PEFT would write a set, in an order of its own in every process
    model.save_pretrained(
        folder, state_dict=weights, safe_serialization=True, save_embedding_layers=False
    )  # "auto" would ask the hub
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written with the gate's table


def check_start(theirs: dict[str, Any], config: AdapterConfig) -> None:
    """Raises BaseModelError: the champion's adapter, as its manifest describes it, is of another method or shape than the one asked for."""
    theirs = {**AdapterConfig().model_dump(mode="json"), **theirs}
    wanted = config.model_dump(mode="json")
    same_method = _loaded_as(theirs["method"]) == _loaded_as(config.method)
    keys = SHAPE[config.method] if same_method else ("method",)
    differing = [
        f"`{key}` {theirs.get(key)}, wanted {wanted[key]}" for key in keys if theirs.get(key) != wanted[key]
    ]
    if differing:
        raise BaseModelError(
            f"the champion's adapter has another shape: {', '.join(differing)}",
            remedy="set `adapter` as the champion has it, or `train.start_from: base`",
        )


def _loaded_as(method: str) -> str:
    """An adapter of `lora` fits a quantised base as well, and the other way round."""
    return "lora" if method == "qlora" else method


def check_context(base: Path, config: AdapterConfig, max_length: int) -> None:
    """Raises ConfigError: the longest row and the virtual tokens before it are more than the base takes."""
    context = read_json(base / MANIFEST).get("context")
    if config.method in PREFIXED and context and max_length + config.virtual_tokens > context:
        raise ConfigError(
            f"`tokenize.max_length` {max_length} and `adapter.virtual_tokens` {config.virtual_tokens} are {max_length + config.virtual_tokens} positions, the base has {context}",
            remedy="lower one of them",
        )
