"""How to optimise, what an optimisation came to, and the names of optimizers and schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
CUDA_OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit")
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}  # transformers' `constant` has no warm-up
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
    optimizer: str = "adamw"
    checkpoint_activations: bool = False
    neftune_alpha: float = 0.0
    compile: bool = False
    liger: bool = False
    teacher_weight: float = 0.0  # share of the loss that is the divergence from the teacher's distribution
    temperature: float = 1.0
    compute: str = "float32"  # what matrix products are computed in (autocast): "float32", "bfloat16" or "float16"; the weights stay what they are


class Outcome(NamedTuple):
    """Losses in nats a learned token; `seconds` of the optimisation alone."""

    steps: int
    best_step: int
    best_validation_loss: float | None
    train_loss: float
    seconds: float
