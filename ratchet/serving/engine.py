"""What an engine is to the gateway: it holds versions and answers with the one that is named.

Two stand behind it: `local` (ratchet/serving/local_engine.py) and `openai` (ratchet/serving/upstream_engine.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from ratchet.data.examples import Message
from ratchet.errors import BaseModelError
from ratchet.serving.bundle import Bundle


@dataclass(frozen=True)
class Ask:
    """One request, checked. `version` is the one that has to answer; what a client left out is None and comes from that version's own settings."""

    id: str
    version: int
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text as it comes; an answer is the pieces joined."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The last of an answer. NLL in nats a token, None where the engine cannot tell."""

    finish: str  # "stop" or "length"
    prompt_tokens: int
    answer_tokens: int
    prompt_nll: float | None = None
    answer_nll: float | None = None
    queue_ms: float = 0.0


class Engine(Protocol):
    async def load(self, bundle: Bundle) -> None:
        """Make a version ready beside the others; twice is no harm. Raises BaseModelError: it does not fit the base, or is broken."""

    async def unload(self, version: int) -> None:
        """Let go of a version that nobody asks any more."""

    def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Pieces, then one Ended. Raises BusyError (the queue is full), UserError (the prompt does not fit), ServiceError (the upstream failed)."""

    async def close(self) -> None: ...


def require_same(known: Bundle, bundle: Bundle) -> None:
    """Raises BaseModelError: under the number that is loaded already another adapter is wanted."""
    if known != bundle:
        raise BaseModelError(
            f"another v{bundle.version} is loaded: {known.adapter.name}",
            remedy="start the gateway anew; the registry counts anew as well",
        )
