"""Compute a training's loss: cross-entropy of the answers, divergence from a teacher, or preferences.

Pre-training has its own loss (`ratchet.demo.base_model`), so that a change here does not make a base stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid

from ratchet.errors import BaseModelError
from ratchet.files import read_json
from ratchet.models.adapters import load_trained
from ratchet.models.cache import logits_at
from ratchet.models.loading import MANIFEST, load_hub, load_tokenizer
from ratchet.training.packing import IGNORED, Role, Window

if TYPE_CHECKING:
    from ratchet.training.collation import Batches
    from ratchet.training.trainer import Batch, Predict

CHAMPION = "champion"


def load_teacher(teacher: str, base: Path, incumbent: Path) -> Any:
    """Load the model to learn from; None if no teacher is set, or if it is the champion and there is none.

    Raises BaseModelError: it is not on this machine, or its tokens are not those of the base.
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

    With a `teacher`, a share `teacher_weight` of the loss is the divergence from the teacher's distribution
    over the same token (arXiv 1503.02531). The teacher has the same tokenizer and is not trained.
    """

    def __init__(self, teacher: Any = None, *, teacher_weight: float = 0.0, temperature: float = 1.0) -> None:
        self._teacher = None if teacher is None else teacher.eval()
        self._teacher_weight, self._temperature = teacher_weight, temperature

    def __call__(self, batch: Batch, predict: Predict, count: Tensor) -> tuple[Tensor, Tensor]:
        learned = learned_of(batch)
        logits = predict(learned)
        taught = self._ask_teacher(batch, learned)
        losses = cross_entropy(logits, batch["input_ids"][:, 1:][learned], reduction="none")
        if taught is not None:
            share = self._teacher_weight
            losses = (1 - share) * losses + share * self._divergence(logits, taught)
        return losses, count

    def prepare(self, model: Any, batches: Batches) -> Batches:
        return batches

    def validate(self, batch: Batch, predict: Predict) -> Tensor:
        """Return the cross-entropy of each learned token, without the teacher."""
        return _token_losses(batch, predict, learned_of(batch))

    @torch.no_grad()
    def _ask_teacher(self, batch: Batch, learned: Tensor) -> Tensor | None:
        if self._teacher is None:
            return None
        return logits_at(self._teacher, self._teacher.get_output_embeddings(), batch, learned)

    def _divergence(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Compute KL(teacher ‖ student) of each token, in nats.

        It is multiplied by the square of the temperature, by which a high temperature shrinks the gradient.
        """
        # The output layer of some models has more rows than the tokenizer has tokens.
        width = min(logits.shape[-1], taught.shape[-1])
        student, teacher = (
            log_softmax(each[:, :width] / self._temperature, dim=-1) for each in (logits, taught)
        )
        return kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * self._temperature**2


class PreferenceLoss:
    """Learn which of two answers is better (DPO), or which answers are good and which are not (KTO).

    Each unit (a pair, a judged answer or a plain row) has one loss; a step's loss is their mean. DPO and KTO
    compare the log-probability of a whole answer with that before the training, which is computed once at the
    start, so that no second model is kept in memory.

    Pairs: DPO (arXiv 2305.18290) with `chosen_weight` times the cross-entropy of the better answer
    (arXiv 2404.19733). Judged answers: KTO (arXiv 2402.01306); an answer not to give weighs
    `undesirable_weight`. Plain rows: cross-entropy, as the mean over their learned tokens.
    """

    def __init__(self, *, beta: float, chosen_weight: float, undesirable_weight: float) -> None:
        self._beta, self._chosen_weight = beta, chosen_weight
        self._undesirable_weight = undesirable_weight

    def prepare(self, model: Any, batches: Batches) -> Batches:
        return add_references(model, batches)

    def __call__(self, batch: Batch, predict: Predict, count: Tensor) -> tuple[Tensor, Tensor]:
        return self.validate(batch, predict), count

    def validate(self, batch: Batch, predict: Predict) -> Tensor:
        said, tokens = answer_logprobs(batch, predict)
        roles, gained = batch["roles"], said - batch["references"]  # (rows,)
        likely = -said / tokens.clamp(min=1)  # cross-entropy a token
        chosen, judged = roles == Role.CHOSEN, (roles == Role.DESIRABLE) | (roles == Role.UNDESIRABLE)
        losses = [likely[(roles == Role.PLAIN) & (tokens > 0)]]
        if chosen.any():
            margin = gained[chosen] - gained[roles == Role.REJECTED]
            losses.append(-logsigmoid(self._beta * margin) + self._chosen_weight * likely[chosen])
        if judged.any():
            # KTO's reference point: the gain of mismatched answers, which a good answer has to exceed.
            drift = gained[roles == Role.MISMATCHED].mean().detach().clamp(min=0)
            good = roles[judged] == Role.DESIRABLE
            above = self._beta * (gained[judged] - drift)
            weight = torch.where(good, 1.0, self._undesirable_weight)
            losses.append(weight * (1 - torch.sigmoid(torch.where(good, above, -above))))
        return torch.cat(losses)


def learned_of(batch: Batch) -> Tensor:
    """Mark the targets that are learned, (batch, seq - 1)."""
    return batch["labels"][:, 1:] != IGNORED


def _token_losses(batch: Batch, predict: Predict, learned: Tensor) -> Tensor:
    return cross_entropy(predict(learned), batch["input_ids"][:, 1:][learned], reduction="none")


def answer_logprobs(batch: Batch, predict: Predict) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each row's learned tokens in nats, and their number, (rows,) both."""
    learned = learned_of(batch)
    losses = _token_losses(batch, predict, learned)
    row = learned.nonzero()[:, 0]
    return losses.new_zeros(len(learned)).index_add(0, row, -losses), learned.sum(1)


@torch.no_grad()
def add_references(model: Any, batches: Batches) -> Batches:
    """Return the batches with each row's log-probability under the model as it is now.

    Dropout is switched off for the whole training: answers cannot be compared under different random masks.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    was_training = model.training
    model.eval()
    try:
        train, validation = (
            [_with_references(model, rows, batches) for rows in part]
            for part in (batches.train, batches.validation)
        )
    finally:
        model.train(was_training)
    return batches._replace(train=train, validation=validation)


def _with_references(model: Any, rows: Sequence[Window], batches: Batches) -> list[Window]:
    device = next(model.parameters()).device
    batch = {name: column.to(device) for name, column in batches.collate([rows]).items()}
    if not (batch["labels"] != IGNORED).any():  # padding that completes a step
        return list(rows)
    found, _ = answer_logprobs(batch, partial(logits_at, model, model.get_output_embeddings(), batch))
    return [row._replace(references=[value]) for row, value in zip(rows, found.tolist(), strict=True)]
