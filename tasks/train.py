"""Train on the packed windows by the method of `adapter.method`, from the base or from the champion's
weights.

    python -m tasks.train --tokens data/tokenized --base models/base --incumbent models/incumbent \\
        --out models/candidate --reports reports/train

Writes the adapter, or for `full` the whole model (safetensors), tokenizer, chat template and manifest.json to
--out, and the curve and the figures to --reports. Checkpoints go to .ratchet/checkpoints of RATCHET_ROOT (the
checkout) or of the working directory; the same command resumes from the newest one.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.config.params import Config
from ratchet.errors import BaseModelError
from ratchet.files import read_json, require_space, sha256_file, sha256_json, whole_folder, write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.adapters import PREFIXED, check_context, check_start, load_trainable, save_trained
from ratchet.models.loading import (
    MANIFEST,
    adapter_sha256,
    compute_dtype,
    device,
    load_chat,
    precision,
    quiet,
)
from ratchet.models.manifests import BaseName, read_base_manifest, write_generation
from ratchet.models.processors import copy_processor
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
from ratchet.training.loss import CHAMPION, AnswerLoss, PreferenceLoss, load_teacher
from ratchet.training.packing import IGNORED, read_windows
from ratchet.training.schedule import Figures, Outcome, Points, Report, Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from ratchet.training.checkpoints import Checkpoints

ROOM = 200 * 2**20  # bytes that must be free on the disk, beside the trained weights
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def train(tokens: Path, base: Path, incumbent: Path, out: Path, reports: Path, config: Config) -> Figures:
    """Train, and write the candidate to `out`, the curve and the figures to `reports`.

    Writes neither when it raises ConfigError, DiskSpaceError, BaseModelError, DivergenceError, StoppedError.
    """
    check_size(config.train.processes, world_size())
    require_space(out.parent, ROOM, "the candidate")
    training = Training(tokens, base, incumbent, out, config)
    if rank():
        # Only the first process prints and writes; the others compute, and read the same checkpoint.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            trained = training.optimise(
                lambda step, values: None, lambda points: None, training.checkpoints(curve=list)
            )
        return training.figures(trained)
    with whole_folder(reports) as report_folder, closing(History(report_folder / "history.jsonl")) as history:
        # Trainings with the same key are the same training, so a run with this key may be reused.
        tags = {"mlflow.runName": f"train-{training.run_key[:8]}", "ratchet.state": "training"}
        copy = LiveCopy(history.path, config.project.name, training.run_key, tags)
        if "MLFLOW_TRACKING_URI" in os.environ:
            copy.start()
        checkpoints = training.checkpoints(curve=lambda: read_history(history.path))
        trained = training.optimise(_report(history), history.restore, checkpoints)
        training.save(trained)
        _tell(trained.outcome)
        figures = training.figures(trained)
        write_json(report_folder / "figures.json", figures)
        delivered = "MLFLOW_TRACKING_URI" in os.environ and copy.finish()
    checkpoints.forget()
    say(f"train: curve {'delivered to MLflow' if delivered else 'kept locally; the flow delivers it'}")
    return figures


def _report(history: History) -> Report:
    def report(step: int, values: dict[str, float]) -> None:
        history.add(step, values)
        if "validation_loss" in values:
            say(f"train: step {step}, validation loss {values['validation_loss']:.4f}")

    return report


def _tell(outcome: Outcome) -> None:
    best = outcome.best_validation_loss
    told = "no validation rows" if best is None else f"best validation loss {best:.4f}"
    say(f"train: {outcome.steps} steps in {outcome.seconds:.0f} s, {told} at step {outcome.best_step}")


class Trained(NamedTuple):
    """A model with its best weights, and the figures of its training.

    `weights` are the whole tensors where this process holds only a part of the model, else None.
    """

    model: Any
    weights: dict[str, Tensor] | None
    outcome: Outcome
    num_weights: int
    epochs: float
    learned_tokens: int  # in one epoch


class Training:
    """One training, as each of its processes computes it.

    `run_key` is a hash of its inputs: tokens, base, params, code, and the champion where it is used.
    """

    def __init__(self, tokens: Path, base: Path, incumbent: Path, out: Path, config: Config) -> None:
        """Read the inputs and compute `run_key`.

        Raises BaseModelError when the champion's base or shape is not the one asked for.
        """
        self._tokens, self._base, self._incumbent, self._out = tokens, base, incumbent, out
        self._config = config
        self._profile = read_json(tokens / "profile.json")
        self._start = _start_from(incumbent, config)
        self._inputs = _inputs(tokens, base, incumbent, self._start, config)
        self.run_key = sha256_json(self._inputs)[:32]

    def checkpoints(self, *, curve: Callable[[], Points]) -> Checkpoints:
        from ratchet.training.checkpoints import Checkpoints

        facts = {**self._inputs, **_machine(), **_settings(self._config)}
        minutes = self._config.train.checkpoint_minutes
        return Checkpoints(project_root(), self.run_key, facts, minutes=minutes, curve=curve)

    def optimise(
        self, report: Report, restore: Callable[[Points], None], checkpoints: Checkpoints
    ) -> Trained:
        """Train, from the newest checkpoint where there is one. Raises StoppedError after a SIGTERM."""
        from ratchet.training.collation import count_batches, holds_pictures
        from ratchet.training.distributed import whole
        from ratchet.training.state import trainable
        from ratchet.training.trainer import fit

        adapter, settings = self._config.adapter, self._config.train
        sharded = in_parts(settings, adapter)
        take_gpu()
        windows = read_windows(self._tokens / "train.arrow")
        validation = read_windows(self._tokens / "validation.arrow")
        if not validation:
            say(
                "train: WARNING: there are no validation rows: nothing can stop this training early, and its"
                " last weights are kept (`prepare.validation_share`, or ingest more rows)"
            )
        # Positions restart with each row, so this is the longest row in tokens, not the longest window.
        longest = 1 + max(max(window.position_ids) for window in (*windows, *validation))
        check_context(self._base, adapter, longest)
        # True: rows are not packed, because virtual tokens or the base forbid it; None: the faster of both.
        apart = True if adapter.method in PREFIXED or not read_base_manifest(self._base).packs else None
        num_batches = count_batches(windows, settings.batch_windows, apart=apart)
        computed, why = compute_dtype(settings.precision)
        schedule = _schedule(num_batches, computed, self._config)
        start = self._incumbent if self._start else None
        model = load_trainable(self._base, start, adapter, seed=settings.seed, in_parts=sharded)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        require_space(self._out.parent, ROOM + size, "the candidate")
        count = sum(weight.numel() for weight in weights)
        say(
            f"train: {adapter.method} of {count:,} weights from {'the champion' if start else 'the base'},"
            f" {schedule.steps} steps; computed in {computed}: {why}"
        )
        if settings.processes > 1:
            held = "a part" if sharded else "all"
            say(f"train: {settings.processes} processes, each with {held} of the model")
        loss = self._load_loss(shown=holds_pictures([*windows, *validation]))
        chat = load_chat(self._base, MediaStore.read(self._tokens / MEDIA))
        saved = checkpoints.newest(restore)
        if saved:
            say(f"train: goes on from the checkpoint of step {saved.step} of {schedule.steps}")
        with quiet(), checkpoints.asked_by_sigterm():
            outcome = fit(
                model,
                windows,
                validation,
                schedule,
                loss=loss,
                pad_id=chat.pad_id,
                report=report,
                apart=apart,
                inputs=chat.inputs,
                sharded=sharded,
                checkpoints=checkpoints,
                saved=saved,
            )
        return Trained(
            model,
            whole(trainable(model)) if sharded else None,
            outcome,
            count,
            epochs=outcome.steps * settings.accumulate / num_batches,
            learned_tokens=sum(label != IGNORED for window in windows for label in window.labels),
        )

    def _load_loss(self, *, shown: bool) -> AnswerLoss | PreferenceLoss:
        settings = self._config.train
        if shown and settings.teacher not in ("", CHAMPION):
            raise BaseModelError(
                f"the rows show pictures, and the teacher {settings.teacher} is loaded as a model of text",
                remedy="set `train.teacher: champion`, or learn from its answers: `ratchet synthesize`",
            )
        if settings.objective != "sft":
            return PreferenceLoss(
                beta=settings.preference_beta,
                chosen_weight=settings.chosen_weight,
                undesirable_weight=settings.undesirable_weight,
            )
        teacher = load_teacher(settings.teacher, self._base, self._incumbent)
        if settings.teacher:
            say(
                f"train: learns from {settings.teacher}, too"
                if teacher
                else "train: there is no champion to learn from yet"
            )
        return AnswerLoss(
            teacher, teacher_weight=settings.teacher_weight, temperature=settings.teacher_temperature
        )

    def save(self, trained: Trained) -> None:
        """Write the candidate, its manifest last: the manifest's existence means that the folder is complete.

        The manifest holds no time and no path, so that equal trainings give equal bytes.
        """
        base = read_json(self._base / MANIFEST)
        environment = {"python": platform.python_version(), **_versions()}
        with whole_folder(self._out) as folder:
            save_trained(trained.model, self._base, folder, trained.weights)
            chat = load_chat(self._base)
            chat.tokenizer.save_pretrained(folder)
            copy_processor(self._base, folder)
            write_generation(folder, chat.stop_ids, chat.pad_id)
            manifest = {
                "run_key": self.run_key,
                "inputs": self._inputs,
                # Every batch that the weights have seen, the champion's included.
                "batches": sorted(
                    {*self._profile["batches"], *read_json(self._incumbent / MANIFEST)["batches"]}
                ),
                "canaries": self._profile.get("canaries", 0),
                "adapter_sha256": adapter_sha256(folder),
                "adapter": self._config.adapter.model_dump(mode="json"),
                "base": {key: base[key] for key in BaseName.__struct_fields__ if key in base},
                "max_length": self._profile["max_length"],
                "precision": precision(self._config.adapter.method)[0],
                "environment": environment,
                "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
            }
            write_json(folder / MANIFEST, manifest)

    def figures(self, trained: Trained) -> Figures:
        """Return the training's figures; call this after `save`, so that the memory peak includes saving."""
        return {
            **trained.outcome._asdict(),  # type: ignore[typeddict-item]  # mypy sees a dict without keys
            "trainable_weights": trained.num_weights,
            "epochs": trained.epochs,
            "learned_tokens_per_second": (trained.learned_tokens * trained.epochs / trained.outcome.seconds),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **_peak_of_gpu(),
            "run_key": self.run_key,
            "rows": self._profile["train"],
        }


def _peak_of_gpu() -> dict[str, float]:
    """Return the GPU's peak memory, with torch's reserved cache and without the driver's own memory."""
    import torch

    return {"peak_gpu_mib": torch.cuda.max_memory_reserved() / 2**20} if torch.cuda.is_available() else {}


def _settings(config: Config) -> dict[str, object]:
    """Return the settings key by key, so that messages can name those that changed."""
    train = config.train.model_dump(mode="json", exclude={"checkpoint_minutes"})
    return {f"train.{key}": value for key, value in train.items()} | {
        f"adapter.{key}": value for key, value in config.adapter.model_dump(mode="json").items()
    }


def _machine() -> dict[str, str]:
    """Return what the weights depend on besides the inputs; a training resumes only where it is equal."""
    return {"device": device(), "computed": compute_dtype("auto")[0], **_versions()}


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _start_from(incumbent: Path, config: Config) -> bool:
    """Tell whether to start from the champion's weights.

    Raises BaseModelError when its base or its shape is not the one asked for.
    """
    if config.train.start_from == "base" or read_json(incumbent / MANIFEST)["version"] is None:
        return False
    if (incumbent / "base").exists():
        raise BaseModelError(
            "the champion's adapter was trained on another base", remedy="set `train.start_from: base`"
        )
    check_start(incumbent, config.adapter)
    return True


def _inputs(tokens: Path, base: Path, incumbent: Path, start: bool, config: Config) -> dict[str, str]:
    """Return the sha256 of each thing that the weights depend on."""
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


def _schedule(num_batches: int, computed: str, config: Config) -> Schedule:
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
        proximal=train.proximal,
        compile=train.compile,
        liger=train.liger,
        compute=computed,
    )


def _main(config: Config, arguments: argparse.Namespace) -> None:
    if config.train.processes > 1:
        become_torchrun(config.train.processes, "tasks.train", sys.argv[1:])
        end_with_parent()
    train(arguments.tokens, arguments.base, arguments.incumbent, arguments.out, arguments.reports, config)


if __name__ == "__main__":
    run_stage(__doc__, ["tokens", "base", "incumbent", "out", "reports"], _main)
