"""Read and write OpenAI's chat completions: a checked `Chat` from a body, JSON or events from an answer.

Not covered, and refused by name: tools, several choices, log probabilities, response formats, and anything
but text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import msgspec

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import MOST_MARKS, Message, has_mark_run, normalise
from ratchet.serving.engine import Ask, Ended
from ratchet.serving.faults import Fault

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NOT_SUPPORTED = (
    *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "logprobs"),
    *("top_logprobs", "response_format", "logit_bias", "presence_penalty", "frequency_penalty"),
    *("modalities", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options"),
)
# Values of unsupported fields that ask for what happens anyway: some clients always send every field.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
MAX_STOPS = 4
Decoded = TypeVar("Decoded")


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Turn(msgspec.Struct):
    """Hold the fields of a message that count; others (`name`, `refusal`, …) are ignored."""

    role: str
    content: str | list[Part] | None = None
    tool_calls: Any = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Hold a request's body; an unknown field is refused, since it may be a misspelt limit."""

    model: str
    messages: list[Turn]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    user: str | None = None
    # Accepted and ignored: they concern storing and billing at OpenAI.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    moderation: Any = None
    # NOT_SUPPORTED
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    response_format: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class FeedbackBody(msgspec.Struct, forbid_unknown_fields=True):
    request_id: str
    score: bool | float | None = None
    label: str = ""
    answer: str = ""
    comment: str = ""
    user: str | None = None


class WholeAsk(Ask):
    """Mark a request that is not streamed, so that an upstream may send the answer in one piece."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Hold a well-formed request; None stands for what the version's own settings decide."""

    model: str
    messages: tuple[Message, ...]
    user: str
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]

    def ask(self, id: str, version: int) -> Ask:
        kind = Ask if self.stream else WholeAsk
        return kind(
            id, version, self.messages, self.max_tokens, self.temperature, self.top_p, self.seed, self.stop
        )


# --- requests ---

_decode_body = msgspec.json.Decoder(Body)
_decode_feedback = msgspec.json.Decoder(FeedbackBody)


def parse_chat(raw: bytes, limits: GatewayConfig) -> Chat:
    """Return a checked request. Raises Fault(400) with the field, the value seen and the value wanted."""
    body = _decode(_decode_body, raw)
    _check_support(body)
    if not 1 <= len(body.messages) <= limits.max_messages:
        _refuse(
            "messages",
            f"messages holds {len(body.messages)}; wanted 1 to {limits.max_messages}",
            "leave out the oldest turns" if body.messages else "",
        )
    return Chat(
        model=body.model,
        messages=tuple(_to_message(position, turn) for position, turn in enumerate(body.messages)),
        user=_check_text("user", body.user or ""),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        max_tokens=_check_max_tokens(body, limits.max_tokens),
        temperature=_check_range("temperature", body.temperature, 0.0, 2.0),
        top_p=_check_range("top_p", body.top_p, 0.0, 1.0),
        seed=_check_range("seed", body.seed, -(2**63), 2**63 - 1),
        stop=_check_stop(body.stop),
    )


def parse_feedback(raw: bytes) -> FeedbackBody:
    """Return checked feedback, its `score` as a number. Raises Fault(400)."""
    body = _decode(_decode_feedback, raw)
    for field in ("label", "answer", "comment", "user"):
        _check_text(field, getattr(body, field) or "")
    if body.score is None and not (body.label or body.answer or body.comment):
        _refuse("score", "the feedback says nothing", "send one of score, label, answer, comment")
    return msgspec.structs.replace(
        body, score=_check_range("score", None if body.score is None else float(body.score), 0.0, 1.0)
    )


def _decode(decoder: msgspec.json.Decoder[Decoded], raw: bytes) -> Decoded:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise Fault(
            400,
            f"{path.rstrip('`') or 'the body'}: {message}",
            remedy="see OpenAI's reference of the endpoint",
            param=path.rstrip("`") or None,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Fault(
            400,
            f"the body is no JSON: {error}",
            remedy="send one JSON object in UTF-8; NaN, Infinity and half a surrogate pair are no JSON",
        ) from None


def _check_support(body: Body) -> None:
    for field in NOT_SUPPORTED:
        if getattr(body, field) and getattr(body, field) not in DEFAULTS.get(field, ()):
            _refuse(field, f"{field} is not supported", "leave it out")
    if body.n not in (None, 1):
        _refuse("n", f"n is {body.n}; only one choice is given", "send the request again for another one")


def _to_message(position: int, turn: Turn) -> Message:
    where = f"messages[{position}]"
    role = ROLES.get(turn.role)
    if role is None:
        _refuse(f"{where}.role", f"{where}.role is {turn.role!r}; known: {', '.join(ROLES)}")
    if turn.tool_calls:
        _refuse(f"{where}.tool_calls", f"{where}.tool_calls is not supported", "leave it out")
    if turn.content is None:
        _refuse(f"{where}.content", f"{where}.content is missing; wanted text")
    # Normalised like the training rows: otherwise Windows line ends would make another prompt.
    return Message(role, normalise(_check_text(f"{where}.content", _join(where, turn.content))))


def _join(where: str, content: str | list[Part]) -> str:
    if isinstance(content, str):
        return content
    for position, part in enumerate(content):
        if part.type != "text" or part.text is None:
            _refuse(
                f"{where}.content[{position}]",
                f"{where}.content[{position}] is of type {part.type!r}; "
                "wanted parts {'type': 'text', 'text': …}: the model reads text only",
            )
    return "\n".join(part.text or "" for part in content)


def _check_text(where: str, text: str) -> str:
    if "\0" in text:
        _refuse(where, f"{where} holds a NUL character at {text.index(chr(0))}", "remove it")
    if has_mark_run(text):
        _refuse(where, f"{where} holds more than {MOST_MARKS} combining marks in a row", "leave them out")
    return text


def _check_max_tokens(body: Body, most: int) -> int | None:
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return _check_range(field, getattr(body, field), 1, most)


Number = TypeVar("Number", int, float)


def _check_range(field: str, value: Number | None, low: float, high: float) -> Number | None:
    if value is not None and not low <= value <= high:  # so NaN is refused too
        _refuse(field, f"{field} is {str(value)[:40]}; wanted {low:g} to {high:g}")
    return value


def _check_stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or "" in stops:
        _refuse(
            "stop",
            f"stop holds {len(stops)} text(s){', one of them empty' if '' in stops else ''}; "
            f"wanted at most {MAX_STOPS}, none of them empty",
        )
    return stops


def _refuse(param: str, message: str, remedy: str = "") -> NoReturn:
    raise Fault(400, message, remedy=remedy, param=param)


# --- answers ---


class Answered(msgspec.Struct, frozen=True):
    """Hold the fields that every body and chunk of one answer share; `fingerprint` is `name@vN`."""

    id: str
    created: int
    model: str
    fingerprint: str

    def whole(self, text: str, ended: Ended) -> bytes:
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": ended.finish,
        }
        return self._encode("chat.completion", [choice], ended)

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        return _event(
            self._encode(
                "chat.completion.chunk",
                [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
            )
        )

    def usage_chunk(self, ended: Ended) -> bytes:
        return _event(self._encode("chat.completion.chunk", [], ended))

    def _encode(self, kind: str, choices: list[Any], ended: Ended | None = None) -> bytes:
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        return msgspec.json.encode(body if ended is None else {**body, "usage": _usage(ended)})


DONE = b"data: [DONE]\n\n"


def error_event(fault: Fault) -> bytes:
    """Encode an error as an event: once an answer has begun, its status is sent already."""
    return _event(fault.body())


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _usage(ended: Ended) -> dict[str, int]:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.answer_tokens,
        "total_tokens": ended.prompt_tokens + ended.answer_tokens,
    }


def encode_models(ids: list[str], created: int, owner: str) -> bytes:
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [{"id": id, "object": "model", "created": created, "owned_by": owner} for id in ids],
        }
    )
