"""The internal form of every row: `Example`, a conversation that ends with the answer to learn.

The id is the hash of the normalised messages, so that the same content has the same id in every file. Not
covered here: the external forms (`ratchet.data.forms`), and the checks that make a row unfit for training
(`ratchet.data.validation`, tasks/prepare.py).
"""

from __future__ import annotations

import base64
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ratchet.errors import DataError
from ratchet.errors import RowError as RowError
from ratchet.media.names import MEDIA as MEDIA
from ratchet.media.names import MEDIA_ERROR as MEDIA_ERROR
from ratchet.media.names import MEDIA_MARK as MEDIA_MARK
from ratchet.media.names import MEDIA_NAME as MEDIA_NAME
from ratchet.media.names import is_sound

CONTINUE = "Continue."  # the fixed prompt of rows that are plain text
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"  # how most models, and the rows that they wrote, mark reasoning
CALL_LINE = re.compile(f"^{CALL_OPEN}(.*){CALL_CLOSE}$", re.MULTILINE)
INDENT = re.compile(r"\t[\t ]*| [\t ]+")  # an indent, as of code; a single blank is an accident
ROLES = ("system", "user", "assistant", "tool")
MOST_MARKS = 32
Meta = dict[str, str | int | float | bool | None]
PART_OF = "part_of"  # key of a held-out row's meta: the batch among whose test rows it counts
PEOPLE = ("user", "asked_by", "taught_by")  # keys of a row, or of its `meta`, that name a person
RawRow = dict[str, Any]  # a row as read from its file: any JSON object, not validated


Tool = dict[str, Any]  # in OpenAI's format: {"type": "function", "function": {"name", "description", …}}


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call of a tool. `id` links a result to its call in a file or a request; it is empty in examples."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn; `learned` is False for an answer that stays out of the loss (OpenAI's `weight: 0`)."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    learned: bool = True
    call_id: str = ""  # of a tool's result: the call it answers; empty once results are in the order of calls
    media: tuple[
        str, ...
    ] = ()  # names of its pictures and recordings, in the order of the MEDIA_MARKs in `content`

    @property
    def text(self) -> str:
        """Return the content and the calls, each on a line, as metrics and people compare them."""
        return "\n".join(filter(None, (self.content, *map(call_text, self.tool_calls))))

    @property
    def is_plain(self) -> bool:
        return not (self.tool_calls or self.reasoning or self.media)


class Example(msgspec.Struct, frozen=True, omit_defaults=True):
    """One conversation that ends with the answer to learn; `meta` holds batch, source and slices."""

    id: str
    messages: tuple[Message, ...]
    meta: Meta
    tools: tuple[Tool, ...] = ()  # the tools that the prompt offers
    rejected: Message | None = None  # a worse answer to the same prompt
    desirable: bool = True  # False: the last message is an answer not to give

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def media(self) -> tuple[str, ...]:
        """Return the names of all pictures and recordings of the row, in order."""
        return media_of(self.messages)

    @property
    def answer(self) -> str:
        return self.messages[-1].text

    @property
    def worse(self) -> Example | None:
        """Return the row that ends with the worse answer instead, or None."""
        if self.rejected is None:
            return None
        return msgspec.structs.replace(self, messages=(*self.prompt, self.rejected), rejected=None)

    @property
    def question(self) -> str:
        """Return the last turn before the answer: a user's, or a tool's result."""
        return self.messages[-2].text


def media_of(messages: Iterable[Message]) -> tuple[str, ...]:
    """Return the names of all pictures and recordings of a conversation, in order."""
    return tuple(name for message in messages for name in message.media)


def has_mark_run(text: str) -> bool:
    """Tell whether the text has a run of more than MOST_MARKS combining marks.

    NFC sorts such a run in quadratic time; UAX 15 calls 30 enough for every language.
    """
    return not text.isascii() and _marks().search(text) is not None


@cache
def _marks() -> re.Pattern[str]:
    planes = (*range(0x300, 0xD800), *range(0xE000, 0x1F000))  # no surrogates; there are no marks above
    marks = "".join(
        char for char in map(chr, planes) if unicodedata.combining(unicodedata.normalize("NFKD", char)[0])
    )
    return re.compile(f"[{re.escape(marks)}]{{{MOST_MARKS + 1}}}")


def call_text(call: ToolCall) -> str:
    """Write a call as one line of JSON with sorted keys, so that equal calls give equal texts."""
    said = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False, sort_keys=True)
    return f"{CALL_OPEN}{said}{CALL_CLOSE}"


def calls_in(text: str) -> list[ToolCall]:
    """Read the calls from a text that `Message.text` wrote; lines that are no valid call are skipped."""
    found: list[ToolCall] = []
    for line in CALL_LINE.findall(text):
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=ToolCall))
    return found


def read_answer(text: str, tools: Sequence[Tool]) -> Message:
    """Read an answer back from its `Message.text`; a line that calls no tool of `tools` stays text."""
    offered = tool_names(tools)
    lines, calls = list[str](), list[ToolCall]()
    for line in text.split("\n"):
        found = [call for call in calls_in(line) if call.name in offered]
        calls += found
        lines += [] if found else [line]
    return Message("assistant", "\n".join(lines), tuple(calls))


def tool_names(tools: Iterable[Tool]) -> set[str]:
    return {tool["function"]["name"] for tool in tools}


def split_reasoning(text: str) -> tuple[str, str]:
    """Return (reasoning, content) of a text that begins with a `<think>` block; any other is only content."""
    begun = text.lstrip()
    if not begun.startswith(THINK) or THOUGHT not in begun:
        return "", text
    reasoning, _, content = begun.removeprefix(THINK).partition(THOUGHT)
    return reasoning, content


def normalise(text: str) -> str:
    """Return the text in NFC, with `\\n` for each line end, and trimmed (`trim`); change nothing else."""
    if text.isascii() and "\r" not in text:
        return trim(text)
    for line_end in ("\r\n", "\r", "\u2028", "\u2029", "\u0085"):
        text = text.replace(line_end, "\n")
    return trim(unicodedata.normalize("NFC", text))


def trim(text: str) -> str:
    """Strip whitespace at the end and empty lines at the start, but keep an indent, as of code."""
    text = text.rstrip()
    return trim_start(text) if text[:1].isspace() else text


def overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` that begins `mark` without completing it."""
    return next(
        (size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0
    )


def trim_start(text: str) -> str:
    """Strip empty lines and a single blank at the start, but keep an indent."""
    first = text.lstrip()
    indent = text[: len(text) - len(first)].rpartition("\n")[2]
    return indent + first if INDENT.fullmatch(indent) else first


def example_id(messages: Iterable[Message], tools: Sequence[Tool] = ()) -> str:
    """Hash a row to 128 bits, 32 hex digits; of plain messages, only role and content are hashed."""
    hasher = xxhash.xxh3_128()
    for message in messages:
        parts: list[Any] = [message.role, normalise(message.content)]
        if not (message.is_plain and message.learned):
            calls = [[call.name, call.arguments] for call in message.tool_calls]
            parts += [calls, normalise(message.reasoning), message.learned, *message.media]
        hasher.update(msgspec.json.encode(parts))
    if tools:
        hasher.update(msgspec.json.encode(tools))
    return hasher.hexdigest()


def prompt_key(example: Example) -> int:
    """Hash the prompt, in lower case and with its tools, to 64 bits."""
    asked: list[object] = [
        [message.role, normalise(message.text).lower(), *message.media] for message in example.prompt
    ]
    return xxhash.xxh3_64_intdigest(msgspec.json.encode(asked + list(example.tools)))


def make_example(
    messages: Iterable[Message],
    meta: Meta,
    *,
    tools: Sequence[Tool] = (),
    rejected: Message | None = None,
    desirable: bool = True,
) -> Example:
    """Normalise and check a conversation.

    Raises RowError for an empty message, an unknown role, turns out of order, a missing answer, a call of a
    tool that is not offered, and text that is not valid Unicode.
    """
    clean = tuple(_clean(position, message) for position, message in enumerate(messages))
    _check_turns(clean)
    _check_calls(clean, tools)
    if rejected is not None:
        rejected = _clean(len(clean) - 1, rejected)
        _check_turns((*clean[:-1], rejected))
    id = judged_id(example_id(clean, tools), rejected, desirable=desirable)
    return Example(id, clean, meta, tuple(tools), rejected, desirable)


def judged_id(id: str, rejected: Message | None, *, desirable: bool) -> str:
    """Return the id of a judged row, which differs from that of the same row without a judgement."""
    if rejected is None and desirable:
        return id
    worse = rejected and [normalise(rejected.content), rejected.tool_calls]
    return xxhash.xxh3_128_hexdigest(id.encode() + msgspec.json.encode([worse, desirable]))


def _clean(position: int, message: Message) -> Message:
    for text in (message.content, message.reasoning):
        if has_mark_run(text):
            raise RowError(
                "mark_run", f"message {position} holds more than {MOST_MARKS} combining marks in a row"
            )
    return msgspec.structs.replace(
        message, content=normalise(message.content), reasoning=normalise(message.reasoning)
    )


def map_texts(messages: Iterable[Message], change: Callable[[str], str]) -> list[Message]:
    """Apply `change` to each text of the messages: content, reasoning, and strings in arguments of calls."""
    return [
        msgspec.structs.replace(
            message,
            content=change(message.content),
            reasoning=change(message.reasoning) if message.reasoning else "",
            tool_calls=tuple(
                msgspec.structs.replace(call, arguments=map_strings(call.arguments, change))
                for call in message.tool_calls
            ),
        )
        for message in messages
    ]


def without_marks(value: Any) -> Any:
    """Remove MEDIA_MARKs from a JSON value, keys too: a text of its own makes no place for a picture."""
    if isinstance(value, str):
        return value.replace(MEDIA_MARK, "")
    if isinstance(value, dict):
        return {without_marks(key): without_marks(inner) for key, inner in value.items()}
    return [without_marks(inner) for inner in value] if isinstance(value, list) else value


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to each string in a JSON value; keys stay unchanged."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_strings(inner, change) for key, inner in value.items()}
    return [map_strings(inner, change) for inner in value] if isinstance(value, list) else value


def texts_of(messages: Iterable[Message], tools: Sequence[Tool] = ()) -> list[str]:
    """List each text of a conversation, also those of the tools and the names of arguments."""
    found: list[str] = []
    for message in messages:
        found += filter(None, (message.content, message.reasoning))
        for call in message.tool_calls:
            found += [call.name, *strings_in(call.arguments)]
    return [*found, *strings_in(list(tools))]


def strings_in(value: Any) -> Iterator[str]:
    """Yield each text of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def _check_turns(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise RowError("empty_messages", "the row has no messages")
    for position, message in enumerate(messages):
        if message.role not in ROLES:
            raise RowError("unknown_role", f"role {message.role[:40]!r}; known: {', '.join(ROLES)}")
        if not message.content and not message.tool_calls and message.role != "tool":
            reason = "no_answer" if message.role == "assistant" else "empty_content"
            raise RowError(reason, f"message {position} ({message.role}) is empty")
        if message.content.count(MEDIA_MARK) != len(message.media) or (
            message.media and message.role != "user"
        ):
            raise RowError(
                "media_place",
                f"message {position} ({message.role}) has {len(message.media)} pictures or recordings "
                f"and {message.content.count(MEDIA_MARK)} places for them; only a user's may have any",
            )
        for text in texts_of([message]):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RowError("invalid_unicode", f"message {position} holds a lone surrogate") from None
            if "\x00" in text:
                raise RowError("nul_character", f"message {position} holds a NUL character")
    turns = messages[1:] if messages[0].role == "system" else messages
    before = Message("assistant", "")
    waiting = 0  # calls without a result
    for position, message in enumerate(turns):
        wanted = "tool" if waiting else "user" if before.role == "assistant" else "assistant"
        if message.role != wanted:
            raise RowError(
                "turn_order",
                f"turn {position} is by {message.role}, wanted {wanted}; turns alternate user, assistant, "
                "after at most one system message, and each call of a tool is followed by its result",
            )
        waiting = waiting - 1 if waiting else len(message.tool_calls)
        before = message
    if not turns or turns[-1].role != "assistant":
        raise RowError("no_answer", "the last message is not the assistant's: nothing to learn")


def _check_calls(messages: tuple[Message, ...], tools: Sequence[Tool]) -> None:
    offered = tool_names(tools)
    for message in messages:
        for call in message.tool_calls:
            if call.name not in offered:
                raise RowError(
                    "unknown_tool",
                    f"the tool {call.name[:40]!r} is called, and `tools` does not offer it",
                )


# --- files of examples --------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Example)


def counted_in(row: Example) -> str:
    """Return the batch among whose test rows the row counts: its own, or that which it is `PART_OF`."""
    return str(row.meta.get(PART_OF) or row.meta["batch"])


def read_examples(path: Path) -> Iterator[Example]:
    """Read the examples of a file that a stage wrote. Raises DataError, with the line, for a broken one."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}:{number} is no example: {error}",
                    remedy="the file is made by a stage; run `ratchet retrain` to make it again",
                ) from None


def content_parts(message: Message, media: Mapping[str, bytes] | None = None) -> list[dict[str, Any]]:
    """Divide a message with pictures or recordings into OpenAI's parts.

    Each picture is a data URI of its bytes in `media`, each recording a WAV file in base64; without `media`,
    they are `media:NAME`.
    """
    texts = message.content.split(MEDIA_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for name, text in zip(message.media, texts[1:], strict=True):
        if is_sound(name):
            parts.append({"type": "input_audio", "input_audio": _heard(name, media)})
        else:
            url = MEDIA + name if media is None else data_uri(name, media[name])
            parts.append({"type": "image_url", "image_url": {"url": url}})
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _heard(name: str, media: Mapping[str, bytes] | None) -> dict[str, str]:
    """Return a recording as OpenAI's protocol has it, which knows WAV and MP3 only."""
    if media is None:
        return {"data": MEDIA + name, "format": "flac"}
    from ratchet.media.sounds import to_wav  # with libsndfile: what only reads rows goes without

    return {"data": base64.b64encode(to_wav(media[name])).decode(), "format": "wav"}


def data_uri(name: str, stored: bytes) -> str:
    """Return a stored picture or recording as a data URI; `name` tells which it is."""
    kind = "audio/flac" if is_sound(name) else "image/png" if name.endswith(".png") else "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(stored).decode()}"


def to_openai(messages: Iterable[Message], media: Mapping[str, bytes] | None = None) -> list[dict[str, Any]]:
    """Convert messages to OpenAI's format; calls and their results get ids by position.

    Pictures and recordings become their bytes in `media`, or references (see `content_parts`).
    """
    written: list[dict[str, Any]] = []
    ids: list[str] = []
    for position, message in enumerate(messages):
        content = content_parts(message, media) if message.media else message.content
        turn: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if not message.learned:
            turn["weight"] = 0
        if message.tool_calls:
            ids = [f"call_{position}_{number}" for number in range(len(message.tool_calls))]
            turn["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False),
                    },
                }
                for id, call in zip(ids, message.tool_calls, strict=True)
            ]
        if message.role == "tool" and ids:
            turn["tool_call_id"] = ids.pop(0)
        written.append(turn)
    return written


def count_reasoned(examples: Iterable[Example]) -> int:
    """Count the rows with reasoning in at least one message."""
    return sum(any(message.reasoning for message in example.messages) for example in examples)


def make_raw_row(messages: Iterable[Message], meta: Meta, tools: Sequence[Tool] = ()) -> RawRow:
    """Make a row in the form `messages`, as batches store it."""
    return {"messages": to_openai(messages), "meta": meta} | ({"tools": list(tools)} if tools else {})


def make_judged_row(example: Example) -> RawRow:
    """Make a row of a preference, or of an answer not to give; without a judgement, in form `messages`."""
    messages, tools = example.messages, example.tools
    row: RawRow = {"meta": example.meta} | ({"tools": list(tools)} if tools else {})
    if example.worse:  # without `prompt`, by which it could be read in the form `completion`
        return {"chosen": to_openai(messages), "rejected": to_openai(example.worse.messages), **row}
    if example.desirable:
        return make_raw_row(messages, example.meta, tools)
    written = to_openai(messages)
    answer = written[-1:] if messages[-1].tool_calls else messages[-1].content
    return {"prompt": written[:-1], "completion": answer, "label": False, **row}


def encode_line(value: Any) -> bytes:
    """Encode one line of JSON Lines."""
    return msgspec.json.encode(value) + b"\n"
