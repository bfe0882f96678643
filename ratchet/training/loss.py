"""Logits only where a token is learned, and the teacher's distribution there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import kl_div, log_softmax

from ratchet.errors import BaseModelError
from ratchet.files import read_json
from ratchet.models.adapters import load_trained
from ratchet.models.loading import MANIFEST, load_hub, load_tokenizer

if TYPE_CHECKING:
    pass

CHAMPION = "champion"


def load_teacher(teacher: str, base: Path, incumbent: Path) -> Any:
    """A model to learn from; None without a teacher, or without a champion. Raises BaseModelError: it is not on this machine, or has other tokens."""
    if not teacher or (teacher == CHAMPION and read_json(incumbent / MANIFEST)["version"] is None):
        return None
    if teacher == CHAMPION:
        theirs = incumbent / "base" if (incumbent / "base").exists() else base
        _same_tokens(load_tokenizer(theirs), base, "the champion")
        return load_trained(theirs, incumbent)
    name, revision = teacher.split("@")
    model, tokenizer = load_hub(name, revision)
    _same_tokens(tokenizer, base, teacher)
    return model


def _same_tokens(tokenizer: Any, base: Path, teacher: str) -> None:
    theirs, ours = tokenizer.get_vocab(), load_tokenizer(base).get_vocab()
    if odd := sorted(theirs.items() ^ ours.items())[:1]:
        raise BaseModelError(
            f"{teacher} has other tokens than the base: {len(theirs)} against {len(ours)}, the first that differs is {odd[0][0]!r}",
            remedy="a teacher's logits need its tokenizer; learn from its answers instead: `ratchet synthesize`",
        )


class _Head:
    """Lets the output layer see only the positions that bear loss: its logits are what takes most room, and on a small model much of the time."""

    def __init__(self, model: Any) -> None:
        self._handle = model.get_output_embeddings().register_forward_pre_hook(self._choose)
        self.chosen: torch.Tensor | None = None  # (batch, seq - 1), for the next pass

    def __enter__(self) -> _Head:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _choose(self, _: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if self.chosen is None:
            return inputs
        hidden = inputs[0]  # (batch, virtual tokens + seq, width)
        hidden = hidden[:, hidden.shape[1] - self.chosen.shape[1] - 1 : -1]
        places = self.chosen.flatten().nonzero().squeeze(1)
        return (
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, places)[None],
            *inputs[1:],
        )  # (1, chosen, width)


class _Teacher:
    """Its distribution over the next token, where the student bears loss."""

    def __init__(self, model: Any, temperature: float) -> None:
        self._model = model.eval() if model is not None else None
        self._temperature = temperature
        self._head = _Head(model) if model is not None else None

    def __bool__(self) -> bool:
        return self._model is not None

    def __enter__(self) -> _Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._head:
            self._head.__exit__()

    @torch.no_grad()
    def __call__(self, inputs: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
        assert self._model is not None and self._head
        self._head.chosen = chosen
        return self._model(**inputs, use_cache=False).logits[0].float()  # type: ignore[no-any-return]  # (chosen, vocab)

    def divergence(self, logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """KL(teacher ‖ student) a position, in nats, times the square of the temperature, so that its gradient does not shrink with it."""
        width = min(
            logits.shape[-1], taught.shape[-1]
        )  # beyond the tokenizer's size some models have rows to fill
        student, teacher = (
            log_softmax(each[:, :width] / self._temperature, dim=-1) for each in (logits, taught)
        )
        return kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * self._temperature**2
