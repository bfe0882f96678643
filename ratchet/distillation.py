"""The teacher of a distillation (`train.teacher`): the champion, or a model of the hub that splits text into the same tokens.

A teacher's *answers* are rows like any others: `ratchet synthesize` asks for them (docs/synthesis.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.errors import BaseModelError
from ratchet.files import read_json
from ratchet.models.adapters import load_trained
from ratchet.models.loading import MANIFEST, load_hub, load_tokenizer

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
