"""Define what the gateway asks of an engine: to hold versions and to answer with the one that is named.

There are three: `local` (ratchet/engines/local_engine.py), `openai` (ratchet/engines/upstream_engine.py) and
`llama_cpp` (ratchet/engines/llama_cpp_engine.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ratchet.data.examples import Message, Tool, ToolCall
from ratchet.errors import BaseModelError
from ratchet.serving.bundle import Bundle


class JsonForm(NamedTuple):
    """Require an answer in JSON: what `schema`, a JSON schema as text, describes; any object where empty."""

    schema: str = ""
    name: str = ""


@dataclass(frozen=True)
class Ask:
    """Hold one checked request for `version`; None stands for that version's own setting.

    `top_logprobs` asks for the log probability of each token, and of that many likely ones in its place.
    """

    id: str
    version: int
    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    form: JsonForm | None = None
    top_logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    parallel_calls: bool = True  # False: of several calls the first alone is told
    must_call: tuple[str, ...] = ()  # names of tools: the answer calls them and nothing else
    reasons: bool = True  # False: a version that learned to reason answers at once
    media: Mapping[str, bytes] = field(default_factory=dict)  # the messages' pictures by name


class Scored(NamedTuple):
    """Hold a token's bytes and log probability (in nats), and the likeliest tokens in its place."""

    token: bytes
    logprob: float
    top: tuple[Scored, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Hold a piece of an answer's text, often empty beside tokens; the answer is the pieces joined.

    `tokens` are scored where that was asked for; the token that ends the turn is not among them, nor are
    those of the reasoning. `calls` are whole calls of tools that the request offered.
    """

    text: str
    tokens: tuple[Scored, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""  # what was thought before the text, where the version learned to reason


@dataclass(frozen=True)
class Ended:
    """End an answer. NLL is in nats a token, None where the engine cannot tell."""

    finish: str  # "stop", "tool_calls" or "length"
    prompt_tokens: int
    answer_tokens: int
    prompt_nll: float | None = None
    answer_nll: float | None = None
    queue_ms: float = 0.0
    # What the model saw in the prompt's pictures, by name (ratchet/monitoring/picture_features.py).
    features: Mapping[str, bytes] = field(default_factory=dict)


class Engine(Protocol):
    async def load(self, bundle: Bundle) -> None:
        """Make a version ready beside the others; a second call does nothing.

        Raises BaseModelError: it does not fit the base, or is broken.
        """

    async def unload(self, version: int) -> None:
        """Remove a version that no request names any more."""

    def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Yield pieces, then one Ended.

        Raises BusyError (the queue is full), UserError (the prompt does not fit), ServiceError (the
        upstream failed).
        """

    async def close(self) -> None: ...


def require_same(known: Bundle, bundle: Bundle) -> None:
    """Raise BaseModelError where another adapter is loaded under the same number."""
    if known != bundle:
        raise BaseModelError(
            f"another v{bundle.version} is loaded: {known.adapter.name}",
            remedy="start the gateway anew; the registry counts anew as well",
        )
