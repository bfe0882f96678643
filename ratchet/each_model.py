"""Candidate, champion and untouched base in turn, for what is measured on the model itself (likelihoods of canaries, public suites).

One base in memory, on which plain adapters take turns; what cannot share it is loaded by itself, one after the other. Each in the precision of
its own method.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ratchet.chat import ChatFormat
from ratchet.methods import base_settings, can_be_switched_off, load_trained, share_a_base
from ratchet.models import load_adapter, load_base, load_tokenizer


class Loaded(NamedTuple):
    name: str
    model: Any
    chat: ChatFormat


def each_model(base: Path, incumbent: Path | None, candidate: Path) -> Iterator[Loaded]:
    """`incumbent` is None before the first promotion. A model is to be used before the next one is asked for."""
    own_base = incumbent / "base" if incumbent and (incumbent / "base").exists() else None
    chat = ChatFormat(load_tokenizer(base))
    model = load_trained(base, candidate, name="candidate").eval()
    yield Loaded("candidate", model, chat)
    together = bool(incumbent and not own_base and share_a_base(candidate, incumbent))
    if incumbent and together:
        load_adapter(model, incumbent, name="champion").set_adapter("champion")
        yield Loaded("champion", model.eval(), chat)
    if can_be_switched_off(candidate):
        with model.disable_adapter():
            yield Loaded("base", model.eval(), chat)
    else:
        del model
        plain: Any = load_base(base, **base_settings(candidate))
        yield Loaded("base", plain.eval(), chat)
    if incumbent and not together:
        model = None
        own_chat = ChatFormat(load_tokenizer(own_base)) if own_base else chat
        yield Loaded("champion", load_trained(own_base or base, incumbent, name="champion").eval(), own_chat)
