"""The one inner form of a row: `Example(id, messages, meta)`, and the outer forms that become one.

The id is the hash of the normalised messages, so that the same content has the same id whatever file it came
in. Not covered here: what makes a row unfit for training (tasks/prepare.py decides that).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ratchet.errors import DataError

CONTINUE = "Continue."  # the fixed prompt of rows that are plain text
MOST_MARKS = 32
Meta = dict[str, str | int | float | bool | None]
RawRow = dict[str, Any]  # a row as its file gave it: any JSON object, until the validator has seen it


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Example(msgspec.Struct, frozen=True):
    """One conversation that ends with the answer to learn; `meta` holds batch, source and slices."""

    id: str
    messages: tuple[Message, ...]
    meta: Meta

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    @property
    def question(self) -> str:
        """Return the last user turn."""
        return self.messages[-2].content


class RowError(ValueError):
    """A row that cannot become an Example; `reason` is a code that is counted, the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def has_mark_run(text: str) -> bool:
    """Tell whether more than MOST_MARKS combining marks stand in a row.

    NFC orders them in quadratic time; UAX 15 calls 30 enough for every language.
    """
    return not text.isascii() and _marks().search(text) is not None


@cache
def _marks() -> re.Pattern[str]:
    planes = (*range(0x300, 0xD800), *range(0xE000, 0x1F000))
    marks = "".join(
        char for char in map(chr, planes) if unicodedata.combining(unicodedata.normalize("NFKD", char)[0])
    )
    return re.compile(f"[{re.escape(marks)}]{{{MOST_MARKS + 1}}}")


def normalise(text: str) -> str:
    """Bring a text to NFC, with `\\n` for each line end and no blanks at the ends; change nothing else."""
    if text.isascii() and "\r" not in text:
        return text.strip()
    for line_end in ("\r\n", "\r", "\u2028", "\u2029", "\u0085"):
        text = text.replace(line_end, "\n")
    return unicodedata.normalize("NFC", text).strip()


def example_id(messages: Iterable[Message]) -> str:
    """Hash the roles and normalised contents to 128 bits, 32 hex digits."""
    hasher = xxhash.xxh3_128()
    for message in messages:
        hasher.update(msgspec.json.encode([message.role, normalise(message.content)]))
    return hasher.hexdigest()


def make_example(messages: Iterable[Message], meta: Meta) -> Example:
    """Normalise and check a conversation.

    Raises RowError: empty, unknown role, turns out of order, no answer, text that is no valid Unicode.
    """
    messages = tuple(messages)
    for position, message in enumerate(messages):
        if has_mark_run(message.content):
            raise RowError(
                "mark_run", f"message {position} holds more than {MOST_MARKS} combining marks in a row"
            )
    clean = tuple(Message(message.role, normalise(message.content)) for message in messages)
    _check_turns(clean)
    return Example(example_id(clean), clean, meta)


def _check_turns(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise RowError("empty_messages", "the row has no messages")
    for position, message in enumerate(messages):
        if message.role not in ("system", "user", "assistant"):
            raise RowError("unknown_role", f"role {message.role[:40]!r}; known: system, user, assistant")
        if not message.content:
            reason = "no_answer" if message.role == "assistant" else "empty_content"
            raise RowError(reason, f"message {position} ({message.role}) is empty")
        try:
            message.content.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("invalid_unicode", f"message {position} holds a lone surrogate") from None
        if "\x00" in message.content:
            raise RowError("nul_character", f"message {position} holds a NUL character")
    turns = messages[1:] if messages[0].role == "system" else messages
    for position, message in enumerate(turns):
        if message.role != ("user", "assistant")[position % 2]:
            raise RowError(
                "turn_order",
                f"turn {position} is by {message.role}; turns alternate user, assistant, "
                "after at most one system message",
            )
    if not turns or turns[-1].role != "assistant":
        raise RowError("no_answer", "the last message is not the assistant's: nothing to learn")


# --- outer forms --------------------------------------------------------------------------------------------


def _messages(row: RawRow) -> list[Message]:
    turns = row["messages"]
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"`messages` is {type(turns).__name__}, wanted a list")
    return [Message(_text(turn, "role"), _text(turn, "content")) for turn in turns]


def _completion(row: RawRow) -> list[Message]:
    return [Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion"))]


def _instruction(row: RawRow) -> list[Message]:
    extra = _text(row, "input") if row.get("input") else ""
    question = _text(row, "instruction") + (f"\n\n{extra}" if extra else "")
    return [Message("user", question), Message("assistant", _text(row, "output"))]


def _question(row: RawRow) -> list[Message]:
    return [Message("user", _text(row, "question")), Message("assistant", _text(row, "answer"))]


def _sharegpt(row: RawRow) -> list[Message]:
    roles = {"human": "user", "gpt": "assistant"}  # the other names are ours already
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"`conversations` is {type(turns).__name__}, wanted a list")
    return [
        Message(roles.get(_text(turn, "from"), _text(turn, "from")), _text(turn, "value")) for turn in turns
    ]


def _plain_text(row: RawRow) -> list[Message]:
    """Make plain text an answer to a fixed prompt: the loss mask then covers the whole text."""
    return [Message("user", CONTINUE), Message("assistant", _text(row, "text"))]


FORMS: dict[str, tuple[str, Callable[[RawRow], list[Message]]]] = {
    "messages": ("messages", _messages),
    "completion": ("completion", _completion),
    "instruction": ("output", _instruction),
    "question": ("answer", _question),
    "sharegpt": ("conversations", _sharegpt),
    "text": ("text", _plain_text),
}


def recognise_form(row: RawRow) -> str:
    """Name of the row's form, by its keys. Raises RowError("unknown_form")."""
    starts = {
        "messages": "messages",
        "conversations": "sharegpt",
        "prompt": "completion",
        "instruction": "instruction",
        "question": "question",
        "text": "text",
    }
    for key, form in starts.items():
        if key in row:
            return form
    raise RowError(
        "unknown_form",
        f"keys {[key[:40] for key in sorted(row)[:8]]} fit no form; wanted `messages`, `conversations`, "
        "`prompt`/`completion`, `instruction`/`output`, `question`/`answer` or `text`",
    )


def row_to_messages(row: RawRow, form: str) -> list[Message]:
    """Read the messages of a row by its form. Raises RowError: a key is missing or holds no text."""
    answer_key, convert = FORMS[form]
    if answer_key not in row:
        raise RowError("no_answer", f"`{answer_key}` is missing; a row of the form {form!r} needs it")
    return convert(row)


def whole_rows(lines: Iterable[bytes], form: str = "auto") -> Iterator[Example]:
    """Read the rows that become an example at all, with their `meta`; preparation counts the others."""
    for line in lines:
        try:
            row = msgspec.json.decode(line, type=dict)
            yield make_example(
                row_to_messages(row, recognise_form(row) if form == "auto" else form), row.get("meta") or {}
            )
        except (RowError, msgspec.DecodeError, UnicodeDecodeError, RecursionError, AttributeError, TypeError):
            continue


def _text(row: Any, key: str) -> str:
    if not isinstance(row, dict) or key not in row:
        raise RowError("missing_key", f"`{key}` is missing")
    value = row[key]
    if not isinstance(value, str):
        raise RowError("wrong_type", f"`{key}` is {type(value).__name__}, wanted text")
    return value


# --- files of examples --------------------------------------------------------------------------------------

_decoder = msgspec.json.Decoder(Example)


def read_examples(path: Path) -> Iterator[Example]:
    """Read a file that a stage wrote. Raises DataError with the line: such a file is never edited by hand."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}:{number} is no example: {error}",
                    remedy="the file is made by a stage; run `ratchet retrain` to make it again",
                ) from None


def make_raw_row(messages: Iterable[Message], meta: Meta) -> RawRow:
    """Make a row in the form `messages`, as batches hold them."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return {"messages": turns, "meta": meta}


def encode_line(value: Any) -> bytes:
    """Encode one line of JSON Lines."""
    return msgspec.json.encode(value) + b"\n"
