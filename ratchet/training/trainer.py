"""Run one optimisation through transformers' Trainer, and leave the best weights in the model.

Deterministic on a CPU: the same commit and data give the same bytes, even after a kill and a resume. Several
processes (torchrun) share the forward passes of a step. A GPU computes windows as they are packed; a CPU
computes their rows in batches of similar length with plain attention, which is faster (docs/lab-notes.md).
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
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
from ratchet.models.cache import logits_at, place_rows
from ratchet.models.generation import Inputs, no_inputs
from ratchet.privacy.gradients import RowGradients
from ratchet.training.collation import Batches, Private, draw_batches, make_batches
from ratchet.training.distributed import (
    any_of,
    as_parts,
    check_size,
    cut,
    cut_optimizer,
    local,
    rank,
    shard,
    whole,
    world_size,
)
from ratchet.training.kernels import apply_liger, check_compiler, compiled, fast_attention
from ratchet.training.packing import IGNORED, Window
from ratchet.training.schedule import Outcome, Report, Schedule, check_optimizer, training_arguments
from ratchet.training.state import (
    TrainingState,
    Watch,
    check_weights,
    get_random_state,
    put_weights,
    set_random_state,
    trainable,
)

if TYPE_CHECKING:
    from ratchet.training.checkpoints import Checkpoints, Saved

Batch = dict[str, Tensor]  # columns of a collator, each (batch, seq)
Predict = Callable[[Tensor], Tensor]  # chosen targets (batch, seq - 1) → logits (chosen, vocab)


class Loss(Protocol):
    """The loss that a training minimises, and the loss that is measured on the validation rows."""

    def prepare(self, model: Any, batches: Batches) -> Batches:
        """Return the batches, completed with what the loss needs from the model before its first step."""

    def __call__(self, batch: Batch, predict: Predict, count: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of each learned target, (chosen,), and the divisor of their sum.

        `count`: learned tokens, or units of preferences, in all forward passes of the optimizer step.
        """

    def validate(self, batch: Batch, predict: Predict) -> Tensor:
        """Return the loss of each token, or of each unit, by which trainings are compared."""


def fit(
    model: torch.nn.Module,
    windows: Sequence[Window],
    validation: Sequence[Window],
    schedule: Schedule,
    *,
    loss: Loss,
    pad_id: int,
    report: Report,
    apart: bool | None = None,
    inputs: Inputs = no_inputs,
    sharded: bool = False,
    checkpoints: Checkpoints | None = None,
    saved: Saved | None = None,
    private: Private | None = None,
) -> Outcome:
    """Train `model` in place, from `saved` on if there is one.

    `apart`: single rows in batches of similar length, as virtual tokens before each row require; None: only
    on a CPU, where that is faster. `inputs`: what the model takes of pictures. `sharded`: each
    of several processes keeps a part of the model. `private`: the rows of a step are drawn, their gradients
    clipped and noised; the last weights are kept, because a choice by validation loss would have no noise.
    Raises DivergenceError when a loss, a gradient or a weight stops being finite; ConfigError; StoppedError.
    """
    check_optimizer(schedule.optimizer)
    if schedule.compile:
        check_compiler()
    if schedule.liger:
        apply_liger(model)
    set_seed(schedule.seed)
    # Deterministic mode fills fresh memory, to reveal reads of it. Our results do not depend on that, and it
    # costs a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    batches = make_batches(
        windows,
        validation,
        schedule.batch_windows,
        accumulate=schedule.accumulate,
        pad_id=pad_id,
        apart=apart,
        inputs=inputs,
        place=partial(place_rows, model),
    )
    if private:
        schedule = schedule._replace(max_grad_norm=0.0, patience=schedule.steps + 1)
        batches = draw_batches(batches, windows, private, schedule)
    with contextlib.ExitStack() as at_the_end:
        scratch = at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="ratchet-train-"))
        at_the_end.enter_context(fast_attention(model, batches.longest))
        arguments = training_arguments(
            scratch, schedule, batch_items=batches.items, evaluates=bool(validation)
        )
        check_size(world_size(), arguments.world_size)  # the processes connect here
        batches = loss.prepare(model, batches)
        if sharded:
            shard(model)
        if schedule.compile:
            at_the_end.enter_context(compiled(model))
        watch = Watch(model, schedule, report, keeps_last=private is not None)
        # Before a checkpoint's weights are read, so that a resumed training has the same start.
        near = [_Proximal(model, schedule.proximal)] if schedule.proximal else []
        trainer = (partial(_PrivateTrainer, private) if private else _Trainer)(
            watch=watch,
            checkpoints=checkpoints,
            saved=saved,
            callbacks=near,
            density=batches.density,
            # On a GPU the Trainer does this itself (`bf16`, `fp16`).
            half_on_cpu=schedule.compute == "bfloat16" and not torch.cuda.is_available(),
            model=model,
            args=arguments,
            train_dataset=batches.train,
            eval_dataset=batches.validation if validation else None,
            data_collator=batches.collate,
            compute_loss_func=loss,
        )
        result = trainer.train(resume_from_checkpoint=str(saved.folder) if saved else None)
    done = trainer.state.global_step
    if checkpoints and checkpoints.stop_asked and done < schedule.steps and not watch.out_of_patience:
        raise StoppedError(
            f"asked to stop at step {done} of {schedule.steps}",
            remedy="run it again: it goes on from its newest checkpoint; the champion is untouched",
        )
    if not private:
        watch.restore_best()
    check_weights(model)
    return Outcome(
        done, watch.best_step or done, watch.best_loss, float(result.training_loss), trainer.seconds
    )


class _Trainer(Trainer):
    """A Trainer with a given loss, and with checkpoints of our own in place of transformers' pickles.

    The loss is passed as `compute_loss_func`, for which the Trainer counts the learned tokens of all forward
    passes of a step. Three private methods are overridden because no callback runs at the right time: a
    checkpoint is written after the step's evaluation; weights are loaded before the Trainer looks for its own
    files; the random state is set before the data loader starts an epoch, or after the batches it skips.
    """

    def __init__(
        self,
        *,
        watch: Watch,
        checkpoints: Checkpoints | None,
        saved: Saved | None,
        callbacks: Sequence[TrainerCallback],
        density: float,
        half_on_cpu: bool,
        **settings: Any,
    ) -> None:
        super().__init__(callbacks=[watch, _Pace(self, checkpoints), *callbacks], **settings)
        self.remove_callback(PrinterCallback)
        self._watch, self._checkpoints, self._saved = watch, checkpoints, saved
        self._density = density
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=half_on_cpu)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Return the seconds of the optimisation, including those before the checkpoint resumed from."""
        return time.perf_counter() - self._started + (self._saved.state["seconds"] if self._saved else 0.0)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        whole_model: Any = self.model  # transformers types both as optional
        compute_losses: Any = self.compute_loss_func
        predict = partial(logits_at, model, whole_model.get_output_embeddings(), inputs)
        if model.training:
            with self._autocast:
                losses, count = compute_losses(inputs, predict, num_items_in_batch)
            if self.args.world_size > 1:
                # The gradients of all processes are averaged, but `count` is of the tokens of all of them.
                losses = losses * self.args.world_size
        else:
            losses, count = self._validation_losses(inputs, predict)
        loss = losses.sum() / count
        return (loss, {}) if return_outputs else loss

    def _validation_losses(self, inputs: Batch, predict: Predict) -> tuple[Tensor, float]:
        """Return the losses of a forward pass, and the mean number of losses in a pass of its size.

        With this divisor, the Trainer's mean over items is the loss per learned token for any batches.
        """
        measure: Any = self.compute_loss_func
        with torch.compiler.set_stance("force_eager"):  # an evaluation must not trigger another compilation
            losses = measure.validate(inputs, predict)
        # Only windows have positions; a group of rows is one item.
        items = len(inputs["input_ids"]) if "position_ids" in inputs else 1
        return losses, self._density * items

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._watch.out_of_patience:  # the training ends here, but one resumed from here would not
            return
        assert self._checkpoints and self.optimizer and self.lr_scheduler
        weights = trainable(self.model)
        # All processes take part in joining the parts; the first one writes.
        tensors = whole(
            {
                "weights": weights,
                "optimizer": self.optimizer.state_dict(),
                "best": as_parts(self._watch.best, weights),
            }
        )
        if rank():
            return
        state: TrainingState = {
            "weights": tensors["weights"],
            "optimizer": tensors["optimizer"],
            "scheduler": self.lr_scheduler.state_dict(),
            "watch": {**self._watch.state(), "best": tensors["best"]},
            "random": get_random_state(),
            "losses": {
                "since_log": self._tr_loss,
                "total": self._total_loss_scalar,
                "last_log": self._globalstep_last_logged,
            },
            "seconds": self.seconds,
        }
        self._checkpoints.write(self.state.global_step, state, self.state.save_to_json)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self._saved
        state, weights = self._saved.state, trainable(self.model)
        put_weights(self.model, cut(state["weights"], weights))
        self._watch.restore({**state["watch"], "best": cut(state["watch"]["best"], weights)})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._saved:
            set_random_state(self._saved.state["random"])

    def resume(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Restore the optimizer's state, and the curve's sums, which the Trainer resets at every start."""
        if not self._saved:
            return
        state = self._saved.state
        optimizer.load_state_dict(cut_optimizer(state["optimizer"], optimizer))
        scheduler.load_state_dict(state["scheduler"])
        self._tr_loss = state["losses"]["since_log"].to(self.args.device)
        self._total_loss_scalar = state["losses"]["total"]
        self._globalstep_last_logged = state["losses"]["last_log"]
        self._initial_global_step = 0  # the restored sum of losses is over all steps


class _PrivateTrainer(_Trainer):
    """A Trainer whose steps are those of DP-SGD: drawn rows, each gradient clipped, noise on their sum."""

    def __init__(self, private: Private, **settings: Any) -> None:
        super().__init__(**settings)
        if self.args.fp16:
            raise ConfigError(
                "`train.privacy`: this GPU computes in float16, which scales the loss and so the norms",
                remedy="set `train.precision: float32`",
            )
        self._private = private
        self._gradients = RowGradients(self._module, private.max_grad_norm)

    @property
    def _module(self) -> Any:
        return self.model

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        # Dropout stays off: its masks would come from the public seed, and depend on which rows were drawn.
        model.eval()
        found = [torch.zeros(0, device=self.args.device)]
        # A step that draws no row gets noise alone, as accounted; transformers refuses an empty batch.
        passes: Any = self._prepare_inputs(inputs["passes"]) if inputs["passes"] else []
        for batch, units in passes:
            found.append(self._gradients.add(partial(self._row_losses, model, batch), units))
        self._gradients.release(
            self._private.key,
            inputs["number"],
            noise_multiplier=self._private.mechanism.noise_multiplier,
            divisor=self._private.units_a_step,
        )
        losses = torch.cat(found)
        return losses.mean() if len(losses) else losses.new_zeros(())

    def _row_losses(self, model: Any, batch: Batch) -> Tensor:
        """Return the mean loss of each row's learned tokens, (rows,), in nats."""
        compute_losses: Any = self.compute_loss_func
        predict = partial(logits_at, model, self._module.get_output_embeddings(), batch)
        with self._autocast, self.compute_loss_context_manager():
            losses, _ = compute_losses(batch, predict, None)
        learned = batch["labels"][:, 1:] != IGNORED
        sums = losses.new_zeros(len(learned)).index_add(0, learned.nonzero()[:, 0], losses)
        means: Tensor = sums / learned.sum(1).clamp(min=1)
        return means

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: a step has several forward passes, and nothing reads their number."""
        return 0


class _Pace(TrainerCallback):
    """A callback that restores state at the start, and after each step asks for a checkpoint or the end."""

    def __init__(self, trainer: _Trainer, checkpoints: Checkpoints | None) -> None:
        self._trainer, self._checkpoints = trainer, checkpoints

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        self._trainer.resume(optimizer, lr_scheduler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        checkpoints = self._checkpoints
        if not checkpoints:
            return
        due, checkpoints.stop_asked = any_of([checkpoints.due, checkpoints.stop_asked])
        if due and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = control.should_training_stop or checkpoints.stop_asked


class _Proximal(TrainerCallback):
    """A callback that adds the gradient of mu / 2 · ‖weights - start‖² (FedProx, arXiv 1812.06127).

    It is added once a step, after the clipping, which bounds what single rows do: the term is no row's. The
    losses of the curve are without it.
    """

    def __init__(self, model: torch.nn.Module, mu: float) -> None:
        self._mu = mu
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._start = [local(weight.detach()).clone() for weight in self._weights]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        pairs = zip(self._weights, self._start, strict=True)
        self._start = [start.to(weight.device) for weight, start in pairs]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        with torch.no_grad():
            for weight, start in zip(self._weights, self._start, strict=True):
                if weight.grad is not None:
                    away = local(weight.detach()) - start
                    local(weight.grad).add_(away, alpha=self._mu)
