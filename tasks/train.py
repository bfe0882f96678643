"""Train on the packed windows by the method of `adapter.method`, from the base or from the champion's weights.

    python -m tasks.train --tokens data/tokenized --base models/base --incumbent models/incumbent --out models/candidate --reports reports/train

Writes the adapter, or for `full` the whole model (safetensors), tokenizer, chat template and manifest.json; the curve and the figures
under --reports. Checkpoints go to .ratchet/checkpoints of RATCHET_ROOT (the checkout) or of the working directory: the same command
again goes on from the newest one.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.config.params import Config
from ratchet.errors import BaseModelError
from ratchet.files import read_json, require_space, sha256_file, sha256_json, whole_folder, write_json
from ratchet.models.adapters import PREFIXED, check_context, check_start, load_trainable, save_trained
from ratchet.models.loading import MANIFEST, adapter_sha256, compute_dtype, load_tokenizer, precision, quiet
from ratchet.pipeline.dag import stage_key
from ratchet.pipeline.stage import project_root, run_stage, say
from ratchet.tracking.curve import History, LiveCopy, read_history
from ratchet.training.distributed import (
    become_torchrun,
    check_size,
    end_with_parent,
    in_parts,
    rank,
    take_gpu,
    world_size,
)
from ratchet.training.loss import CHAMPION, load_teacher
from ratchet.training.packing import IGNORED, read_windows

if TYPE_CHECKING:
    from ratchet.training.checkpoints import Checkpoints
    from ratchet.training.schedule import Outcome, Report

ROOM = 200 * 2**20  # bytes that are free before anything is loaded
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def train(
    tokens: Path, base: Path, incumbent: Path, out: Path, reports: Path, config: Config
) -> dict[str, Any]:
    """Returns the figures of the run. Raises DivergenceError, DiskSpaceError, BaseModelError; nothing is left half-written."""
    from ratchet.training.checkpoints import Checkpoints

    check_size(config.train.processes, world_size())
    require_space(out.parent, ROOM, "the candidate")
    start = _start_from(incumbent, config)
    inputs = _inputs(tokens, base, incumbent, start, config)
    run_key = sha256_json(inputs)[:32]
    known = {**inputs, **_machine(), **_settings(config)}
    if rank():
        # The first process tells and writes; the others compute, and read the same checkpoint.
        checkpoints = Checkpoints(
            project_root(), run_key, known, minutes=config.train.checkpoint_minutes, curve=list
        )
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            _fit(
                tokens,
                base,
                incumbent,
                start,
                out,
                config,
                lambda step, values: None,
                lambda points: None,
                checkpoints,
            )
        return {}
    profile = read_json(tokens / "profile.json")
    with whole_folder(reports) as report_folder, closing(History(report_folder / "history.jsonl")) as history:
        # A run of another training with the same key would be the same training: its copy is the same.
        copy = LiveCopy(
            history.path,
            config.project.name,
            run_key,
            {"mlflow.runName": f"train-{run_key[:8]}", "ratchet.state": "training"},
        )
        if "MLFLOW_TRACKING_URI" in os.environ:
            copy.start()
        checkpoints = Checkpoints(
            project_root(),
            run_key,
            known,
            minutes=config.train.checkpoint_minutes,
            curve=lambda: read_history(history.path),
        )
        facts = {
            "run_key": run_key,
            "inputs": inputs,
            "batches": _batches(tokens, incumbent),
            "canaries": profile.get("canaries", 0),
        }
        figures = _optimise(tokens, base, incumbent, start, out, config, history, checkpoints, facts)
        figures["run_key"], figures["rows"] = run_key, profile["train"]
        write_json(report_folder / "figures.json", figures)
        delivered = "MLFLOW_TRACKING_URI" in os.environ and copy.finish()
    checkpoints.forget()
    say(f"train: curve {'delivered to MLflow' if delivered else 'kept locally; the flow delivers it'}")
    return figures


def _optimise(
    tokens: Path,
    base: Path,
    incumbent: Path,
    start: bool,
    out: Path,
    config: Config,
    history: History,
    checkpoints: Checkpoints,
    facts: dict[str, Any],
) -> dict[str, Any]:
    def report(step: int, values: dict[str, float]) -> None:
        history.add(step, values)
        if "validation_loss" in values:
            say(f"train: step {step}, validation loss {values['validation_loss']:.4f}")

    model, weights, outcome, figures = _fit(
        tokens, base, incumbent, start, out, config, report, history.restore, checkpoints
    )
    _save(model, weights, load_tokenizer(base), base, out, config, facts)
    best = math.nan if outcome.best_validation_loss is None else outcome.best_validation_loss
    say(
        f"train: {outcome.steps} steps in {outcome.seconds:.0f} s, best validation loss {best:.4f} at step {outcome.best_step}"
    )
    return {
        **outcome._asdict(),
        **figures,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **_peak_of_gpu(),
    }


def _fit(
    tokens: Path,
    base: Path,
    incumbent: Path,
    start: bool,
    out: Path,
    config: Config,
    report: Report,
    restore: Callable[[Any], None],
    checkpoints: Checkpoints,
) -> tuple[Any, dict[str, Any] | None, Outcome, dict[str, Any]]:
    """What every process of a training does: (model, its whole weights where it holds parts of them, outcome, figures)."""
    from ratchet.training.distributed import whole
    from ratchet.training.state import trainable
    from ratchet.training.trainer import count_batches, fit

    method, sharded = config.adapter.method, in_parts(config.train, config.adapter)
    take_gpu()
    windows, validation = read_windows(tokens / "train.arrow"), read_windows(tokens / "validation.arrow")
    check_context(
        base, config.adapter, 1 + max(max(window.position_ids) for window in (*windows, *validation))
    )
    apart = True if method in PREFIXED else None
    num_batches = count_batches(windows, config.train.batch_windows, apart=apart)
    computed, why = compute_dtype(config.train.precision)
    schedule = _schedule(num_batches, computed, config)
    model = load_trainable(
        base, incumbent if start else None, config.adapter, seed=config.train.seed, in_parts=sharded
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    require_space(
        out.parent, ROOM + sum(weight.numel() * weight.element_size() for weight in weights), "the candidate"
    )
    count = sum(weight.numel() for weight in weights)
    say(
        f"train: {method} of {count:,} weights from {'the champion' if start else 'the base'}, {schedule.steps} steps; computed in {computed}: {why}"
    )
    if config.train.processes > 1:
        say(
            f"train: {config.train.processes} processes, each with {'a part' if sharded else 'all'} of the model"
        )
    teacher = load_teacher(config.train.teacher, base, incumbent)
    if config.train.teacher:
        say(
            f"train: learns from {config.train.teacher}, too"
            if teacher
            else "train: there is no champion to learn from yet"
        )
    saved = checkpoints.newest(restore)
    if saved:
        say(f"train: goes on from the checkpoint of step {saved.step} of {schedule.steps}")
    with quiet(), checkpoints.asked_by_sigterm():
        outcome = fit(
            model,
            windows,
            validation,
            schedule,
            pad_id=_pad_id(load_tokenizer(base)),
            report=report,
            apart=apart,
            teacher=teacher,
            sharded=sharded,
            checkpoints=checkpoints,
            saved=saved,
        )
    learned = sum(label != IGNORED for window in windows for label in window.labels)
    epochs = outcome.steps * config.train.accumulate / num_batches
    return (
        model,
        whole(trainable(model)) if sharded else None,
        outcome,
        {
            "trainable_weights": count,
            "epochs": epochs,
            "learned_tokens_per_second": learned * epochs / outcome.seconds,
        },
    )


def _peak_of_gpu() -> dict[str, float]:
    """With what torch keeps for itself: nobody else can have it. The driver's own part is not in it."""
    import torch

    return {"peak_gpu_mib": torch.cuda.max_memory_reserved() / 2**20} if torch.cuda.is_available() else {}


def _settings(config: Config) -> dict[str, Any]:
    """Key by key, to tell which of them changed; `params` of the inputs is what decides."""
    train = config.train.model_dump(mode="json", exclude={"checkpoint_minutes"})
    return {f"train.{key}": value for key, value in train.items()} | {
        f"adapter.{key}": value for key, value in config.adapter.model_dump(mode="json").items()
    }


def _machine() -> dict[str, str]:
    """What else the bytes depend on; a checkpoint of another is not gone on from."""
    from ratchet.models.loading import device

    return {
        "device": device(),
        "computed": compute_dtype("auto")[0],
        **{package: version(package) for package in PACKAGES},
    }


def _save(
    model: Any,
    weights: dict[str, Any] | None,
    tokenizer: Any,
    base: Path,
    out: Path,
    config: Config,
    facts: dict[str, Any],
) -> None:
    """Manifest last: its existence says that the folder is whole. It holds no time and no path, so equal trainings are equal bytes."""
    with whole_folder(out) as folder:
        save_trained(model, base, folder, weights)
        tokenizer.save_pretrained(folder)
        write_json(
            folder / MANIFEST,
            {
                **facts,
                "adapter_sha256": adapter_sha256(folder),
                "adapter": config.adapter.model_dump(mode="json"),
                "base": {
                    key: value
                    for key, value in read_json(base / MANIFEST).items()
                    if key in ("model", "revision", "context")
                },
                "precision": precision(config.adapter.method)[0],
                "environment": {
                    "python": platform.python_version(),
                    **{package: version(package) for package in PACKAGES},
                },
                "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
            },
        )


def _start_from(incumbent: Path, config: Config) -> bool:
    """Whether to go on from the champion's adapter. Raises BaseModelError when its base or its shape is another than the one asked for."""
    if config.train.start_from == "base" or read_json(incumbent / MANIFEST)["version"] is None:
        return False
    if (incumbent / "base").exists():
        raise BaseModelError(
            "the champion's adapter was trained on another base", remedy="set `train.start_from: base`"
        )
    check_start(incumbent, config.adapter)
    return True


def _inputs(tokens: Path, base: Path, incumbent: Path, start: bool, config: Config) -> dict[str, str]:
    """What the weights depend on."""
    manifest = read_json(base / MANIFEST)
    parts = {
        "tokens": read_json(tokens / "profile.json")["sha256"],
        "base": {key: manifest.get(key) for key in ("model", "revision", "files", "weights")},
        "params": {
            "train": config.train.model_dump(mode="json", exclude={"checkpoint_minutes"}),
            "adapter": config.adapter.model_dump(mode="json"),
        },
        "code": stage_key("train", Path(__file__).parents[1]),
    }
    hashes = {name: sha256_json(part) for name, part in parts.items()}
    teacher = (
        {"teacher": adapter_sha256(incumbent)}
        if config.train.teacher == CHAMPION and read_json(incumbent / MANIFEST)["version"] is not None
        else {}
    )
    return {**hashes, "start": adapter_sha256(incumbent) if start else "base", **teacher}


def _batches(tokens: Path, incumbent: Path) -> list[str]:
    """Every batch that the weights have seen, the champion's included."""
    return sorted(
        {*read_json(tokens / "profile.json")["batches"], *read_json(incumbent / MANIFEST)["batches"]}
    )


def _schedule(num_batches: int, computed: str, config: Config) -> Any:
    from ratchet.training.schedule import Schedule

    train = config.train
    steps = train.steps(num_batches)
    return Schedule(
        steps=steps,
        batch_windows=train.batch_windows,
        accumulate=train.accumulate,
        learning_rate=train.learning_rate,
        kind=train.schedule,
        warmup_share=train.warmup_share,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        evaluations=min(train.evaluations, steps),
        patience=train.patience,
        seed=train.seed,
        optimizer=train.optimizer,
        checkpoint_activations=train.checkpoint_activations,
        neftune_alpha=train.neftune_alpha,
        compile=train.compile,
        liger=train.liger,
        compute=computed,
        teacher_weight=train.teacher_weight if train.teacher else 0.0,
        temperature=train.teacher_temperature,
    )


def _pad_id(tokenizer: Any) -> int:
    from ratchet.models.chat_template import ChatFormat

    return ChatFormat(tokenizer).pad_id


def _main(config: Config, arguments: argparse.Namespace) -> None:
    if config.train.processes > 1:
        become_torchrun(config.train.processes, "tasks.train", sys.argv[1:])
        end_with_parent()
    train(arguments.tokens, arguments.base, arguments.incumbent, arguments.out, arguments.reports, config)


if __name__ == "__main__":
    run_stage(__doc__, ["tokens", "base", "incumbent", "out", "reports"], _main)
