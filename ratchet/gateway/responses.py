"""Read and write OpenAI's Responses in their basic form: text in, text out, whole or as events.

Nothing is kept between two requests: a conversation is sent whole, in `input`. Refused by name are tools,
files, pictures, background work and what refers to an earlier response.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Message
from ratchet.serving.engine import JsonForm, Piece
from ratchet.serving.faults import Fault
from ratchet.serving.protocol import (
    MAX_TOP_LOGPROBS,
    Answer,
    Chat,
    Part,
    Turn,
    check_range,
    check_text,
    count_tokens,
    decode,
    encode_scored,
    refuse,
    to_form,
    to_message,
)

SCORES = "message.output_text.logprobs"  # the only `include` that is taken
NO_STATE = "send the earlier turns in `input`: no response is kept here"
NOT_SUPPORTED = {
    "previous_response_id": NO_STATE,
    "conversation": NO_STATE,
    "prompt": "send its text in `instructions` and `input`: no prompt is kept here",
    "background": "leave it out, or send stream: true",
    **dict.fromkeys(
        [
            *("tools", "tool_choice", "max_tool_calls", "parallel_tool_calls", "reasoning", "truncation"),
            *("context_management", "moderation", "image", "access_programs", "background_options"),
        ],
        "leave it out",
    ),
}
# Values of unsupported fields that ask for what happens anyway: some clients always send every field.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "reasoning": ({"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
}


class Item(msgspec.Struct):
    """Hold a message of `input`; `id` and `status`, which answers bring, do not count."""

    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None


class Format(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """Hold a request's body; an unknown field is refused, since it may be a misspelt limit."""

    model: str
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None  # comes back in the response
    # Accepted and ignored: they concern storing, billing and padding at OpenAI.
    store: bool | None = None  # a look-up of the response is refused in words
    service_tier: Any = None
    stream_options: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    # NOT_SUPPORTED
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    tools: Any = None
    tool_choice: Any = None
    max_tool_calls: Any = None
    parallel_tool_calls: Any = None
    reasoning: Any = None
    truncation: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None
    background_options: Any = None


@dataclass(frozen=True, slots=True)
class ResponseChat(Chat):
    """Hold a request with what its response repeats."""

    instructions: str | None = None
    metadata: dict[str, str] | None = None


_decode_body = msgspec.json.Decoder(Body)


def parse_response(raw: bytes, limits: GatewayConfig) -> ResponseChat:
    """Return a checked request. Raises Fault(400) with the field, the value seen and the value wanted."""
    body = decode(_decode_body, raw)
    _check_support(body)
    messages = _read_messages(body)
    if not 1 <= len(messages) <= limits.max_messages:
        refuse("input", f"input holds {len(messages)} messages; wanted 1 to {limits.max_messages}")
    return ResponseChat(
        model=body.model,
        messages=messages,
        user=check_text("user", body.user or body.safety_identifier or ""),
        stream=bool(body.stream),
        include_usage=True,
        max_tokens=check_range("max_output_tokens", body.max_output_tokens, 1, limits.max_tokens),
        temperature=check_range("temperature", body.temperature, 0.0, 2.0),
        top_p=check_range("top_p", body.top_p, 0.0, 1.0),
        seed=None,
        stop=(),
        form=_check_format(body.text.format if body.text else None),
        top_logprobs=_check_logprobs(body),
        instructions=body.instructions,
        metadata=body.metadata,
        reasons=(body.reasoning or {}).get("effort") != "none",
    )


def _check_support(body: Body) -> None:
    for name, remedy in NOT_SUPPORTED.items():
        value = getattr(body, name)
        if value and value not in DEFAULTS.get(name, ()):
            refuse(name, f"{name} is not supported", remedy)
    if body.text and body.text.verbosity not in (None, "medium"):
        refuse("text.verbosity", "text.verbosity is not supported", "leave it out")
    if other := [name for name in body.include or () if name != SCORES]:
        refuse("include", f"include asks for {other[0][:80]!r}", f"known: {SCORES}")


def _read_messages(body: Body) -> tuple[Message, ...]:
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    own = [to_message("instructions", Turn("system", body.instructions))] if body.instructions else []
    return (*own, *(_read_item(f"input[{position}]", item) for position, item in enumerate(items)))


def _read_item(where: str, item: Item) -> Message:
    if item.type != "message" or item.role is None:
        refuse(
            where,
            f"{where} is of type {item.type!r}{'' if item.role else ' without a role'}",
            'send messages: {"role": …, "content": …}',
        )
    content = item.content
    if not isinstance(content, str) and content is not None:
        content = [
            Part("text", part.text) if part.type in ("input_text", "output_text") else part
            for part in content
        ]
    return to_message(where, Turn(item.role, content))


def _check_format(asked: Format | None) -> JsonForm | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return JsonForm()
    if asked.schema is None:
        refuse("text.format", "text.format is of type 'json_schema' and brings no schema", "add `schema`")
    return to_form(asked.name, asked.schema)


def _check_logprobs(body: Body) -> int | None:
    top = check_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS)
    if SCORES in (body.include or ()):
        return top or 0
    return top or None


# --- answers ---


@dataclass
class ResponseEncoder:
    """Write one response: whole, or as the events that OpenAI's clients wait for."""

    id: str
    created: int
    fingerprint: str
    chat: ResponseChat
    _number: int = 0  # of the next event

    def whole(self, answers: Sequence[Answer]) -> bytes:
        return msgspec.json.encode(self._response(answers))

    def begin(self) -> bytes:
        return b"".join(
            [
                self._event("response.created", response=self._response()),
                self._event("response.in_progress", response=self._response()),
                self._event("response.output_item.added", output_index=0, item=self._item([], "in_progress")),
                self._event("response.content_part.added", **self._place(), part=self._part("", [])),
            ]
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        if piece.reasoning and not piece.text:
            return b""  # this form of the protocol has no events of reasoning
        return self._event(
            "response.output_text.delta",
            **self._place(),
            delta=piece.text,
            logprobs=[encode_scored(token) for token in piece.tokens],
        )

    def end(self, answers: Sequence[Answer]) -> bytes:
        response = self._response(answers)
        (item,) = response["output"]
        (part,) = item["content"]
        more = {"text": part["text"], "logprobs": part["logprobs"]}
        return b"".join(
            [
                self._event("response.output_text.done", **self._place(), **more),
                self._event("response.content_part.done", **self._place(), part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{response['status']}", response=response),
            ]
        )

    def fail(self, fault: Fault) -> bytes:
        error = {"code": fault.code or "server_error", "message": fault.message}
        failed = self._response() | {"status": "failed", "error": error}
        return self._event("response.failed", response=failed)

    def _event(self, kind: str, **more: Any) -> bytes:
        data = msgspec.json.encode({"type": kind, "sequence_number": self._number, **more})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    @property
    def _item_id(self) -> str:
        return f"msg_{self.id.removeprefix('resp_')}"

    def _response(self, answers: Sequence[Answer] = ()) -> dict[str, Any]:
        """Return the response as it stands: in progress without answers."""
        cut = any(answer.ended and answer.ended.finish == "length" for answer in answers)
        status = "in_progress" if not answers else "incomplete" if cut else "completed"
        chat = self.chat
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if answers else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": chat.instructions,
            "max_output_tokens": chat.max_tokens,
            "model": chat.model,
            "output": [
                self._item(
                    [self._part(answer.text, [encode_scored(token) for token in answer.tokens])], status
                )
                for answer in answers
            ],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": chat.temperature,
            "text": {"format": _format(chat.form)},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": chat.top_logprobs or 0,
            "top_p": chat.top_p,
            "truncation": "disabled",
            "usage": _usage(answers) if answers else None,
            "user": chat.user or None,
            "metadata": chat.metadata or {},
        }

    def _item(self, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _format(form: JsonForm | None) -> dict[str, Any]:
    if form is None:
        return {"type": "text"}
    if not form.schema:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "name": form.name,
        "schema": msgspec.Raw(form.schema.encode()),
        "strict": True,
    }


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    read, written = count_tokens(answers)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }
