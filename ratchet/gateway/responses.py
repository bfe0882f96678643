"""Read requests of OpenAI's Responses in their basic form: text and functions.

Nothing is kept between requests, so a conversation is sent whole, in `input`. Other tools, files, pictures,
background work and references to an earlier response are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Message, RowError, Tool
from ratchet.data.forms import order_results
from ratchet.serving.engine import JsonForm
from ratchet.serving.protocol import (
    MAX_TOP_LOGPROBS,
    Chat,
    Part,
    RequestMedia,
    Turn,
    check_range,
    check_text,
    check_tool_choice,
    check_tools,
    decode,
    refuse,
    to_form,
    to_message,
)

SCORES = "message.output_text.logprobs"  # the only `include` that is accepted
NO_STATE = "send the earlier turns in `input`: no response is kept here"
NOT_SUPPORTED = {
    "previous_response_id": NO_STATE,
    "conversation": NO_STATE,
    "prompt": "send its text in `instructions` and `input`: no prompt is kept here",
    "background": "leave it out, or send stream: true",
    **dict.fromkeys(
        [
            *("max_tool_calls", "reasoning", "truncation", "context_management"),
            *("moderation", "image", "access_programs", "background_options"),
        ],
        "leave it out",
    ),
}
# Values of unsupported fields that ask for what is done anyway, since some clients always send every field.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "reasoning": ({"effort": "none"}, {"effort": None}, {"effort": None, "summary": None}),
    "truncation": ("disabled",),
}


class Item(msgspec.Struct):
    """A message, a call or a result in `input`; `id` and `status`, from earlier answers, are ignored."""

    type: str = "message"
    role: str | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class ToolBody(msgspec.Struct):
    """A tool; `strict` has no effect, and is left out of the prompt."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


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
    """A request's body; an unknown field is refused, since it may be a misspelt limit."""

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
    metadata: dict[str, str] | None = None  # repeated in the response
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # Accepted and ignored: they concern storing, billing and padding at OpenAI.
    store: bool | None = None  # a later look-up of the response is refused, with the reason
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
    max_tool_calls: Any = None
    reasoning: Any = None
    truncation: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None
    background_options: Any = None


@dataclass(frozen=True, slots=True)
class ResponseChat(Chat):
    """A checked request, with the fields that its response repeats."""

    instructions: str | None = None
    metadata: dict[str, str] | None = None
    told_tools: tuple[ToolBody, ...] = ()
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True


PARTS = {
    "input_text": "text",
    "output_text": "text",
    "input_image": "image_url",
    "input_audio": "input_audio",
}
_decode_body = msgspec.json.Decoder(Body)


def parse_response(raw: bytes, limits: GatewayConfig) -> ResponseChat:
    """Return a checked request. Raises Fault(400) with the field, the value seen and the value wanted."""
    body = decode(_decode_body, raw)
    _check_support(body)
    media = RequestMedia(limits)
    messages = _read_messages(body, media)
    if not 1 <= len(messages) <= limits.max_messages:
        refuse("input", f"input holds {len(messages)} messages; wanted 1 to {limits.max_messages}")
    choice = check_tool_choice(body.tool_choice, _read_tools(body.tools or []))
    parallel = body.parallel_tool_calls is not False
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
        tools=choice.tools,
        must_call=choice.must_call,
        parallel_calls=parallel and not choice.named,
        instructions=body.instructions,
        metadata=body.metadata,
        told_tools=tuple(body.tools or ()),
        tool_choice=body.tool_choice or "auto",
        parallel_tool_calls=parallel,
        reasons=(body.reasoning or {}).get("effort") != "none",
        media=media.known,
        looks=tuple(media.looks),
        places=tuple(media.places),
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


def _read_messages(body: Body, media: RequestMedia) -> tuple[Message, ...]:
    items = [Item(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    turns = [to_message("instructions", Turn("system", body.instructions))] if body.instructions else []
    before, known = "", set[str]()
    for position, item in enumerate(items):
        where = f"input[{position}]"
        message = _read_item(where, item, media)
        if item.type == "function_call_output" and message.call_id not in known:
            refuse(
                where, f"{where} answers the call {message.call_id[:40]!r}, which is none", "send it before"
            )
        known.update(call.id for call in message.tool_calls)
        # A text and the calls after it are separate items of one answer.
        if item.type == "function_call" and before in ("function_call", "assistant"):
            joined = (*turns[-1].tool_calls, *message.tool_calls)
            turns[-1] = msgspec.structs.replace(turns[-1], tool_calls=joined)
        else:
            turns.append(message)
        before = message.role if item.type == "message" else item.type
    try:
        return tuple(order_results(turns))
    except RowError as error:
        refuse("input", str(error))


def _read_item(where: str, item: Item, media: RequestMedia) -> Message:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        return to_message(where, Turn("assistant", tool_calls=[{"id": item.call_id, "function": function}]))
    if item.type == "function_call_output":
        return to_message(where, Turn("tool", _read_parts(item.output), tool_call_id=item.call_id))
    if item.type != "message" or item.role is None:
        refuse(
            where,
            f"{where} is of type {item.type!r}{'' if item.role else ' without a role'}",
            'send messages, {"role": …, "content": …}, function_call and function_call_output',
        )
    return to_message(where, Turn(item.role, _read_parts(item.content)), media)


def _read_parts(content: str | list[Part] | None) -> str | list[Part] | None:
    if isinstance(content, str) or content is None:
        return content
    return [
        msgspec.structs.replace(part, type=PARTS[part.type]) if part.type in PARTS else part
        for part in content
    ]


def _read_tools(given: list[ToolBody]) -> tuple[Tool, ...]:
    for position, tool in enumerate(given):
        if tool.type != "function":
            refuse(
                "tools", f"tools[{position}] is of type {tool.type[:40]!r}: not supported", "send functions"
            )
    functions = [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in given
    ]
    return check_tools(
        [
            {"type": "function", "function": {key: value for key, value in one.items() if value is not None}}
            for one in functions
        ]
    )


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
