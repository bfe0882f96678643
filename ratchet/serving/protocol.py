"""Read and write OpenAI's chat completions: a checked `Chat` from a body, JSON or events from an answer.

Not covered, and refused by name: penalties, and anything but text, pictures and recordings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar

import msgspec

from ratchet.config.data import MediaConfig
from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import (
    MEDIA_MARK,
    MOST_MARKS,
    Message,
    RowError,
    Tool,
    ToolCall,
    has_mark_run,
    normalise,
    split_reasoning,
    texts_of,
    without_marks,
)
from ratchet.data.forms import order_results, read_calls, read_tools
from ratchet.errors import MediaError
from ratchet.media.names import from_base64, from_uri
from ratchet.media.pictures import read_picture
from ratchet.media.sounds import read_sound
from ratchet.monitoring.pictures import Look
from ratchet.monitoring.sounds import describe
from ratchet.serving.engine import Ask, Ended, JsonForm, Piece, Scored
from ratchet.serving.faults import Fault

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
NOT_SUPPORTED = (
    *("functions", "function_call", "moderation"),
    *("logit_bias", "presence_penalty", "frequency_penalty", "modalities", "audio", "prediction"),
    *("reasoning_effort", "verbosity", "web_search_options"),
)
# Values of unsupported fields that ask for what is done anyway, since some clients always send every field.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
MAX_STOPS = 4
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot follow; JSON has no infinity
Decoded = TypeVar("Decoded")
SOUND_REMEDIES = {  # reason of a refused recording → what helps
    "media_size": "send a shorter recording, and a long one as MP3 or with fewer samples a second",
    "media_silent": "send a recording in which something is heard",
    "media_type": "send a WAV or MP3 file in base64",
}
REMEDIES = {  # reason of a refused picture → what helps
    "media_size": "send a smaller picture",
    "media_type": "send a PNG or JPEG as data:image/png;base64,…",
}


class ImageUrl(msgspec.Struct):
    url: str
    detail: str | None = None  # accepted and ignored: the model's processor decides


class InputAudio(msgspec.Struct):
    data: str
    format: str | None = None  # not relied on: the bytes tell what they are


class Part(msgspec.Struct):
    type: str
    text: str | None = None
    image_url: ImageUrl | str | None = None  # a text in the Responses protocol
    input_audio: InputAudio | None = None


class Turn(msgspec.Struct):
    """The fields of a message that are read; others (`name`, `refusal`, …) are ignored."""

    role: str
    content: str | list[Part] | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Any = None  # padding against traffic analysis of encrypted streams; none is sent


class SchemaBody(msgspec.Struct, forbid_unknown_fields=True):
    """The field `json_schema`; the answer always follows the schema, whatever `strict` says."""

    name: str
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class FormatBody(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaBody | None = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request's body; an unknown field is refused, since it may be a misspelt limit."""

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
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: FormatBody | None = None
    user: str | None = None
    safety_identifier: str | None = None  # OpenAI's newer name for `user`
    # Accepted and ignored: they concern storing and billing at OpenAI.
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    # NOT_SUPPORTED
    moderation: Any = None
    functions: Any = None
    function_call: Any = None
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
    """A request that is not streamed, so that an upstream may send the answer in one piece."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A checked request; for a value of None, the version's own settings decide."""

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
    form: JsonForm | None = None
    top_logprobs: int | None = None
    num_choices: int = 1
    tools: tuple[Tool, ...] = ()
    parallel_calls: bool = True
    must_call: tuple[str, ...] = ()
    reasons: bool = True
    media: Mapping[str, bytes] = field(default_factory=dict)  # the messages' pictures and recordings by name
    looks: tuple[Look, ...] = ()  # how these look or sound, for the request log
    places: tuple[str, ...] = ()  # where each of them stands in the body

    def ask(self, id: str, version: int, choice: int = 0) -> Ask:
        """Return the engine's request for one choice; its seed is the client's plus the choice's number."""
        kind = Ask if self.stream else WholeAsk
        return kind(
            id,
            version,
            self.messages,
            self.max_tokens,
            self.temperature,
            self.top_p,
            None if self.seed is None else self.seed + choice,
            self.stop,
            self.form,
            self.top_logprobs,
            self.tools,
            self.parallel_calls,
            self.must_call,
            self.reasons,
            self.media,
        )

    def fault_of(self, error: MediaError) -> Fault:
        """Return the fault that names the place of the medium that the base cannot take."""
        where = self.places[error.medium]
        return Fault(400, f"{where}: {error}", param=where)

    def logged(self) -> tuple[tuple[str, str], ...]:
        """Return roles and texts for the request log, preceded by the offered tools, if any."""
        offered = (("tools", msgspec.json.encode(self.tools).decode()),) if self.tools else ()
        return (*offered, *((message.role, message.text) for message in self.messages))


# --- requests ---

_decode_body = msgspec.json.Decoder(Body)
_decode_feedback = msgspec.json.Decoder(FeedbackBody)


def parse_chat(raw: bytes, limits: GatewayConfig) -> Chat:
    """Return a checked request. Raises Fault(400) with the field, the value seen and the value wanted."""
    body = decode(_decode_body, raw)
    _check_support(body)
    if not 1 <= len(body.messages) <= limits.max_messages:
        refuse(
            "messages",
            f"messages holds {len(body.messages)}; wanted 1 to {limits.max_messages}",
            "leave out the oldest turns" if body.messages else "",
        )
    media = RequestMedia(limits)
    try:
        messages = order_results(
            [to_message(f"messages[{at}]", turn, media) for at, turn in enumerate(body.messages)]
        )
    except RowError as error:
        refuse("messages", str(error))
    offered = check_tools(body.tools)
    choice = check_tool_choice(body.tool_choice, offered)
    return Chat(
        model=body.model,
        messages=tuple(messages),
        user=check_text("user", body.user or body.safety_identifier or ""),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        max_tokens=_check_max_tokens(body, limits.max_tokens),
        temperature=check_range("temperature", body.temperature, 0.0, 2.0),
        top_p=check_range("top_p", body.top_p, 0.0, 1.0),
        seed=check_range("seed", body.seed, -(2**63), 2**63 - 1),
        stop=_check_stop(body.stop),
        form=_check_format(body.response_format),
        top_logprobs=_check_logprobs(body),
        num_choices=_check_choices(body),
        parallel_calls=body.parallel_tool_calls is not False and not choice.named,
        tools=choice.tools,
        must_call=choice.must_call,
        reasons=body.reasoning_effort != "none",
        media=media.known,
        looks=tuple(media.looks),
        places=tuple(media.places),
    )


def parse_feedback(raw: bytes) -> FeedbackBody:
    """Return checked feedback, its `score` as a number. Raises Fault(400)."""
    body = decode(_decode_feedback, raw)
    for name in ("label", "answer", "comment", "user"):
        check_text(name, getattr(body, name) or "")
    if body.score is None and not (body.label or body.answer or body.comment):
        refuse("score", "the feedback says nothing", "send one of score, label, answer, comment")
    return msgspec.structs.replace(
        body, score=check_range("score", None if body.score is None else float(body.score), 0.0, 1.0)
    )


def decode(decoder: msgspec.json.Decoder[Decoded], raw: bytes) -> Decoded:
    """Decode a body. Raises Fault(400): it is not JSON, or a field has a wrong type."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise Fault(
            400,
            f"{path.rstrip('`') or 'the body'}: {message}",
            remedy="docs/operations.md lists the fields of each endpoint",
            param=path.rstrip("`") or None,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Fault(
            400,
            f"the body is no JSON: {error}",
            remedy="send one JSON object in UTF-8; NaN, Infinity and half a surrogate pair are no JSON",
        ) from None


def _check_support(body: Body) -> None:
    for name in NOT_SUPPORTED:
        if getattr(body, name) and getattr(body, name) not in DEFAULTS.get(name, ()):
            refuse(name, f"{name} is not supported", "leave it out")
    if body.stream_options and not body.stream:
        refuse("stream_options", "stream_options came without stream", "send stream: true, or leave it out")


@cache
def _limits_of(max_seconds: float) -> MediaConfig:
    """Return the limits of a request's media; to validate them for each request would cost each its time."""
    return MediaConfig(max_seconds=max_seconds)


class RequestMedia:
    """Collect the pictures and recordings of a request, within `limits`."""

    def __init__(self, limits: GatewayConfig) -> None:
        self.known: dict[str, bytes] = {}
        self.looks: list[Look] = []
        self.places: list[str] = []
        self._room, self._room_for_sounds = limits.max_pictures, limits.max_sounds
        self._limits = _limits_of(limits.max_sound_seconds)

    def hear(self, where: str, part: Part) -> str:
        """Return the name of a part's recording. Raises Fault(400)."""
        if not self._room_for_sounds:
            refuse(
                where, f"{where} is one recording too many", "`gateway.max_sounds` sets how many are taken"
            )
        self._room_for_sounds -= 1
        if part.input_audio is None or not part.input_audio.data:
            refuse(
                where,
                f"{where} holds no recording",
                "send {'type': 'input_audio', 'input_audio': {'data': BASE64, 'format': 'wav'}}",
            )
        given = part.input_audio.data
        try:
            data = from_uri(given) if given[:5].lower() == "data:" else from_base64(given)
            sound = read_sound(data, self._limits)
        except RowError as error:
            said = str(error).replace("ingest.media.max_seconds", "gateway.max_sound_seconds")
            refuse(where, f"{where}: {said}", SOUND_REMEDIES.get(error.reason, "send it again, whole"))
        return self._keep(where, sound.name, sound.data)

    def _keep(self, where: str, name: str, data: bytes) -> str:
        self.places.append(where)
        self.known[name] = data
        self.looks.append(describe(name, data))
        return name

    def read(self, where: str, part: Part) -> str:
        """Return the name of a part's picture. Raises Fault(400)."""
        if not self._room:
            refuse(
                where, f"{where} is one picture too many", "`gateway.max_pictures` sets how many are taken"
            )
        self._room -= 1
        url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url or ""
        if url[:5].lower() != "data:":
            refuse(
                where,
                f"{where} refers to {url[:40]!r}, and nothing is fetched from elsewhere"
                if url
                else f"{where} holds no picture",
                "send the picture itself, as data:image/png;base64,…",
            )
        try:
            picture = read_picture(from_uri(url), self._limits)
        except RowError as error:
            refuse(where, f"{where}: {error}", REMEDIES.get(error.reason, "send it again, whole"))
        return self._keep(where, picture.name, picture.data)


def to_message(where: str, turn: Turn, media: RequestMedia | None = None) -> Message:
    """Return a checked message; `where` names its place in the body. Raises Fault(400).

    Pictures and recordings of users' messages are added to `media`; None: no message may have any.
    """
    role = ROLES.get(turn.role)
    if role is None:
        refuse(f"{where}.role", f"{where}.role is {turn.role!r}; known: {', '.join(ROLES)}")
    try:
        calls = read_calls({"tool_calls": without_marks(turn.tool_calls)})
    except RowError as error:
        refuse(f"{where}.tool_calls", f"{where}: {error}")
    if calls and role != "assistant":
        refuse(f"{where}.tool_calls", f"{where} is by {role} and calls tools; the assistant's do")
    if turn.content is None and not calls:
        refuse(f"{where}.content", f"{where}.content is missing; wanted text")
    # Normalised like the training rows: otherwise Windows line ends would make another prompt.
    names: list[str] = []
    shown = media if role == "user" else None
    content = check_text(f"{where}.content", _join(where, turn.content or "", shown, names))
    reasoning = check_text(f"{where}.reasoning_content", without_marks(turn.reasoning_content or ""))
    if role == "assistant" and not reasoning:
        reasoning, content = split_reasoning(content)
    for text in texts_of([Message(role, "", calls)]):
        check_text(f"{where}.tool_calls", text)
    return Message(
        role,
        normalise(content),
        calls,
        normalise(reasoning) if role == "assistant" else "",
        call_id=turn.tool_call_id or "" if role == "tool" else "",
        media=tuple(names),
    )


def check_tools(given: Any) -> tuple[Tool, ...]:
    """Return the tools of a request. Raises Fault(400)."""
    try:
        tools = read_tools(without_marks(given))
    except RowError as error:
        refuse("tools", str(error))
    for text in texts_of([], tools):
        check_text("tools", text)
    return tools


class ToolChoice(NamedTuple):
    """The offered tools, the names of which one must be called, and whether the client named just one."""

    tools: tuple[Tool, ...]
    must_call: tuple[str, ...] = ()
    named: bool = False


def check_tool_choice(given: Any, tools: tuple[Tool, ...]) -> ToolChoice:
    """Return what `tool_choice` leaves to the model. Raises Fault(400): it names no tool of the request."""
    if given in (None, "auto"):
        return ToolChoice(tools)
    if given == "none":
        return ToolChoice(())
    names = tuple(str(tool["function"]["name"]) for tool in tools)
    if given == "required":
        if not tools:
            refuse("tool_choice", "tool_choice is 'required', and no tools are offered", "send them in tools")
        return ToolChoice(tools, names)
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "allowed_tools":
        inner = given.get(kind, given)
        allowed = inner.get("tools") if isinstance(inner, dict) else None
        if not isinstance(allowed, list) or not allowed or inner.get("mode") not in ("auto", "required"):
            refuse(
                "tool_choice",
                f"tool_choice is {str(given)[:80]}",
                "allowed_tools has a `mode` of auto or required, and `tools` with the name of each",
            )
        chosen = {_named_tool(tool, given, names) for tool in allowed}
        # The others are not offered at all, so that the model cannot call them.
        tools = tuple(tool for tool in tools if tool["function"]["name"] in chosen)
        return check_tool_choice(inner["mode"], tools)
    return ToolChoice(tools, (_named_tool(given, given, names),), named=True)


def _named_tool(given: Any, choice: Any, offered: Sequence[str]) -> str:
    """Return the name of the function that a part of `tool_choice` names. Raises Fault(400)."""
    inner = given.get("function", given) if isinstance(given, dict) else None
    name = inner.get("name") if isinstance(inner, dict) and given.get("type") == "function" else None
    if name is None:
        refuse(
            "tool_choice",
            f"tool_choice is {str(choice)[:80]}",
            "send none, auto, required, allowed_tools, or a function of tools by its name",
        )
    if name not in offered:
        refuse(
            "tool_choice",
            f"tool_choice names {str(name)[:40]!r}, which tools do not offer",
            f"offered: {', '.join(offered)[:200] or 'nothing'}",
        )
    return str(name)


def _join(where: str, content: str | list[Part], media: RequestMedia | None, names: list[str]) -> str:
    """Join the texts of a message, with a MEDIA_MARK for each medium, whose name is added to `names`.

    MEDIA_MARKs of the client's own go, since they would be places for such.
    """
    if isinstance(content, str):
        return content.replace(MEDIA_MARK, "")
    text, follows = "", False  # whether a text follows a text
    for position, part in enumerate(content):
        place = f"{where}.content[{position}]"
        if part.type in ("image_url", "input_audio") and media is not None:
            names.append((media.read if part.type == "image_url" else media.hear)(place, part))
            text, follows = text + MEDIA_MARK, False
        elif part.type == "text" and part.text is not None:
            text += ("\n" if follows else "") + part.text.replace(MEDIA_MARK, "")
            follows = True
        else:
            refuse(
                place,
                f"{place} is of type {part.type!r}; wanted parts {{'type': 'text', 'text': …}}, and in "
                "users' messages {'type': 'image_url', 'image_url': {'url': 'data:image/png;base64,…'}} and "
                "{'type': 'input_audio', 'input_audio': {'data': BASE64, 'format': 'wav'}}",
            )
    return text


def check_text(where: str, text: str) -> str:
    """Return a text unchanged. Raises Fault(400) for NUL, which cannot be stored, and for runs of marks."""
    if "\0" in text:
        refuse(where, f"{where} holds a NUL character at {text.index(chr(0))}", "remove it")
    if has_mark_run(text):
        refuse(where, f"{where} holds more than {MOST_MARKS} combining marks in a row", "leave them out")
    return text


def _check_max_tokens(body: Body, most: int) -> int | None:
    if None not in (body.max_tokens, body.max_completion_tokens) and (
        body.max_tokens != body.max_completion_tokens
    ):
        refuse(
            "max_tokens",
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}",
            "send one of them: they mean the same",
        )
    field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return check_range(field, getattr(body, field), 1, most)


Number = TypeVar("Number", int, float)


def check_range(field: str, value: Number | None, low: float, high: float) -> Number | None:
    """Return a number unchanged. Raises Fault(400): it is out of range, or NaN."""
    if value is not None and not low <= value <= high:
        refuse(field, f"{field} is {str(value)[:40]}; wanted {low:g} to {high:g}")
    return value


def _check_stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or "" in stops:
        refuse(
            "stop",
            f"stop holds {len(stops)} text(s){', one of them empty' if '' in stops else ''}; "
            f"wanted at most {MAX_STOPS}, none of them empty",
        )
    return stops


def _check_format(asked: FormatBody | None) -> JsonForm | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return JsonForm()
    if asked.json_schema is None or asked.json_schema.schema is None:
        refuse(
            "response_format.json_schema",
            "response_format is of type 'json_schema' and brings no schema",
            'send {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}',
        )
    return to_form(asked.json_schema.name, asked.json_schema.schema)


def to_form(name: str, schema: dict[str, Any]) -> JsonForm:
    return JsonForm(msgspec.json.encode(schema).decode(), name)


def _check_logprobs(body: Body) -> int | None:
    """Return how many alternatives are wanted for each token; None: no log probabilities are."""
    if body.top_logprobs and not body.logprobs:
        refuse("top_logprobs", "top_logprobs came without logprobs", "send logprobs: true with it")
    top = check_range("top_logprobs", body.top_logprobs, 0, MAX_TOP_LOGPROBS) or 0
    return top if body.logprobs else None


def _check_choices(body: Body) -> int:
    n = check_range("n", body.n, 1, MAX_CHOICES) or 1
    if n > 1 and not body.temperature:
        refuse(
            "n",
            f"n is {n} at temperature {body.temperature or 0:g}: all choices would be the same",
            "send a temperature above 0 with it",
        )
    return n


def refuse(param: str, message: str, remedy: str = "") -> NoReturn:
    """Raise Fault(400) on a field."""
    raise Fault(400, message, remedy=remedy, param=param)


# --- answers ---


@dataclass
class Answer:
    """One choice of an answer, collected from the engine's pieces."""

    texts: list[str] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    ended: Ended | None = None
    calls: list[ToolCall] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def said(self) -> str:
        """Return the text with the calls in it, as rows and metrics have them."""
        return Message("assistant", self.text, tuple(self.calls)).text

    def add(self, piece: Piece) -> None:
        if piece.text:
            self.texts.append(piece.text)
        if piece.reasoning:
            self.reasonings.append(piece.reasoning)
        self.tokens += piece.tokens
        self.calls += piece.calls


class Encoder(Protocol):
    """Writes an answer in a client's protocol: in one body, or as events."""

    def whole(self, answers: Sequence[Answer]) -> bytes:
        """Return the body that holds all choices."""

    def begin(self) -> bytes:
        """Return the events before any text."""

    def piece(self, index: int, piece: Piece) -> bytes:
        """Return the events of a piece of choice `index`."""

    def end(self, answers: Sequence[Answer]) -> bytes:
        """Return the events after all pieces."""

    def fail(self, fault: Fault) -> bytes:
        """Return an error as an event, since the status is sent once an answer has begun."""


@dataclass(frozen=True)
class ChatEncoder:
    """The encoder of chat completions; `fingerprint` is `name@vN`."""

    id: str
    created: int
    fingerprint: str
    chat: Chat

    def whole(self, answers: Sequence[Answer]) -> bytes:
        choices = [
            {
                "index": index,
                "message": self._message(index, answer),
                "logprobs": self._logprobs(answer.tokens),
                "finish_reason": answer.ended.finish if answer.ended else None,
            }
            for index, answer in enumerate(answers)
        ]
        return self._encode("chat.completion", choices, {"usage": _usage(answers)})

    def _message(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text or None, "tool_calls": self._calls(index, answer.calls)}
        if answer.reasonings:
            message["reasoning_content"] = "".join(answer.reasonings)
        return message

    def _calls(self, index: int, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        """Return calls in OpenAI's form; their ids are made from the request's, so each is unique."""
        head = f"call_{self.id.rpartition('-')[2]}_{index}"
        return [
            {
                "id": f"{head}_{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": msgspec.json.encode(call.arguments).decode()},
            }
            for number, call in enumerate(calls)
        ]

    def begin(self) -> bytes:
        return b"".join(
            self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.chat.num_choices)
        )

    def piece(self, index: int, piece: Piece) -> bytes:
        alone = (piece.calls or piece.reasoning) and not piece.text
        delta: dict[str, Any] = {} if alone else {"content": piece.text}
        if piece.reasoning:
            delta["reasoning_content"] = piece.reasoning
        if piece.calls:
            calls = enumerate(self._calls(index, piece.calls))
            delta["tool_calls"] = [{"index": number, **call} for number, call in calls]
        return self._chunk(index, delta, piece.tokens)

    def end(self, answers: Sequence[Answer]) -> bytes:
        ends = [
            self._chunk(index, {}, finish=answer.ended.finish)
            for index, answer in enumerate(answers)
            if answer.ended
        ]
        if self.chat.include_usage:
            ends.append(_event(self._encode("chat.completion.chunk", [], {"usage": _usage(answers)})))
        return b"".join(ends) + DONE

    def fail(self, fault: Fault) -> bytes:
        return _event(fault.body())

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[Scored] = (), *, finish: str | None = None
    ) -> bytes:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        more = {"usage": None} if self.chat.include_usage else {}
        return _event(self._encode("chat.completion.chunk", [choice], more))

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any] | None:
        if self.chat.top_logprobs is None:
            return None
        return {"content": [encode_scored(token) for token in tokens], "refusal": None}

    def _encode(self, kind: str, choices: list[Any], more: dict[str, Any]) -> bytes:
        body = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.chat.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        return msgspec.json.encode(body | more)


DONE = b"data: [DONE]\n\n"


def encode_scored(scored: Scored) -> dict[str, Any]:
    """Return a token in OpenAI's form, with its likeliest alternatives."""
    return {**_encode_token(scored), "top_logprobs": [_encode_token(other) for other in scored.top]}


def _encode_token(scored: Scored) -> dict[str, Any]:
    return {
        "token": scored.token.decode("utf-8", "replace"),
        "logprob": max(scored.logprob, LEAST_LOGPROB),
        "bytes": list(scored.token),
    }


def count_tokens(answers: Sequence[Answer]) -> tuple[int, int]:
    """Return the tokens of the prompt, which all choices share, and those of all answers."""
    ended = [answer.ended for answer in answers if answer.ended]
    return max((one.prompt_tokens for one in ended), default=0), sum(one.answer_tokens for one in ended)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt, answer = count_tokens(answers)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


class Model(msgspec.Struct):
    """A model, in OpenAI's form."""

    id: str
    created: int
    owned_by: str = "ratchet"
    object: str = "model"


def encode_models(models: Sequence[Model]) -> bytes:
    return msgspec.json.encode({"object": "list", "data": models})
