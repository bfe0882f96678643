"""Build, load and save the weights that are trained on top of the base, for each `adapter.method`.

docs/training.md says what each method can and cannot do.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.config.training import AdapterConfig
from ratchet.errors import BaseModelError, ConfigError, RatchetError
from ratchet.files import read_json, sha256_file, write_json
from ratchet.models.loading import (
    WEIGHTS,
    adapter_sha256,
    is_full,
    language_model,
    load_adapter,
    load_base,
    load_chat,
    load_full,
    outside_language,
    precision,
    quiet,
)
from ratchet.models.manifests import (
    MANIFEST,
    AdapterRecord,
    BaseName,
    read_base_manifest,
    read_trained_manifest,
    write_generation,
)
from ratchet.models.processors import copy_processor

if TYPE_CHECKING:
    from torch import Tensor

LORA_FAMILY = ("lora", "qlora", "dora", "rslora")
PREFIXED = ("prefix", "prompt")  # they put virtual tokens before every row, so rows cannot share a window
ALL_LINEAR = "all-linear"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
RESIDUAL = "residual"  # a second adapter beside the one that is trained, and the folder inside it
# Names of the layers that turn a picture's features into tokens, as transformers gives them.
PROJECTOR = re.compile(
    r"(?:^|\.)(?:multi_modal_projector|mm_projector|connector|merger|deepstack_merger_list)$"
)
# Names by which PEFT recognises the layers of experts and routers, wherever they are in the model.
EXPERT_NAMES = ("gate", "router", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj")
# PEFT's peft_type → our family
FAMILIES = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
SEEING = ("projector", "tower")
# Keys of `adapter` that have to be equal if a training starts from the champion's adapter.
SHAPE = {
    **dict.fromkeys(
        LORA_FAMILY, ("rank", "alpha", "dropout", "target_modules", "bias", "modules_to_save", *SEEING)
    ),
    "ia3": ("target_modules", "modules_to_save"),
    **dict.fromkeys(PREFIXED, ("virtual_tokens",)),
    "full": (),
}


class Kind(NamedTuple):
    """The kind of a trained version, which decides how it can be served."""

    family: str  # "lora", "ia3", "prefix", "prompt" or "full"
    shares: bool  # whether versions of this family can share a base in memory
    mixes: bool  # whether versions of this family can share a batch


def read_kind(folder: Path) -> Kind:
    """Return the kind of the version in `folder`.

    PEFT 0.21 refuses mixed batches with DoRA. With (IA)³ it accepts them, but applies the active adapter to
    every row. Raises BaseModelError: adapter_config.json cannot be read, or names a kind unknown here.
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
    # Rows of a mixed batch have an adapter each, and the pictures of a batch do not stand in rows.
    mixes = shares and family == "lora" and not config.get("use_dora") and not _updates_seeing(folder)
    return Kind(family, shares=shares, mixes=mixes)


def _updates_seeing(folder: Path) -> bool:
    kept = _record_of(folder)
    return "lora" in (kept.projector, kept.tower)


def _record_of(folder: Path) -> AdapterRecord:
    return read_trained_manifest(folder).adapter if (folder / MANIFEST).exists() else AdapterRecord()


def load_trainable(
    base: Path, start: Path | None, config: AdapterConfig, *, seed: int, in_parts: bool = False
) -> Any:
    """Return the model to train: `base` with a new adapter, or with the adapter in `start`.

    With `full` it is the base itself, or the whole model in `start`. `in_parts`: see `load_base`. Raises
    BaseModelError, ConfigError.
    """
    if config.method == "full" and start:
        return freeze_outside(load_full(start, training=True, in_parts=in_parts), config)
    if config.method == "full":
        return freeze_outside(load_base(base, method="full", in_parts=in_parts), config)
    model = load_base(base, method=config.method, quantisation=config.quantisation, in_parts=in_parts)
    if config.method == "qlora":
        model = prepare_quantised(model)
    if start and config.method in PREFIXED:
        return _copy_virtual_tokens(add_adapter(model, config, seed=seed), start)
    if start:
        model = load_adapter(model, start, trainable=True)
        return _add_residual(model, start / RESIDUAL) if (start / RESIDUAL).exists() else model
    new_ids = [token.id for token in read_base_manifest(base).new_tokens]
    return add_adapter(model, config, seed=seed, new_ids=new_ids)


def _add_residual(model: Any, folder: Path) -> Any:
    """Put a second adapter on the model that takes part in its answers and is not trained.

    Federated training keeps in it what the factors of the nodes' mean update miss (`ratchet.federation`).
    """
    load_adapter(model, folder, name=RESIDUAL)
    model.base_model.set_adapter(["default", RESIDUAL])
    for name, weight in model.named_parameters():
        if f".{RESIDUAL}." in name:
            weight.requires_grad_(False)
    return model


def freeze_factor(model: Any, trained: str) -> None:
    """Train one of the two factors of every update alone: `trained` is "up" (B) or "down" (A)."""
    frozen = {"up": ".lora_A.", "down": ".lora_B."}[trained]
    for name, weight in model.named_parameters():
        if frozen in name:
            weight.requires_grad_(False)


def _copy_virtual_tokens(model: Any, start: Path) -> Any:
    """Copy the virtual tokens of `start` into the model, since PEFT loads them for inference only.

    Raises BaseModelError if there are none, or they have another shape.
    """
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
    """Load the version in `folder`: a whole model, or its adapter on the base as its training loaded it."""
    if is_full(folder):
        return load_full(folder)
    return load_adapter(load_base_of(base, folder), folder, name=name)


def share_a_base(one: Path, other: Path) -> bool:
    """Return whether two versions can share one base in memory and compute the same as alone."""
    kinds = {read_kind(one), read_kind(other)}
    return len(kinds) == 1 and next(iter(kinds)).shares and base_settings(one) == base_settings(other)


def can_be_switched_off(folder: Path) -> bool:
    """Return whether disabling the adapter gives the untouched base.

    Trained biases and whole modules stay in effect when PEFT disables an adapter, at most with a warning.
    """
    return read_kind(folder).shares


def virtual_tokens(folder: Path) -> int:
    """Return the number of virtual tokens before every row; they count towards the base's context."""
    kept = read_trained_manifest(folder).adapter
    return kept.virtual_tokens if kept.method in PREFIXED else 0


class BaseSettings(NamedTuple):
    """The arguments of `load_base` that a version needs."""

    method: str = "lora"
    quantisation: str = "nf4"


def base_settings(folder: Path) -> BaseSettings:
    """Return how the base was loaded when the version in `folder` was trained."""
    kept = _record_of(folder)
    return BaseSettings("qlora", kept.quantisation) if kept.method == "qlora" else BaseSettings()


def load_base_of(base: Path, folder: Path) -> Any:
    """Load the base as the training of the version in `folder` did. Raises BaseModelError."""
    settings = base_settings(folder)
    return load_base(base, method=settings.method, quantisation=settings.quantisation)


def prepare_quantised(base: Any) -> Any:
    """Prepare a quantised base for training: norms and embeddings in float32, its weights frozen."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
        base, use_gradient_checkpointing=False
    )


def add_adapter(base: Any, config: AdapterConfig, *, seed: int, new_ids: Sequence[int] = ()) -> Any:
    """Put a new adapter on `base`, initialised from `seed`; the embeddings of `new_ids` are trained too.

    Except with `prefix` and `prompt`, the model first computes the same as the base. Raises ConfigError.
    """
    from peft import get_peft_model
    from transformers import set_seed

    settings = BUILDERS[config.method](config)
    if getattr(settings, "target_modules", None) == ALL_LINEAR:
        settings.target_modules = linear_modules(base)
    if outside := outside_language(base):
        check_pictures(config)
        settings.exclude_modules = outside
        _add_seeing_parts(settings, base, config)
    if new_ids:
        settings.trainable_token_indices = {name: list(new_ids) for name in _embeddings(base)}
    set_seed(seed)  # PEFT draws from torch's global generator
    with quiet():
        try:
            model = get_peft_model(base, settings)
        except ValueError as error:
            raise ConfigError(
                f"`adapter` does not fit the base: {str(error).splitlines()[0]}",
                remedy="name modules that the base has in `adapter.target_modules`",
            ) from None
    if experts := getattr(model.peft_config["default"], "target_parameters", None):
        raise ConfigError(
            f"`adapter.target_modules` reaches routers or experts ({', '.join(sorted(experts))}), which "
            "are no layers by themselves and cannot be served as an adapter",
            remedy="name attention layers, or `all-linear`, which leaves them out",
        )
    return model


def seeing_parts(base: Any) -> SeeingParts | None:
    """Return what of a model sees pictures; None for a text model. Raises ConfigError: no projector is found.

    A projector is known by the names that transformers gives it, since no model tells which it is.
    """
    if (outside := outside_language(base)) is None:
        return None
    modules = {name: module for name, module in base.named_modules() if re.fullmatch(outside, name)}
    projectors = [name for name in modules if PROJECTOR.search(name)]
    if not projectors:
        raise ConfigError(
            f"{type(base).__name__} has no projector of a name that is known here",
            remedy="set `adapter.projector` and `adapter.tower` to frozen",
        )
    # PEFT trains no list of modules whole, but each of its members.
    lists = [name for name in projectors if type(modules[name]).__name__ == "ModuleList"]
    projectors = [name for name in projectors if name not in lists] + [
        name for name in modules if name.rpartition(".")[0] in lists
    ]
    inside = re.compile(rf"(?:{'|'.join(map(re.escape, projectors))})(?:\..*)?")
    linear = [name for name, module in modules.items() if _is_linear(module)]
    return SeeingParts(
        projectors=projectors,
        projector_layers=[name for name in linear if inside.fullmatch(name)],
        tower_layers=[name for name in linear if not inside.fullmatch(name)],
        is_projector=inside,
    )


class SeeingParts(NamedTuple):
    """Tower and projector of a model that reads pictures, by the names of their modules."""

    projectors: list[str]
    projector_layers: list[str]  # linear ones
    tower_layers: list[str]
    is_projector: re.Pattern[str]  # names of modules and weights in the projector


def freeze_outside(base: Any, config: AdapterConfig) -> Any:
    """Freeze what `adapter.projector` and `adapter.tower` say of a model that `full` trains."""
    outside = outside_language(base)
    if outside is None or (config.projector, config.tower) == ("whole", "whole"):
        return base
    bare = (config.projector, config.tower) == ("frozen", "frozen")
    parts = None if bare else seeing_parts(base)
    for name, weight in base.named_parameters():
        if re.fullmatch(outside, name):
            key = "projector" if parts and parts.is_projector.fullmatch(name) else "tower"
            weight.requires_grad_(requires_grad=getattr(config, key) == "whole")
    return base


def _add_seeing_parts(settings: Any, base: Any, config: AdapterConfig) -> None:
    """Add to PEFT's settings what is trained of tower and projector. Raises ConfigError."""
    if (config.projector, config.tower) == ("frozen", "frozen"):
        return
    parts = seeing_parts(base)
    assert parts
    updated: list[str] = []
    for key, layers in (("projector", parts.projector_layers), ("tower", parts.tower_layers)):
        if getattr(config, key) == "lora":
            if not layers:
                raise ConfigError(
                    f"`adapter.{key}: lora`: this base's {key} has no linear layers",
                    remedy=f"set `adapter.{key}: frozen`" + " or `whole`" * (key == "projector"),
                )
            updated += layers
    if updated:
        names = "|".join(map(re.escape, updated))
        if isinstance(settings.target_modules, str):
            settings.target_modules = f"(?:{settings.target_modules})|{names}"
        else:
            settings.target_modules = [*settings.target_modules, *updated]
        settings.exclude_modules = f"(?!(?:{names})$)(?:{settings.exclude_modules})"
    if config.projector == "whole":
        settings.modules_to_save = [*(settings.modules_to_save or []), *parts.projectors]


def check_pictures(config: AdapterConfig) -> None:
    """Raise ConfigError for a method that cannot be trained on a base that reads pictures or sound."""
    if config.method in PREFIXED:
        raise ConfigError(
            f"`adapter.method: {config.method}` puts virtual tokens before the embeddings, where a model "
            "that reads pictures or sound finds no places for them",
            remedy="set `adapter.method: lora`",
        )


def linear_modules(base: Any) -> str | list[str]:
    """Return what `all-linear` means for this base: PEFT's own meaning, with two exceptions.

    In a model that sees or hears it means the linear layers of the language model. In a mixture of experts
    it means the linear layers outside of the blocks with experts. PEFT 0.21 would also train routers
    and the experts' joint 3-D weights, which no engine serves as an adapter (peft issue 3009).
    """
    blocks = [
        name.rpartition(".")[0] for name, module in base.named_modules() if _holds_experts(name, module)
    ]
    inside_language = language_model(base)
    if not blocks and inside_language is None:
        return ALL_LINEAR
    found: dict[bool, set[str]] = {True: set(EXPERT_NAMES if blocks else ()), False: set()}
    for name, module in base.named_modules():
        if inside_language is not None and not name.startswith(f"{inside_language}."):
            continue
        if _is_linear(module) and module is not base.get_output_embeddings():
            inside = any(name.startswith(f"{block}.") for block in blocks)
            found[inside].add(name.rpartition(".")[2])
    return sorted(found[False] - found[True])


def _holds_experts(name: str, module: Any) -> bool:
    stacked = any(weight.ndim == 3 for weight in module._parameters.values() if weight is not None)
    return name.endswith(".experts") or (stacked and not type(module).__name__.startswith("Conv"))


def _is_linear(module: Any) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (torch.nn.Linear, Conv1D))


def _embeddings(base: Any) -> list[str]:
    """Return the module names of the input embeddings and, if not tied to them, the output embeddings."""
    reads, writes = base.get_input_embeddings(), base.get_output_embeddings()
    wanted = [reads] if reads.weight is writes.weight else [reads, writes]
    return [
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if any(module is table for table in wanted)
    ]


def _lora(config: AdapterConfig, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes floats as well
        lora_dropout=config.dropout,
        bias=config.bias,
        **_modules(config),
        **more,
    )


def _dora(config: AdapterConfig) -> Any:
    return _lora(config, use_dora=True)  # arXiv 2402.09353


def _rslora(config: AdapterConfig) -> Any:
    return _lora(config, use_rslora=True)  # arXiv 2312.03732


def _ia3(config: AdapterConfig) -> Any:
    """Configure (IA)³ to scale each layer's output.

    By default it scales the input of feed-forward layers (arXiv 2205.05638).
    """
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


def save_trained(model: Any, base: Path, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the trained weights and their config, without local paths: equal runs must write equal bytes.

    `weights` has all trained weights if the model itself has only a shard of them.
    """
    name = read_base_manifest(base).model
    if not hasattr(model, "peft_config"):
        import torch

        model.config.name_or_path = name
        dtype = getattr(torch, precision("lora")[0])
        if weights is None:
            model = model.to(dtype)
        else:
            weights = {key: weight.to(dtype) for key, weight in weights.items()}
        # A single file, so that one hash identifies the weights.
        model.save_pretrained(folder, state_dict=weights, safe_serialization=True, max_shard_size="10TB")
        return
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = name
    if isinstance(getattr(adapter, "target_modules", None), set):
        # PEFT would write the set in an order that differs between processes.
        adapter.target_modules = sorted(adapter.target_modules)
    # save_embedding_layers=False, since "auto" would query the hub.
    model.save_pretrained(
        folder,
        state_dict=weights,
        safe_serialization=True,
        save_embedding_layers=False,
        selected_adapters=["default"],
    )
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours follows with the gate's table


def complete_version(
    folder: Path,
    base: Path,
    *,
    run_key: str,
    inputs: Mapping[str, str],
    batches: Collection[str],
    profile: Mapping[str, Any],
    adapter: AdapterConfig,
    more: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Write the tokenizer, the processor and last the manifest beside the trained weights in `folder`."""
    described = read_json(base / MANIFEST)
    chat = load_chat(base)
    chat.tokenizer.save_pretrained(folder)
    copy_processor(base, folder)
    write_generation(folder, chat.stop_ids, chat.pad_id)
    manifest = {
        "run_key": run_key,
        "inputs": inputs,
        "batches": sorted(batches),
        "canaries": profile.get("canaries", 0),
        "audit_canaries": profile.get("audit_canaries", 0),
        "adapter_sha256": adapter_sha256(folder),
        "adapter": adapter.model_dump(mode="json"),
        "base": {key: described[key] for key in BaseName.__struct_fields__ if key in described},
        "max_length": profile["max_length"],
        "precision": precision(adapter.method)[0],
        "environment": {"python": platform.python_version(), **versions()},
        **more,
        "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
    }
    write_json(folder / MANIFEST, manifest)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that weights depend on."""
    return {package: version(package) for package in PACKAGES}


def moved(start: Path | None, folder: Path) -> float:
    """Return the length of what the training changed in the weights of the adapter in `folder` (L2).

    It reads the files that are served, not the model in memory: a training may improve weights that are never
    written (Opacus's issue 820). Without `start` a new adapter counts by the matrices that began as zeros.
    """
    from safetensors.torch import load_file

    now = load_file(folder / WEIGHTS)
    if start:
        before = load_file(start / WEIGHTS)
        changes = [weight.double() - before[name].double() for name, weight in now.items()]
    else:
        changes = [weight.double() for name, weight in now.items() if "lora_B" in name]
    return float(sum(change.square().sum() for change in changes) ** 0.5)


def check_start(incumbent: Path, config: AdapterConfig) -> None:
    """Raise BaseModelError if the champion's adapter differs from `config` in method or shape."""
    theirs = read_trained_manifest(incumbent).adapter
    same_method = _loaded_as(theirs.method) == _loaded_as(config.method)
    pairs = {
        key: (getattr(theirs, key), getattr(config, key))
        for key in (SHAPE[config.method] if same_method else ("method",))
    }
    differing = [
        f"`{key}` {seen}, wanted {wanted}" for key, (seen, wanted) in pairs.items() if seen != wanted
    ]
    if differing:
        raise BaseModelError(
            f"the champion's adapter has another shape: {', '.join(differing)}",
            remedy="set `adapter` as the champion has it, or `train.start_from: base`",
        )


def _loaded_as(method: str) -> str:
    """Return the method whose adapters are compatible: `lora` and `qlora` adapters fit each other's bases."""
    return "lora" if method == "qlora" else method


def check_context(base: Path, config: AdapterConfig, max_length: int) -> None:
    """Raise ConfigError if the longest row and the virtual tokens together exceed the base's context."""
    context, positions = read_base_manifest(base).context, max_length + config.virtual_tokens
    if config.method in PREFIXED and context and positions > context:
        raise ConfigError(
            f"`tokenize.max_length` {max_length} and `adapter.virtual_tokens` {config.virtual_tokens} "
            f"are {positions} positions, the base has {context}",
            remedy="lower one of them",
        )
