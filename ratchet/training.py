"""One optimisation through transformers' Trainer: packed windows in, the best weights by validation loss left in the model.

Deterministic on CPU: same commit, same data, same bytes. Not covered yet: resuming, several processes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ratchet.errors import DivergenceError
from ratchet.packing import IGNORED, Window

LOGS = 100  # points on the training curve, at most; each costs a synchronisation on a GPU

Report = Callable[[int, dict[str, float]], None]


class Schedule(NamedTuple):
    """How to optimise. `steps` are optimizer steps, `evaluations` and `patience` count measurements of the validation loss."""

    steps: int
    batch_windows: int
    accumulate: int
    learning_rate: float
    kind: str
    warmup_share: float
    weight_decay: float
    max_grad_norm: float
    evaluations: int
    patience: int
    seed: int


class Outcome(NamedTuple):
    """Losses in nats a learned token; `seconds` of the optimisation alone."""

    steps: int
    best_step: int
    best_validation_loss: float | None
    train_loss: float
    seconds: float


def fit(
    model: torch.nn.Module, windows: Sequence[Window], validation: Sequence[Window], schedule: Schedule, *, pad_id: int, report: Report, text_weight: float | None = None
) -> Outcome:
    """Train `model` in place. Raises DivergenceError when a loss, a gradient or a weight stops being finite.

    With `text_weight` the prompt's tokens count in the loss as well, with that weight (the demo's base learns to read from them).
    """
    set_seed(schedule.seed)
    # Filling fresh memory is for finding reads of it; results do not depend on it, and it costs a tenth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    watch = _Watch(model, schedule, report)
    with tempfile.TemporaryDirectory(prefix="ratchet-train-") as scratch:
        trainer = _Trainer(
            model=model,
            args=_arguments(scratch, schedule, evaluates=bool(validation)),
            train_dataset=_Windows(windows),
            eval_dataset=_Windows(validation) if validation else None,
            data_collator=_Collator(pad_id),
            callbacks=[watch],
        )
        trainer.text_weight = text_weight
        trainer.validation_density = sum(label != IGNORED for window in validation for label in window.labels) / (len(validation) or 1)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        result = trainer.train()
    watch.restore_best()
    _check_weights(model)
    done = trainer.state.global_step
    return Outcome(done, watch.best_step or done, watch.best_loss, float(result.training_loss), time.perf_counter() - started)


def _arguments(scratch: str, schedule: Schedule, *, evaluates: bool) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=scratch,
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_windows,
        per_device_eval_batch_size=schedule.batch_windows,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type=schedule.kind,
        warmup_steps=math.ceil(schedule.warmup_share * schedule.steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        optim="adamw_torch",
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
        bf16=cuda and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=cuda,
        seed=schedule.seed,
        data_seed=schedule.seed,
        full_determinism=not cuda,
    )


class _Trainer(Trainer):
    text_weight: float | None = None
    validation_density: float  # learned tokens a window

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        if not model.training:
            # The mean over windows of what this gives is the loss a learned token, whatever the batches are.
            num_items_in_batch = self.validation_density * len(inputs["input_ids"])
        if self.text_weight is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        ids, labels, positions = inputs["input_ids"], inputs["labels"], inputs["position_ids"]
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1].float()  # (batch, seq - 1, vocab)
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        # A row's first token and padding stand at position 0: nothing of their own row predicts them.
        weights = torch.where(labels[:, 1:] != IGNORED, 1.0, self.text_weight) * (positions[:, 1:] > 0)
        return (losses * weights.flatten()).sum() / weights.sum()


class _Windows(torch.utils.data.Dataset[Window]):
    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Window:
        return self._windows[index]


class _Collator:
    """Pads to the longest window. Padding stands at position 0, each token a row by itself, and bears no loss."""

    def __init__(self, pad_id: int) -> None:
        self._fill = Window([pad_id], [IGNORED], [0])

    def __call__(self, windows: Sequence[Window]) -> dict[str, torch.Tensor]:
        length = max(len(window.input_ids) for window in windows)
        columns = {}
        for name, fill in zip(Window._fields, self._fill, strict=True):
            columns[name] = torch.tensor([getattr(window, name) + fill * (length - len(window.input_ids)) for window in windows])  # (batch, seq)
        return columns


class _Watch(TrainerCallback):
    """Reports the curve, stops on what is not finite, keeps the best trainable weights in memory."""

    def __init__(self, model: torch.nn.Module, schedule: Schedule, report: Report) -> None:
        self._model = model
        self._patience = schedule.patience
        self._report = report
        self._best: dict[str, torch.Tensor] = {}
        self._worse = 0
        self.best_loss: float | None = None
        self.best_step = 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any) -> None:
        names = {"loss": "train_loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate", "eval_loss": "validation_loss"}
        values = {name: float(value) for key, value in (logs or {}).items() if (name := names.get(key))}
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergenceError(
                    f"{name} is {value} at step {state.global_step} of {state.max_steps}", remedy="lower `train.learning_rate`; nothing was saved, the champion is untouched"
                )
        if values:
            self._report(state.global_step, values)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float] | None = None, **_: Any) -> None:
        loss = (metrics or {})["eval_loss"]
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step, self._worse = loss, state.global_step, 0
            self._best = {name: weight.detach().clone() for name, weight in self._model.named_parameters() if weight.requires_grad}
            return
        self._worse += 1
        control.should_training_stop = self._worse >= self._patience

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                if name in self._best:
                    weight.copy_(self._best[name])


def _check_weights(model: torch.nn.Module) -> None:
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise DivergenceError(f"{name} holds weights that are not finite", remedy="lower `train.learning_rate`; nothing was saved, the champion is untouched")
