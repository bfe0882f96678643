"""Watch a training while it runs; save and restore the state that its further course depends on."""

from __future__ import annotations

import math
import random
from typing import Any, TypedDict

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ratchet.errors import DivergenceError
from ratchet.training.distributed import TorchState, any_of, local
from ratchet.training.schedule import Report, Schedule

RandomState = dict[str, Any]  # by library, each in its own form


class WatchState(TypedDict):
    """The best weights so far, and how many evaluations since then were no better."""

    best: dict[str, torch.Tensor]
    best_loss: float | None
    best_step: int
    worse: int


class LossSums(TypedDict):
    """The Trainer's running sums of the loss, for the curve."""

    since_log: torch.Tensor
    total: float
    last_log: int  # step


class TrainingState(TypedDict):
    """The content of a checkpoint; a training resumed from it ends in the same bytes as one never killed.

    Tensors are whole, even if each process holds parts. `optimizer` and `scheduler` are torch's state dicts.
    """

    weights: dict[str, torch.Tensor]
    optimizer: TorchState
    scheduler: TorchState
    watch: WatchState
    random: RandomState
    losses: LossSums
    seconds: float


class Watch(TrainerCallback):
    """A callback that reports the curve, stops on values that are not finite, and keeps the best weights.

    `keeps_last`: the last weights count as the best.
    """

    def __init__(
        self, model: torch.nn.Module, schedule: Schedule, report: Report, *, keeps_last: bool = False
    ) -> None:
        self._model = model
        self._patience = schedule.patience
        self._report = report
        self._keeps_last = keeps_last
        self.best: dict[str, torch.Tensor] = {}  # this process's parts
        self._worse = 0
        self.best_loss: float | None = None
        self.best_step = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        names = {
            "loss": "train_loss",
            "grad_norm": "grad_norm",
            "learning_rate": "learning_rate",
            "eval_loss": "validation_loss",
        }
        values = {name: float(value) for key, value in (logs or {}).items() if (name := names.get(key))}
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergenceError(
                    f"{name} is {value} at step {state.global_step} of {state.max_steps}",
                    remedy="lower `train.learning_rate`; nothing was saved, the champion is untouched",
                )
        if values:
            self._report(state.global_step, values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (metrics or {})["eval_loss"]
        if self._keeps_last or self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self._worse = loss, state.global_step, 0
            self.best = {
                name: local(weight).to("cpu", copy=True) for name, weight in trainable(self._model).items()
            }
            return
        self._worse += 1
        control.should_training_stop = control.should_training_stop or self.out_of_patience

    @property
    def out_of_patience(self) -> bool:
        return self._worse >= self._patience

    def restore_best(self) -> None:
        if self.best:
            put_weights(self._model, self.best)

    def state(self) -> WatchState:
        return {
            "best": self.best,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "worse": self._worse,
        }

    def restore(self, state: WatchState) -> None:
        self.best, self.best_loss, self.best_step, self._worse = (
            state["best"],
            state["best_loss"],
            state["best_step"],
            state["worse"],
        )


def trainable(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights that are trained, by name, as DTensors if the model is sharded."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def put_weights(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` into the trained ones of the same names; of a sharded model, this process's parts."""
    ours = trainable(model)
    assert ours.keys() == weights.keys(), f"weights differ: {sorted(ours.keys() ^ weights.keys())[:3]}"
    for name, weight in ours.items():
        local(weight).copy_(weights[name])


def get_random_state() -> RandomState:
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.array(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def set_random_state(state: RandomState) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def check_weights(model: torch.nn.Module) -> None:
    """Raise DivergenceError, in all processes, if a trained weight of any of them is not finite."""
    odd = next(
        (name for name, weight in trainable(model).items() if not bool(torch.isfinite(local(weight)).all())),
        "",
    )
    if any_of([bool(odd)])[0]:
        where = odd or "another process's part"
        raise DivergenceError(
            f"{where} holds weights that are not finite",
            remedy="lower `train.learning_rate`; nothing was saved, the champion is untouched",
        )
