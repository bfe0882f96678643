"""Make a candidate of the version that the coordinator delivered: what the flow `take` does in place of
`tasks.train`.

Writes the same outputs: models/candidate, and the figures in reports/train. With `personal` the candidate is
a mixture of the delivered adapter with one that is trained here, on the node's own rows.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors.torch import load_file

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.errors import BaseModelError, ConfigError, DataError
from ratchet.federation.aggregation import Aggregate, Folded, fold
from ratchet.federation.node import check_base, write_adapter, write_start
from ratchet.federation.personal import choose_mixture
from ratchet.federation.records import DELIVERED, NODE, Delivery, read_rounds, require_delivery
from ratchet.federation.rounds import Say
from ratchet.federation.state import split, state_tensors
from ratchet.files import read_json, sha256_json, whole_folder, write_bytes, write_json
from ratchet.models.adapters import complete_version, load_trainable, save_trained
from ratchet.models.loading import MANIFEST, WEIGHTS, adapter_sha256, load_adapter, load_base
from ratchet.models.manifests import Together
from ratchet.pipeline.dvc import Workspace, run_module
from ratchet.tracking.curve import History
from ratchet.training.validation import Validation

SCRATCH = Path(".ratchet/personal")  # in the workspace


class Taken(NamedTuple):
    """What becomes the candidate: a folder with an adapter, and how it came to be."""

    folder: Path
    adapter: AdapterConfig
    federation: Together
    batches: set[str]
    profile: Mapping[str, Any]  # of the tokens
    loss: float | None  # on the node's validation rows
    steps: int = 0  # of trainings here
    seconds: float = 0.0


def check_delivery(root: Path, config: Config, *, personal: bool) -> Delivery:
    """Return what was delivered. Raises UserError: nothing; ConfigError: no personal adapter can be made."""
    delivery = require_delivery(root)
    if not personal:
        return delivery
    epsilon = config.train.privacy.epsilon or delivery.federation.epsilon
    if epsilon is not None:
        raise ConfigError(
            f"a promise of ε = {epsilon:.3g} stands for this node's rows, and --personal would train on them "
            "again without noise",
            remedy="take the version without --personal",
        )
    if config.adapter.method not in ("lora", "qlora", "rslora"):
        raise ConfigError(
            f"adapter.method is {config.adapter.method!r}: --personal mixes updates B·A, which `lora`, "
            "`qlora` and `rslora` have",
            remedy="set `adapter.method: lora`",
        )
    return delivery


def take(workspace: Workspace, config: Config, *, personal: bool, say: Say) -> None:
    """Write the candidate and its reports.

    Raises UserError: nothing was delivered, or to another base, or no personal adapter can be made of it;
    StageError: a training failed.
    """
    delivery = check_delivery(workspace.root, config, personal=personal)
    base, out = workspace.path / "models/base", workspace.path / "models/candidate"
    check_base(base, delivery.base)
    make = _mix if personal else _as_it_is
    taken = make(workspace, delivery, config, say)
    inputs = {
        "federation": delivery.run,
        "base": sha256_json(delivery.base),
        "delivered": adapter_sha256(workspace.root / NODE / DELIVERED),
        "start": delivery.start,
    }
    with whole_folder(out) as folder:
        for name in (WEIGHTS, "adapter_config.json"):
            write_bytes(folder / name, [(taken.folder / name).read_bytes()])
        complete_version(
            folder,
            base,
            run_key=sha256_json({**inputs, "adapter": adapter_sha256(folder)})[:32],
            inputs=inputs,
            batches=taken.batches,
            profile=taken.profile,
            adapter=taken.adapter,
            more={
                "federation": msgspec.to_builtins(taken.federation),
                "taught_by": taken.federation.nodes,
            },
        )
    _write_reports(workspace.path / "reports/train", taken, read_json(out / MANIFEST)["run_key"])


def _as_it_is(workspace: Workspace, delivery: Delivery, config: Config, say: Say) -> Taken:
    tokens, folder = workspace.path / "data/tokenized", workspace.root / NODE / DELIVERED
    adapter, loss = AdapterConfig(**delivery.record), None
    if read_json(tokens / "profile.json")["validation"]["rows"]:
        loss = _Measure(workspace, tokens, adapter, config).of(folder)
        say(f"take: validation loss {loss:.4f} on this node's own rows")
    profile = {"max_length": delivery.max_length}
    return Taken(folder, adapter, delivery.federation, _batches(workspace.root, delivery), profile, loss)


def _batches(root: Path, delivery: Delivery) -> set[str]:
    """Return this node's batches that the delivered adapter has learned."""
    fresh = delivery.start == "base"
    done = [one for one in read_rounds(root) if one.run == delivery.run or not fresh]
    return {batch for one in done for batch in one.batches}


class _Measure:
    """Measures adapters on the validation rows of `tokens`, all on one base in memory."""

    def __init__(self, workspace: Workspace, tokens: Path, adapter: AdapterConfig, config: Config) -> None:
        base = workspace.path / "models/base"
        self._model = load_base(base, method=adapter.method, quantisation=adapter.quantisation)
        self._validation = Validation(self._model, tokens, base, config.train)

    def of(self, folder: Path) -> float:
        model = load_adapter(self._model, folder)
        loss = self._validation.measure(model)
        self._model = model.unload()
        return loss


# --- a personal adapter ---


class Common(NamedTuple):
    """The delivered adapter, as factors of `adapter.rank` and a residual; `described` is PEFT's config."""

    aggregate: Aggregate
    described: dict[str, Any]
    scale: float

    def write(self, folder: Path, found: Aggregate, most: int) -> Folded:
        """Write an aggregate as one adapter of the rank `most` at most."""
        folded = fold(found, most)
        config = {"r": folded.rank, "lora_alpha": self.scale * folded.rank, "use_rslora": False}
        write_adapter(folder, folded.adapter, self.described | config)
        return folded


def _mix(workspace: Workspace, delivery: Delivery, config: Config, say: Say) -> Taken:
    """Mix the delivered adapter with the node's own: trained from the delivered one on, and from the base.

    Of both the mixture with the least loss on the node's own validation rows is taken, as
    `benchmarks.federation` does.
    """
    scratch, adapter = workspace.path / SCRATCH, config.adapter
    common = _split(workspace, delivery, config)
    profile = _tokenize(workspace, config, say)
    if not profile["validation"]["rows"]:
        raise DataError(
            "a personal adapter is chosen by the loss on this node's validation rows, and there are none",
            remedy="raise `prepare.validation_share`, or take the version without --personal",
        )
    homes = [_train(workspace, config, origin, say) for origin in ("champion", "base")]
    on, alone = (load_file(home / "candidate" / WEIGHTS) for home in homes)
    owns = [Aggregate(on, common.aggregate.residual), Aggregate(alone, {})]
    measure = _Measure(workspace, scratch / "tokens", adapter, config)
    out, most = scratch / "mixture", config.federate.max_rank

    def loss(found: Aggregate) -> float:
        common.write(out, found, most)
        return measure.of(out)

    choices = [choose_mixture(common.aggregate, own, loss) for own in owns]
    choice = min(choices, key=lambda one: one.loss)
    folded = common.write(out, choice.mixture, most)
    origin = ("the delivered one" if choice is choices[0] else "the base") if choice.share else ""
    missing = max(folded.missing, delivery.federation.missing)
    together = msgspec.structs.replace(
        delivery.federation, own_share=choice.share, own_origin=origin, missing=missing
    )
    say(
        f"take: {together.told_share}; validation loss {choice.loss:.4f}; rank {folded.rank}, which has no "
        f"room for {folded.missing:.2%} of a layer's update, at most"
    )
    figures = [read_json(home / "reports/figures.json") for home in homes]
    method = "qlora" if adapter.method == "qlora" else "lora"
    shape = {"method": method, "rank": folded.rank, "alpha": common.scale * folded.rank}
    return Taken(
        out,
        adapter.model_copy(update=shape),
        together,
        {*_batches(workspace.root, delivery), *profile["batches"]},
        {**profile, "max_length": max(profile["max_length"], delivery.max_length)},
        choice.loss,
        sum(one["steps"] for one in figures),
        sum(one["seconds"] for one in figures),
    )


def _split(workspace: Workspace, delivery: Delivery, config: Config) -> Common:
    """Split the delivered adapter, and write it as the start of a training. Raises BaseModelError."""
    adapter, scratch = config.adapter, workspace.path / SCRATCH
    base, fresh = workspace.path / "models/base", scratch / "fresh"
    with whole_folder(fresh) as folder:
        save_trained(load_trainable(base, None, adapter, seed=config.train.seed), base, folder)
    given = load_file(workspace.root / NODE / DELIVERED / WEIGHTS)
    if given.keys() != load_file(fresh / WEIGHTS).keys():
        raise BaseModelError(
            "the delivered adapter is on other layers than this project's `adapter` asks for",
            remedy="set `adapter.target_modules` as the coordinator has it: "
            f"{delivery.record.get('target_modules')}",
        )
    scale = adapter.alpha / (adapter.rank**0.5 if adapter.method == "rslora" else adapter.rank)
    theirs = delivery.record["alpha"] / delivery.record["rank"]
    common = Common(
        split(given, adapter.rank, theirs / scale), read_json(fresh / "adapter_config.json"), scale
    )
    write_start(
        scratch / "start",
        state_tensors(common.aggregate),
        common.described,
        scale,
        adapter.model_dump(mode="json"),
        delivery.base,
    )
    return common


def _tokenize(workspace: Workspace, config: Config, say: Say) -> Mapping[str, Any]:
    """Tokenize all rows of the node, also those that its champion has seen; return their profile."""
    paths = {
        "params": _params(workspace, config, "base"),
        "prepared": workspace.path / "data/prepared",
        "base": workspace.path / "models/base",
        "incumbent": workspace.path / "models/incumbent",
        "out": workspace.path / SCRATCH / "tokens",
    }
    run_module(workspace, "tasks.tokenize", _flags(paths), say)
    profile: Mapping[str, Any] = read_json(paths["out"] / "profile.json")
    return profile


def _train(workspace: Workspace, config: Config, origin: str, say: Say) -> Path:
    """Train an adapter on the node's rows, from "base" or from the delivered one ("champion").

    Returns the folder that holds `candidate` and `reports`.
    """
    scratch, home = workspace.path / SCRATCH, workspace.path / SCRATCH / f"from-{origin}"
    paths = {
        "params": _params(workspace, config, origin),
        "tokens": scratch / "tokens",
        "base": workspace.path / "models/base",
        "incumbent": scratch / "start" if origin == "champion" else workspace.path / "models/incumbent",
        "out": home / "candidate",
        "reports": home / "reports",
    }
    run_module(workspace, "tasks.train", _flags(paths), say)
    return home


def _params(workspace: Workspace, config: Config, origin: str) -> Path:
    """Write the node's params.yaml for a training on all rows and without a teacher; return its path."""
    values = config.model_dump(mode="json")
    values["train"] |= {"start_from": origin, "rows": "all", "teacher": ""}
    path = workspace.path / SCRATCH / f"params-{origin}.yaml"
    write_json(path, values)
    return path


def _flags(paths: Mapping[str, Path]) -> list[str]:
    return [part for name, path in paths.items() for part in (f"--{name}", str(path))]


# --- reports ---


def _write_reports(reports: Path, taken: Taken, run_key: str) -> None:
    """Write what the flow and MLflow read of a training; without one here, it has no steps."""
    weights = sum(tensor.numel() for tensor in load_file(taken.folder / WEIGHTS).values())
    figures = {
        "steps": taken.steps,
        "best_step": taken.steps,
        "best_validation_loss": taken.loss,
        "seconds": taken.seconds,
        "trainable_weights": weights,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "run_key": run_key,
        "rows": taken.profile.get("train", {"rows": taken.federation.rows}),
    }
    with whole_folder(reports) as folder:
        with closing(History(folder / "history.jsonl")) as history:
            history.add(taken.steps, {} if taken.loss is None else {"validation_loss": taken.loss})
        write_json(folder / "figures.json", figures)
