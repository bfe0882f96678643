"""One optimisation through transformers' Trainer: packed windows in, the best weights by validation loss left in the model.

Deterministic on CPU: same commit, same data, same bytes, whether or not it was killed and gone on with. Several processes (torchrun)
share the forward passes of a step.
A GPU computes windows as they are packed. A CPU computes their rows in batches of like length with plain attention (docs/lab-notes.md).
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ratchet.errors import ConfigError, StoppedError
from ratchet.training.collation import _Collator, _Items, _RowCollator
from ratchet.training.distributed import (
    any_of,
    as_parts,
    check_size,
    cut,
    cut_optimizer,
    rank,
    shard,
    whole,
    world_size,
)
from ratchet.training.kernels import apply_liger, check_compiler, compiled, fast_attention
from ratchet.training.loss import _Head, _Teacher
from ratchet.training.packing import IGNORED, Window, group_rows
from ratchet.training.schedule import CUDA_OPTIMIZERS, OPTIMIZERS, SCHEDULES, Outcome, Report, Schedule
from ratchet.training.state import _check_weights, _put, _random_state, _set_random_state, _Watch, trainable

if TYPE_CHECKING:
    from ratchet.training.checkpoints import Checkpoints, Saved

LOGS = 100  # points on the training curve, at most; each costs a synchronisation on a GPU


def count_batches(windows: Sequence[Window], batch_windows: int, *, apart: bool | None = None) -> int:
    """Forward passes of an epoch."""
    apart = _faster_apart() if apart is None else apart
    return len(group_rows(windows, batch_windows)) if apart else math.ceil(len(windows) / batch_windows)


def _faster_apart() -> bool:
    return not torch.cuda.is_available()


def fit(
    model: torch.nn.Module,
    windows: Sequence[Window],
    validation: Sequence[Window],
    schedule: Schedule,
    *,
    pad_id: int,
    report: Report,
    text_weight: float | None = None,
    apart: bool | None = None,
    teacher: torch.nn.Module | None = None,
    sharded: bool = False,
    checkpoints: Checkpoints | None = None,
    saved: Saved | None = None,
) -> Outcome:
    """Train `model` in place, from `saved` on if there is one. Raises DivergenceError when a loss, a gradient or a weight stops being finite; ConfigError; StoppedError.

    With `text_weight` the prompt's tokens count in the loss as well, with that weight (the demo's base learns to read from them).
    `apart`: rows by themselves in batches of like length, as virtual tokens before each row ask for; by default on a CPU, where it is faster.
    `teacher`: a model of the same tokenizer, from whose distribution the model learns too (arXiv 1503.02531); it is not changed.
    `sharded`: among several processes each keeps a part of the model, which stays so (`ratchet.training.distributed`); otherwise each keeps all of it.
    """
    if schedule.optimizer in CUDA_OPTIMIZERS and not torch.cuda.is_available():
        raise ConfigError(
            f"`train.optimizer: {schedule.optimizer}` needs a GPU with CUDA, and this machine has none",
            remedy="set `train.optimizer: adamw` or `adafactor`",
        )
    if schedule.compile:
        check_compiler()
    if schedule.liger:
        apply_liger(model)
    set_seed(schedule.seed)
    # Filling fresh memory is for finding reads of it; results do not depend on it, and it costs a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    batches: Sequence[Any] = windows
    held_out: Sequence[Any] = validation
    if apart := _faster_apart() if apart is None else apart:
        batches, held_out = (
            group_rows(windows, schedule.batch_windows),
            group_rows(validation, schedule.batch_windows) if validation else [],
        )
    batch_items = 1 if apart else schedule.batch_windows
    # Every step has the same number of forward passes, so that processes can share them; the last ones may be of nothing.
    nothing = Window([pad_id], [IGNORED], [0])
    batches = [
        *batches,
        *(
            [[nothing] if apart else nothing] * (-len(batches) % (batch_items * schedule.accumulate))
            if schedule.accumulate > 1
            else []
        ),
    ]
    longest = (
        max(window.position_ids[-1] + 1 for window in windows)
        if apart
        else max(len(window.input_ids) for window in windows)
    )
    with contextlib.ExitStack() as at_the_end:
        scratch = at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="ratchet-train-"))
        at_the_end.enter_context(fast_attention(model, longest))
        head, taught = (
            at_the_end.enter_context(_Head(model)),
            at_the_end.enter_context(_Teacher(teacher, schedule.temperature)),
        )
        arguments = _arguments(scratch, schedule, batch_items=batch_items, evaluates=bool(validation))
        check_size(world_size(), arguments.world_size)  # the processes meet here
        if sharded:
            shard(model)
        if schedule.compile:
            at_the_end.enter_context(compiled(model))
        watch = _Watch(model, schedule, report)
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=_Items(batches),
            eval_dataset=_Items(held_out) if validation else None,
            data_collator=_RowCollator(pad_id) if apart else _Collator(pad_id),
            callbacks=[watch],
        )
        trainer.model_accepts_loss_kwargs = (
            True  # our loss is over the tokens of all forward passes of a step
        )
        trainer.text_weight, trainer.head, trainer.teacher, trainer.teacher_weight = (
            text_weight,
            head,
            taught,
            schedule.teacher_weight,
        )
        trainer.autocast = torch.autocast(
            "cpu", torch.bfloat16, enabled=schedule.compute == "bfloat16" and not torch.cuda.is_available()
        )
        trainer.validation_density = sum(
            label != IGNORED for window in validation for label in window.labels
        ) / (len(held_out) or 1)
        trainer.watch, trainer.checkpoints, trainer.saved, trainer.started = (
            watch,
            checkpoints,
            saved,
            time.perf_counter(),
        )
        trainer.add_callback(_Pace(trainer))
        trainer.remove_callback(PrinterCallback)
        result = trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None)
    done = trainer.state.global_step
    if checkpoints and checkpoints.stop_asked and done < schedule.steps and not watch.out_of_patience:
        raise StoppedError(
            f"asked to stop at step {done} of {schedule.steps}",
            remedy="run it again: it goes on from its newest checkpoint; the champion is untouched",
        )
    watch.restore_best()
    _check_weights(model)
    return Outcome(
        done, watch.best_step or done, watch.best_loss, float(result.training_loss), trainer.seconds
    )


def _arguments(scratch: str, schedule: Schedule, *, batch_items: int, evaluates: bool) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=scratch,
        max_steps=schedule.steps,
        per_device_train_batch_size=batch_items,
        per_device_eval_batch_size=batch_items,
        gradient_accumulation_steps=schedule.accumulate // world_size(),
        ddp_backend=None if cuda or world_size() == 1 else "gloo",
        learning_rate=schedule.learning_rate,
        lr_scheduler_type=SCHEDULES[schedule.kind],
        warmup_steps=math.ceil(schedule.warmup_share * schedule.steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        optim=OPTIMIZERS[schedule.optimizer],
        activation_checkpointing=schedule.checkpoint_activations,
        activation_checkpointing_kwargs={"use_reentrant": False} if schedule.checkpoint_activations else None,
        neftune_noise_alpha=schedule.neftune_alpha or None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=max(1, schedule.steps // schedule.evaluations),
        logging_steps=max(1, schedule.steps // LOGS),
        # The default filter writes a loss of NaN down as 0.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=cuda and schedule.compute == "bfloat16",
        fp16=cuda and schedule.compute == "float16",
        dataloader_pin_memory=cuda,
        seed=schedule.seed,
        data_seed=schedule.seed,
        full_determinism=not cuda,
    )


class _Trainer(Trainer):
    """With a loss of our own, and checkpoints of our own in place of its pickles: what it would save and load is overridden."""

    text_weight: float | None = None
    head: _Head
    teacher: _Teacher
    teacher_weight: float
    autocast: Any
    validation_density: float  # learned tokens a window, or a group of rows
    watch: _Watch
    checkpoints: Checkpoints | None
    saved: Saved | None
    started: float

    @property
    def seconds(self) -> float:
        """Of the optimisation, those before a kill included as far as its checkpoint knew them."""
        return time.perf_counter() - self.started + (self.saved.state["seconds"] if self.saved else 0.0)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called behind an optimizer step, its point on the curve and its evaluation."""
        if self.watch.out_of_patience:  # it ends here; a start from here would not
            return
        assert self.checkpoints and self.optimizer and self.lr_scheduler
        weights = trainable(self.model)
        tensors = whole(
            {
                "weights": weights,
                "optimizer": self.optimizer.state_dict(),
                "best": as_parts(self.watch.best, weights),
            }
        )
        if rank():
            return
        state = {
            "weights": tensors["weights"],
            "optimizer": tensors["optimizer"],
            "scheduler": self.lr_scheduler.state_dict(),
            "watch": {**self.watch.state(), "best": tensors["best"]},
            "random": _random_state(),
            "losses": {
                "since_log": self._tr_loss,
                "total": self._total_loss_scalar,
                "last_log": self._globalstep_last_logged,
            },
            "seconds": self.seconds,
        }
        self.checkpoints.write(self.state.global_step, state, self.state.save_to_json)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.saved
        _put(self.model, cut(self.saved.state["weights"], trainable(self.model)))
        watch = self.saved.state["watch"]
        self.watch.restore({**watch, "best": cut(watch["best"], trainable(self.model))})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.saved and self.optimizer and self.lr_scheduler:
            self.optimizer.load_state_dict(cut_optimizer(self.saved.state["optimizer"], self.optimizer))
            self.lr_scheduler.load_state_dict(self.saved.state["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.saved:
            _set_random_state(self.saved.state["random"])

    def restore_losses(self) -> None:
        """The Trainer starts its sums anew at every start."""
        if self.saved:
            kept = self.saved.state["losses"]
            self._tr_loss, self._total_loss_scalar, self._globalstep_last_logged = (
                kept["since_log"].to(self.args.device),
                kept["total"],
                kept["last_log"],
            )
            self._initial_global_step = 0

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        ids, learned = inputs["input_ids"], inputs["labels"][:, 1:] != IGNORED
        weights = learned.float()
        if self.text_weight is not None and model.training:
            # A row's first token and padding are no targets: nothing of their own row predicts them.
            own = (
                inputs["position_ids"][:, 1:] > 0
                if "position_ids" in inputs
                else inputs["attention_mask"][:, 1:] > 0
            )
            weights = torch.where(learned, 1.0, self.text_weight) * own
            num_items_in_batch = weights.sum() * self.args.gradient_accumulation_steps
        elif not model.training:
            # The mean over items of what this gives is the loss a learned token, whatever the batches are.
            num_items_in_batch = self.validation_density * (len(ids) if "position_ids" in inputs else 1)
        chosen = weights > 0
        self.head.chosen = chosen
        seen = {name: value for name, value in inputs.items() if name != "labels"}
        # An evaluation is no reason to compile everything once more.
        with self.autocast if model.training else torch.compiler.set_stance("force_eager"):
            logits = model(**seen, use_cache=False).logits[0].float()  # (chosen, vocab)
            taught = self.teacher(seen, chosen) if model.training and self.teacher else None
        losses = cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
        if taught is not None:
            losses = (1 - self.teacher_weight) * losses + self.teacher_weight * self.teacher.divergence(
                logits, taught
            )
        if model.training and self.args.world_size > 1:
            losses = (
                losses * self.args.world_size
            )  # the gradients of all processes are averaged, the tokens counted together
        loss = (losses * weights[chosen]).sum() / num_items_in_batch
        return (loss, {}) if return_outputs else loss


class _Pace(TrainerCallback):
    """When checkpoints are due, and when the training is asked to stop; between two optimizer steps."""

    def __init__(self, trainer: _Trainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.restore_losses()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        checkpoints = self._trainer.checkpoints
        if not checkpoints:
            return
        due, checkpoints.stop_asked = any_of([checkpoints.due, checkpoints.stop_asked])
        if due and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = control.should_training_stop or checkpoints.stop_asked
