"""Make a candidate with the nodes of a federation: what the flow `federate` does in place of `tasks.train`.

Writes the same outputs: models/candidate, and the curve and the figures in reports/train, with the record of
each round. The rounds' own state is in .ratchet/federation of the checkout until the candidate has landed, so
a run that was interrupted goes on.
"""

from __future__ import annotations

import resource
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file

from ratchet.config.params import Config
from ratchet.errors import BaseModelError, ConfigError
from ratchet.evaluation.node_scores import FILE as SCORES
from ratchet.evaluation.node_scores import Scores
from ratchet.federation.aggregation import Aggregate, fold
from ratchet.federation.audit import audit_at_nodes
from ratchet.federation.link.flower import FOLDER, FlowerLink
from ratchet.federation.messages import Audit, Score
from ratchet.federation.node import identity, write_adapter
from ratchet.federation.records import ROUNDS, Round, read_forgotten_nodes
from ratchet.federation.rounds import Link, Plan, Say, run_rounds, score_at_nodes
from ratchet.federation.secure import SharesWrong
from ratchet.federation.state import distance, split, updates_of
from ratchet.files import read_json, sha256_json, whole_folder, write_json
from ratchet.models.adapters import complete_version, load_trainable, save_trained
from ratchet.models.loading import MANIFEST, WEIGHTS, adapter_sha256
from ratchet.models.manifests import Together, read_trained_manifest
from ratchet.pipeline.dag import stage_key
from ratchet.privacy.audit import FILE as CLAIM
from ratchet.privacy.audit import Claim
from ratchet.tracking.curve import History
from ratchet.training.schedule import Figures

RUN = FOLDER / "run"
SHOWN = 5e-5  # a share that is more than 0.00 %
SECTIONS = ("tokenize", "train", "adapter")  # of params.yaml: what the nodes take from the coordinator


def check_trainable(config: Config) -> None:
    """Raise ConfigError for settings under which updates cannot be aggregated."""
    adapter, train = config.adapter, config.train
    if adapter.method not in ("lora", "qlora", "rslora"):
        raise ConfigError(
            f"adapter.method is {adapter.method!r}: a federation aggregates updates B·A, which `lora`, "
            "`qlora` and `rslora` have",
            remedy="set `adapter.method: lora`",
        )
    if adapter.projector == "whole" or adapter.modules_to_save or adapter.bias != "none":
        raise ConfigError(
            "adapter.projector, modules_to_save or bias asks for weights that are trained whole",
            remedy="a federation trains updates of a rank alone: set them to frozen, [] and none",
        )
    if train.world_size > 1:
        raise ConfigError(
            f"train.processes times train.nodes is {train.world_size}, and nodes may have fewer cores or "
            "GPUs",
            remedy="set `train.processes: 1` and `train.nodes: 1` for a federation",
        )
    if config.evaluate.canaries or config.evaluate.audit_canaries:
        raise ConfigError(
            f"evaluate.canaries is {config.evaluate.canaries}, audit_canaries "
            f"{config.evaluate.audit_canaries}: "
            "they are planted among rows of this checkout, and nodes train on theirs",
            remedy="set both to 0 for a federation; `federate.audit_canaries` plants some at each node",
        )
    if config.federate.audit_canaries and not train.privacy.epsilon:
        raise ConfigError(
            f"federate.audit_canaries is {config.federate.audit_canaries}, and train.privacy.epsilon is not "
            "set: there is no claim to test",
            remedy="set `train.privacy.epsilon`, or `federate.audit_canaries: 0`",
        )
    if train.teacher:
        raise ConfigError(
            f"train.teacher is {train.teacher!r}; nodes have no champion to learn from",
            remedy="set `train.teacher: ''` for a federation",
        )


def train_together(workspace: Path, root: Path, config: Config, link: Link, say: Say) -> Figures:
    """Run the rounds from `workspace`'s base and incumbent; write the candidate and its reports there.

    Raises UserError: too few nodes take part; SharesWrong: the run is given up; BaseModelError: the champion
    cannot be gone on from.
    """
    base, incumbent = workspace / "models/base", workspace / "models/incumbent"
    adapter = config.adapter
    scale = adapter.alpha / (adapter.rank**0.5 if adapter.method == "rslora" else adapter.rank)
    forgotten = forgotten_of(root, incumbent)
    start, adapter_config, earlier = _start(base, incumbent, config, scale, forgotten, say)
    from_champion = earlier is not None
    params = {name: getattr(config, name).model_dump(mode="json") for name in SECTIONS}
    params["train"]["privacy"]["trainings"] = config.federate.rounds
    inputs = {
        "base": sha256_json(identity(base)),
        "params": sha256_json(params),
        "federate": sha256_json(config.federate.model_dump(mode="json")),
        "code": stage_key("train", Path(__file__).parents[1]),
        "start": adapter_sha256(incumbent) if from_champion else "base",
    }
    run = _run_id(root, inputs, say)
    plan = Plan(run, params, identity(base), adapter_config, scale, config.federate)
    origin = "the champion" if from_champion else "the base"
    say(f"federate: run {run}, {config.federate.rounds} rounds, from {origin}")
    try:
        found, rounds = run_rounds(link, root / RUN / "rounds", start, plan, say)
    except SharesWrong:
        forget_run(root)
        raise
    if not any(each.moved for each in rounds):
        raise BaseModelError(
            "no round moved the weights: the nodes send back what they got",
            remedy="look at a node's log; raise `train.learning_rate` or `train.epochs`",
        )
    folded = fold(found, config.federate.max_rank)
    if folded.missing >= SHOWN:
        say(f"federate: rank {folded.rank} has no room for {folded.missing:.2%} of a layer's update, at most")
    whole = adapter.model_copy(
        update={"method": "lora", "rank": folded.rank, "alpha": scale * folded.rank}
        if adapter.method == "rslora"
        else {"rank": folded.rank, "alpha": scale * folded.rank}
    )
    profile = read_json(workspace / "data/tokenized/profile.json")
    together = Together(
        run,
        sorted({part.name for each in rounds for part in each.nodes}),
        len(rounds),
        rounds[-1].rows,
        config.federate.aggregation,
        config.federate.strategy,
        config.federate.secure,
        folded.missing,
        max((part.epsilon for part in rounds[-1].nodes if part.epsilon is not None), default=None),
        config.train.privacy.delta,
    )
    inputs["federation"] = run
    with whole_folder(workspace / "models/candidate") as folder:
        described = adapter_config | {
            "r": folded.rank,
            "lora_alpha": scale * folded.rank,
            "use_rslora": False,
        }
        write_adapter(folder, folded.adapter, described)
        complete_version(
            folder,
            base,
            run_key=sha256_json({**inputs, "adapter": adapter_sha256(folder)})[:32],
            inputs=inputs,
            batches=read_json(incumbent / MANIFEST)["batches"] if from_champion else [],
            profile=profile,
            adapter=whole,
            more={
                "federation": msgspec.to_builtins(together),
                "taught_by": sorted({*together.nodes, *(earlier or [])}),
            },
        )
    key = read_trained_manifest(workspace / "models/candidate").run_key
    weights = sum(tensor.numel() for tensor in start.adapter.values())
    moved = scale * distance(updates_of(found), updates_of(start))
    claim = _claim(workspace, root / RUN / "audit", link, plan, config, rounds[-1].rows, moved, say)
    scores = _score(workspace, root / RUN / "scores", link, plan, config, say)
    return _write_reports(workspace / "reports/train", rounds, scores, claim, profile, key, weights, config)


def _claim(
    workspace: Path,
    home: Path,
    link: Link,
    plan: Plan,
    config: Config,
    rows: int,
    moved: float,
    say: Say,
) -> Claim | None:
    """Return what the training promises of the nodes' rows, with what their canaries say; None without ε."""
    privacy, count = config.train.privacy, config.federate.audit_canaries
    if not privacy.epsilon:
        return None
    claim = Claim(privacy.epsilon, privacy.delta, rows, moved)
    if not count:
        return claim
    folder = workspace / "models/candidate"
    manifest = read_json(folder / MANIFEST)
    asked = Audit(
        run=plan.run,
        base=plan.base,
        adapter_config=read_json(folder / "adapter_config.json"),
        record=manifest["adapter"],
        max_length=manifest["max_length"],
        batch_size=config.evaluate.batch_size,
        masked=config.federate.secure,
        round=config.federate.rounds + 2,  # its keys are not those of a round, or of the comparison
    )
    say("federate: the nodes guess which canaries the version was trained on")
    found = audit_at_nodes(link, home, plan, asked, load_file(folder / WEIGHTS))
    for name, reason in found.left_out.items():
        say(f"federate: no audit by {name}: {reason}")
    return msgspec.structs.replace(
        claim, canaries=count, guesses=found.guesses, nodes=found.nodes, left_out=found.left_out
    )


def _score(workspace: Path, home: Path, link: Link, plan: Plan, config: Config, say: Say) -> Scores:
    """Let the nodes compare the candidate with the champion, or the base, on their own held-out rows."""
    champion = workspace / "models/incumbent"
    folders = {"candidate": workspace / "models/candidate"}
    if read_json(champion / MANIFEST)["version"] is not None and (champion / WEIGHTS).exists():
        folders["champion"] = champion
    tensors = {
        f"{name}:{key}": tensor
        for name, folder in folders.items()
        for key, tensor in load_file(folder / WEIGHTS).items()
    }
    asked = Score(
        run=plan.run,
        params={**plan.params, "evaluate": config.evaluate.model_dump(mode="json")},
        base=plan.base,
        adapters={name: read_json(folder / "adapter_config.json") for name, folder in folders.items()},
        records={name: read_json(folder / MANIFEST)["adapter"] for name, folder in folders.items()},
        max_length=read_json(folders["candidate"] / MANIFEST)["max_length"],
        metric=config.gate.metric,
        least=config.federate.least_rows,
        masked=config.federate.secure,
        round=config.federate.rounds + 1,  # its keys are not those of a round of training
    )
    say("federate: the nodes compare the candidate with the champion, or the base, on their own rows")
    scores = score_at_nodes(link, home, plan, asked, tensors)
    for name, reason in scores.left_out.items():
        say(f"federate: no scores of {name}: {reason}")
    return scores


def forgotten_of(root: Path, version: Path) -> list[str]:
    """Return the nodes that taught a version and were forgotten since."""
    names = {node.name for node in read_forgotten_nodes(root / FOLDER)}
    return sorted(names.intersection(read_trained_manifest(version).taught_by))


def _start(
    base: Path, incumbent: Path, config: Config, scale: float, forgotten: Sequence[str], say: Say
) -> tuple[Aggregate, dict[str, Any], list[str] | None]:
    """Return the first global adapter, PEFT's description of it, and the nodes that taught it: none at all
    (None) where it is fresh, and not the champion's.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-federate-") as scratch:
        fresh = Path(scratch)
        save_trained(load_trainable(base, None, config.adapter, seed=config.train.seed), base, fresh)
        described, weights = read_json(fresh / "adapter_config.json"), load_file(fresh / WEIGHTS)
    if config.train.start_from == "base" or read_json(incumbent / MANIFEST)["version"] is None:
        return Aggregate(weights, {}), described, None
    if forgotten:
        say(f"federate: from the base, since {', '.join(forgotten)} taught the champion and was forgotten")
        return Aggregate(weights, {}), described, None
    manifest = read_trained_manifest(incumbent)
    theirs, theirs_together = manifest.adapter, manifest.federation
    if (incumbent / "base").exists() or theirs.method not in ("lora", "qlora", "rslora"):
        raise BaseModelError(
            "the champion was trained on another base, or by a method without factors",
            remedy="set `train.start_from: base`",
        )
    if config.train.privacy.epsilon and not (theirs_together and theirs_together.epsilon is not None):
        raise BaseModelError(
            f"train.privacy.epsilon is {config.train.privacy.epsilon:g}, and the champion has learned rows "
            "without privacy: no noise hides that now",
            remedy="set `train.start_from: base`",
        )
    champion = load_file(incumbent / WEIGHTS)
    if champion.keys() != weights.keys():
        raise BaseModelError(
            "the champion's adapter is on other layers than `adapter.target_modules` asks for",
            remedy="set it as the champion has it, or `train.start_from: base`",
        )
    root = theirs.rank**0.5 if theirs.method == "rslora" else theirs.rank
    return split(champion, config.adapter.rank, theirs.alpha / root / scale), described, manifest.taught_by


def _run_id(root: Path, inputs: dict[str, str], say: Say) -> str:
    """Return the id of the interrupted run with the same inputs, or of a new one."""
    note = root / RUN / "run.json"
    if note.exists():
        kept = read_json(note)
        if kept["inputs"] == inputs:
            say(f"federate: goes on with the interrupted run {kept['run']}")
            return str(kept["run"])
        forget_run(root)
    run = secrets.token_hex(6)
    write_json(note, {"run": run, "inputs": inputs})
    return run


def is_interrupted(root: Path) -> bool:
    """Return whether a run is to be gone on with."""
    return (root / RUN / "run.json").exists()


def forget_run(root: Path) -> None:
    """Remove the state of a run whose candidate has landed, and what was sent in it."""
    note = root / RUN / "run.json"
    if note.exists():
        FlowerLink(root).forget(f"{read_json(note)['run']}-")
    shutil.rmtree(root / RUN, ignore_errors=True)


def _write_reports(
    reports: Path,
    rounds: Sequence[Round],
    scores: Scores,
    claim: Claim | None,
    profile: Any,
    key: str,
    weights: int,
    config: Config,
) -> Figures:
    steps = [max(part.steps for part in each.nodes) for each in rounds]
    tokens = sum(part.learned_tokens for each in rounds for part in each.nodes)
    seconds = sum(each.seconds for each in rounds)
    best = min(
        range(len(rounds)),
        key=lambda place: loss if (loss := rounds[place].validation_loss) is not None else float("inf"),
    )
    figures: Figures = {
        "steps": sum(steps),
        "best_step": sum(steps[: best + 1]),
        "best_validation_loss": rounds[best].validation_loss,
        "train_loss": rounds[-1].train_loss,
        "seconds": seconds,
        "trainable_weights": weights,
        "epochs": config.train.epochs * len(rounds),
        "learned_tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "run_key": key,
        "rows": {**profile["train"], "rows": rounds[-1].rows, "new": rounds[-1].rows, "replayed": 0},
    }
    with whole_folder(reports) as folder:
        with closing(History(folder / "history.jsonl")) as history:
            for place, each in enumerate(rounds):
                values = {"train_loss": each.train_loss}
                if each.validation_loss is not None:
                    values["validation_loss"] = each.validation_loss
                history.add(sum(steps[: place + 1]), values)
        write_json(folder / "figures.json", figures)
        write_json(folder / ROUNDS, msgspec.to_builtins(list(rounds)))
        write_json(folder / SCORES, msgspec.to_builtins(scores))
        if claim:
            write_json(folder / CLAIM, msgspec.to_builtins(claim))
    return figures
