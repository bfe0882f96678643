"""The settings of an optimisation, their translation for transformers, and its outcome."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

from ratchet.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
CUDA_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
# transformers' `constant` has no warm-up.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
LOGS = 100  # points on the training curve, at most; each costs a synchronisation on a GPU

Report = Callable[[int, dict[str, float]], None]
Points = list[dict[str, float]]  # of the training curve: step, time_ms and values


class Schedule(NamedTuple):
    """The settings of one optimisation.

    `steps` are optimizer steps; `evaluations` and `patience` count measurements of the validation loss.
    """

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
    optimizer: str = "adamw"
    checkpoint_activations: bool = False
    neftune_alpha: float = 0.0
    proximal: float = 0.0
    compile: bool = False
    liger: bool = False
    compute: str = (
        "float32"  # type of matrix products (autocast), or "bfloat16", "float16"; weights keep their type
    )


class Outcome(NamedTuple):
    """The result of an optimisation; losses are in nats a learned token, `seconds` exclude loading."""

    steps: int
    best_step: int
    best_validation_loss: float | None
    train_loss: float
    seconds: float


class Figures(TypedDict):
    """The content of reports/train/figures.json: an Outcome, and what it cost."""

    steps: int
    best_step: int
    best_validation_loss: float | None
    train_loss: float
    seconds: float
    trainable_weights: int
    epochs: float
    learned_tokens_per_second: float
    peak_mib: float
    peak_gpu_mib: NotRequired[float]
    run_key: str
    rows: dict[str, Any]  # the training's part of the tokens' profile.json


def check_optimizer(optimizer: str) -> None:
    """Raise ConfigError if the optimizer needs CUDA and this machine has none."""
    import torch

    if optimizer in CUDA_OPTIMIZERS and not torch.cuda.is_available():
        raise ConfigError(
            f"`train.optimizer: {optimizer}` needs a GPU with CUDA, and this machine has none",
            remedy="set `train.optimizer: adamw` or `adafactor`",
        )


def training_arguments(
    scratch: str, schedule: Schedule, *, batch_items: int, evaluates: bool
) -> TrainingArguments:
    """Translate `schedule` for transformers. `batch_items` is the size of a forward pass in items."""
    import torch
    from transformers import TrainingArguments

    from ratchet.training.distributed import world_size

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
        # The default filter would hide a loss of NaN, on which `Watch` ends the training.
        logging_nan_inf_filter=False,
        # Checkpoints are written by time (`ratchet.training.checkpoints`), not by steps.
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
