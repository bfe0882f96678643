"""Compute a training's loss: cross-entropy of the answers, and with a teacher the divergence from it.

Pre-training has a loss of its own (`ratchet.demo.base_model`), so that a change here makes no base stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ratchet.errors import BaseModelError
from ratchet.files import read_json
from ratchet.models.adapters import load_trained
from ratchet.models.loading import MANIFEST, load_hub, load_tokenizer
from ratchet.models.logits import logits_at
from ratchet.training.packing import IGNORED

if TYPE_CHECKING:
    from ratchet.training.trainer import Batch, Predict

CHAMPION = "champion"


def load_teacher(teacher: str, base: Path, incumbent: Path) -> Any:
    """Load the model to learn from; None without a teacher, or without a champion.

    Raises BaseModelError: it is not on this machine, or has other tokens than the base.
    """
    if not teacher or (teacher == CHAMPION and read_json(incumbent / MANIFEST)["version"] is None):
        return None
    if teacher == CHAMPION:
        theirs = incumbent / "base" if (incumbent / "base").exists() else base
        _check_same_tokens(load_tokenizer(theirs), base, "the champion")
        return load_trained(theirs, incumbent)
    name, revision = teacher.split("@")
    model, tokenizer = load_hub(name, revision)
    _check_same_tokens(tokenizer, base, teacher)
    return model


def _check_same_tokens(tokenizer: Any, base: Path, teacher: str) -> None:
    theirs, ours = tokenizer.get_vocab(), load_tokenizer(base).get_vocab()
    if odd := sorted(theirs.items() ^ ours.items())[:1]:
        raise BaseModelError(
            f"{teacher} has other tokens than the base: {len(theirs)} against {len(ours)},"
            f" the first that differs is {odd[0][0]!r}",
            remedy="a teacher's logits need its tokenizer; learn from its answers instead:"
            " `ratchet synthesize`",
        )


class AnswerLoss:
    """Cross-entropy of each learned token, in nats.

    With a `teacher`, a share `teacher_weight` of it is the divergence from the teacher's distribution over
    the same token (arXiv 1503.02531). The teacher has the same tokenizer and is not changed.
    """

    def __init__(self, teacher: Any = None, *, teacher_weight: float = 0.0, temperature: float = 1.0) -> None:
        self._teacher = None if teacher is None else teacher.eval()
        self._teacher_weight, self._temperature = teacher_weight, temperature

    def __call__(self, batch: Batch, predict: Predict, tokens: Tensor) -> tuple[Tensor, Tensor]:
        learned = batch["labels"][:, 1:] != IGNORED  # (batch, seq - 1)
        logits = predict(learned)
        taught = self._ask_teacher(batch, learned)
        losses = cross_entropy(logits, batch["input_ids"][:, 1:][learned], reduction="none")
        if taught is not None:
            share = self._teacher_weight
            losses = (1 - share) * losses + share * self._divergence(logits, taught)
        return losses, tokens

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch, learned: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        return logits_at(self._teacher, self._teacher.get_output_embeddings(), batch, learned)

    def _divergence(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Compute KL(teacher ‖ student) of each token, in nats.

        It is multiplied by the square of the temperature, so that its gradient does not shrink with it.
        """
        # Some models have rows in their output layer beyond the tokenizer's size.
        width = min(logits.shape[-1], taught.shape[-1])
        student, teacher = (
            log_softmax(each[:, :width] / self._temperature, dim=-1) for each in (logits, taught)
        )
        return kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * self._temperature**2
