"""Train on the packed windows by the method of `adapter.method`, from the base or from the champion's
weights.

    python -m tasks.train --tokens data/tokenized --base models/base --incumbent models/incumbent \\
        --out models/candidate --reports reports/train

Writes the adapter, or for `full` the whole model (safetensors), tokenizer, chat template and manifest.json to
--out, and the curve and the figures to --reports. With `train.privacy` the ledger of what trainings have
spent, privacy.json beside --reports, is read first and written last. Checkpoints go to .ratchet/checkpoints
of RATCHET_ROOT (the checkout) or of the working directory; the same command resumes from the newest one.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.errors import BaseModelError, DataError
from ratchet.federation.records import ledgers
from ratchet.files import read_json, require_space, sha256_json, whole_folder, write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.adapters import (
    PREFIXED,
    RESIDUAL,
    check_context,
    check_start,
    complete_version,
    freeze_factor,
    load_trainable,
    moved,
    save_trained,
    versions,
)
from ratchet.models.loading import (
    MANIFEST,
    adapter_sha256,
    compute_dtype,
    device,
    load_chat,
    quiet,
)
from ratchet.models.manifests import read_base_manifest
from ratchet.pipeline.dag import stage_key
from ratchet.pipeline.stage import project_root, run_stage, say
from ratchet.privacy.accountant import Mechanism, noise_for
from ratchet.privacy.ledger import FILE as LEDGER
from ratchet.privacy.ledger import Promise, Spending, add_spending, check_budget, read_spendings
from ratchet.tracking.curve import History, LiveCopy, read_history
from ratchet.training.distributed import (
    become_torchrun,
    check_size,
    end_with_parent,
    in_parts,
    leads_another_node,
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
    from ratchet.training.collation import Private
    from ratchet.training.packing import Window

ROOM = 200 * 2**20  # bytes that must be free on the disk, beside the trained weights


def train(tokens: Path, base: Path, incumbent: Path, out: Path, reports: Path, config: Config) -> Figures:
    """Train, and write the candidate to `out`, the curve and the figures to `reports`.

    Writes neither when it raises ConfigError, DiskSpaceError, BaseModelError, DivergenceError, StoppedError.
    """
    check_size(config.train.world_size, world_size())
    require_space(out.parent, ROOM, "the candidate")
    training = Training(tokens, base, incumbent, out, config)
    if config.train.privacy.epsilon:
        training.make_private(reports.parent / LEDGER.name)
    if rank():
        # Only the first process prints and writes; the others compute, and read the same checkpoint.
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            checkpoints = training.checkpoints(curve=list)
            trained = training.optimise(lambda step, values: None, lambda points: None, checkpoints)
        if config.train.nodes > 1 and leads_another_node():
            checkpoints.forget()  # what node 0 has sent
        return training.figures(trained)
    with whole_folder(reports) as report_folder, closing(History(report_folder / "history.jsonl")) as history:
        # Trainings with the same key are the same training, so a run with this key may be reused.
        tags = {"mlflow.runName": f"train-{training.run_key[:8]}", "ratchet.state": "training"}
        copy = LiveCopy(history.path, config.project.name, training.run_key, tags)
        if "MLFLOW_TRACKING_URI" in os.environ:
            copy.start()
        checkpoints = training.checkpoints(curve=lambda: read_history(history.path))
        trained = training.optimise(_report(history), history.restore, checkpoints)
        training.save(trained, reports.parent / LEDGER.name)
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


def _spent_elsewhere(root: Path, ledger: Path) -> list[Spending]:
    """Return what the other kind of training has spent of the rows at `root`: rounds, or a node's own."""
    own, rounds = ledgers(root.resolve())
    return read_spendings(own if ledger.resolve() == rounds else rounds)


class Spends(NamedTuple):
    """What a private training is going to spend: `most` is the ε of its rows with earlier trainings."""

    mechanism: Mechanism
    units: list[list[Window]]  # the rows of each
    most: float


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
        self._spends: Spends | None = None

    def make_private(self, ledger: Path) -> None:
        """Choose the noise for `train.privacy`, before anything is loaded.

        Raises DataError if the rows' budget of ε in `ledger` does not suffice, or δ is too large for so few
        rows; BaseModelError if the start has learned rows without privacy; ConfigError without Opacus.
        """
        privacy, train = self._config.train.privacy, self._config.train
        assert privacy.epsilon
        champion = read_json(self._incumbent / MANIFEST)
        if self._start and "privacy" not in champion:
            raise BaseModelError(
                f"`train.privacy.epsilon` is {privacy.epsilon:g}, and v{champion['version']}, from which "
                f"this training would start, has learned {len(champion['batches'])} batches without privacy: "
                "no noise hides that now",
                remedy="set `train.start_from: base`",
            )
        units = self._units()
        if privacy.delta >= 1 / len(units):
            raise DataError(
                f"`train.privacy.delta` is {privacy.delta:g}, and there are {len(units)} {privacy.unit}s: a "
                "training that publishes one of them whole would satisfy it",
                remedy=f"set it under {1 / len(units):.1g}",
            )
        rate = min(1.0, privacy.batch_rows / sum(map(len, units)))
        steps = max(1, math.ceil(train.epochs / rate))
        whole = noise_for(privacy.epsilon, privacy.delta, rate, steps * privacy.trainings)
        mechanism = Mechanism(whole.noise_multiplier, rate, steps)
        known = read_spendings(ledger) + _spent_elsewhere(project_root(), ledger)
        most = check_budget(known, mechanism, self._profile["batches"], privacy)
        self._spends = Spends(mechanism, units, most)
        say(
            f"train: private by {privacy.unit}: ε = {privacy.epsilon:g}, δ = {privacy.delta:g} "
            f"({mechanism.told}); with earlier trainings ε = {most:.3g} of {privacy.most:g} for those that "
            "have spent most"
        )

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
        private = self._private(checkpoints)
        if private:
            apart, schedule = True, _private_schedule(schedule, private, self._config)
        start = self._incumbent if self._start else None
        model = load_trainable(self._base, start, adapter, seed=settings.seed, in_parts=sharded)
        if settings.factors != "both":
            freeze_factor(model, settings.factors)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        require_space(self._out.parent, ROOM + size, "the candidate")
        count = sum(weight.numel() for weight in weights)
        say(
            f"train: {adapter.method} of {count:,} weights from {'the champion' if start else 'the base'},"
            f" {schedule.steps} steps; computed in {computed}: {why}"
        )
        if settings.world_size > 1:
            held = "a part" if sharded else "all"
            on = f" on {settings.nodes} nodes" if settings.nodes > 1 else ""
            say(f"train: {settings.world_size} processes{on}, each with {held} of the model")
        loss = self._load_loss(shown=holds_pictures([*windows, *validation]))
        chat = load_chat(self._base, MediaStore.read(self._tokens / MEDIA))
        saved = (
            checkpoints.newest_on_all_nodes(restore) if settings.nodes > 1 else checkpoints.newest(restore)
        )
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
                private=private,
            )
        epochs = outcome.steps * settings.accumulate / num_batches
        return Trained(
            model,
            whole(trainable(model)) if sharded else None,
            outcome,
            count,
            epochs=outcome.steps * private.mechanism.sampling_rate if private else epochs,
            learned_tokens=sum(label != IGNORED for window in windows for label in window.labels),
        )

    def _units(self) -> list[list[Window]]:
        """Return the rows that are protected as one. Raises DataError for users of whom none is named."""
        from ratchet.training.collation import by_user, rows_apart

        privacy, rows = self._config.train.privacy, rows_apart(read_windows(self._tokens / "train.arrow"))
        if privacy.unit == "row":
            return [[row] for row in rows]
        if not rows[0].owners:
            raise DataError(
                f"`train.privacy.unit` is user, and none of {len(rows)} rows names one",
                remedy="give rows a column `user` and name it in `prepare.extra_keys`, or put it into `meta`",
            )
        users = by_user(rows, privacy.user_rows)
        if left := len(rows) - sum(map(len, users)):
            say(
                f"train: {left} of {len(rows)} rows are left out: `train.privacy.user_rows` is "
                f"{privacy.user_rows}"
            )
        return users

    def _private(self, checkpoints: Checkpoints) -> Private | None:
        if self._spends is None:
            return None
        from ratchet.training.collation import Private

        return Private(
            self._spends.mechanism,
            self._config.train.privacy.max_grad_norm,
            checkpoints.keep_key(),
            self._spends.units,
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

    def save(self, trained: Trained, ledger: Path) -> None:
        """Write the candidate, its manifest last: the manifest's existence means that the folder is complete.

        The manifest holds no time and no path, so that equal trainings give equal bytes. What a training with
        privacy has spent is in `ledger` before there is a candidate.
        """
        with whole_folder(self._out) as folder:
            save_trained(trained.model, self._base, folder, trained.weights)
            complete_version(
                folder,
                self._base,
                run_key=self.run_key,
                inputs=self._inputs,
                # Every batch that the weights have seen, the champion's included.
                batches={*self._profile["batches"], *read_json(self._incumbent / MANIFEST)["batches"]},
                profile=self._profile,
                adapter=self._config.adapter,
                more={
                    **self._taught_by(),
                    **(self._spent(self._spends, folder, ledger) if self._spends else {}),
                },
            )

    def _taught_by(self) -> dict[str, list[str]]:
        """Return the part of the manifest that names the nodes that taught the champion this learns from."""
        learns = self._start or self._config.train.teacher
        nodes = read_json(self._incumbent / MANIFEST).get("taught_by", [])
        return {"taught_by": nodes} if learns and nodes else {}

    def _spent(self, spends: Spends, folder: Path, ledger: Path) -> dict[str, Any]:
        """Add this training to the ledger; return the part of the manifest that says what it promises."""
        privacy = self._config.train.privacy
        assert privacy.epsilon
        spending = Spending(
            run_key=self.run_key,
            adapter_sha256=adapter_sha256(folder),
            mechanism=spends.mechanism,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            unit=privacy.unit,
            units=len(spends.units),
            batches=self._profile["batches"],
        )
        add_spending(ledger, spending)
        promise = Promise(
            **msgspec.structs.asdict(spending),
            max_grad_norm=privacy.max_grad_norm,
            epsilon_together=spends.most,
            moved=moved(self._incumbent if self._start else None, folder),
        )
        return {"privacy": msgspec.to_builtins(promise)}

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
    return {"device": device(), "computed": compute_dtype("auto")[0], **versions()}


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
    residual = {"residual": adapter_sha256(incumbent / RESIDUAL)} if (incumbent / RESIDUAL).exists() else {}
    return {**hashes, "start": adapter_sha256(incumbent) if start else "base", **residual, **teacher}


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


def _private_schedule(schedule: Schedule, private: Private, config: Config) -> Schedule:
    steps = private.mechanism.steps
    return schedule._replace(steps=steps, evaluations=min(config.train.evaluations, steps))


def _main(config: Config, arguments: argparse.Namespace) -> None:
    if config.train.world_size > 1:
        become_torchrun(config.train, "tasks.train", sys.argv[1:])
        end_with_parent()
    train(arguments.tokens, arguments.base, arguments.incumbent, arguments.out, arguments.reports, config)


if __name__ == "__main__":
    run_stage(__doc__, ["tokens", "base", "incumbent", "out", "reports"], _main)
