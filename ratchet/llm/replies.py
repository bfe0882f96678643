"""Define the JSON shapes of models' answers, make their schemas, and find the JSON in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
MOST_CHARS, MOST_STARTS = 400_000, 60  # limits of the search: characters of an answer, places to try


class Pair(msgspec.Struct, frozen=True):
    question: str
    answer: str


class Pairs(msgspec.Struct, frozen=True):
    pairs: list[Pair]


class Questions(msgspec.Struct, frozen=True):
    questions: list[str]


class Score(msgspec.Struct, frozen=True):
    score: float
    reason: str = ""


class Text(msgspec.Struct, frozen=True):
    text: str


Reply = TypeVar("Reply", bound=msgspec.Struct)


class Malformed(ValueError):
    """The requested JSON is missing; the message is sent to the model, which may try again."""


def read_reply(text: str, shape: type[Reply]) -> Reply:
    """Return the first JSON value of the given shape; skip fences, thoughts and prose. Raises Malformed."""
    fault = "there is no JSON object in it"
    for value in _values(THOUGHT.sub("", text[:MOST_CHARS])):
        try:
            json.dumps(value, ensure_ascii=False).encode()
            return msgspec.convert(_wrap(value, shape), shape)
        except UnicodeEncodeError:
            fault = "it holds half of a surrogate pair"  # JSON can escape it, UTF-8 cannot encode it
        except (msgspec.ValidationError, RecursionError) as error:
            fault = str(error)
    raise Malformed(fault)


def _values(text: str) -> Iterator[Any]:
    """Yield the outermost JSON objects and arrays in the text."""
    decoder, position = json.JSONDecoder(), 0
    for _ in range(MOST_STARTS):
        found = re.compile(r"[{\[]").search(text, position)
        if not found:
            return
        try:
            value, position = decoder.raw_decode(text, found.start())
            yield value
        except (ValueError, RecursionError):
            position = found.end()


def _wrap(value: Any, shape: type[msgspec.Struct]) -> Any:
    """Wrap a bare list in the object whose only key it is, because small models omit the object."""
    fields = shape.__struct_fields__
    return {fields[0]: value} if isinstance(value, list) and len(fields) == 1 else value


def schema_of(shape: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a JSON schema for strict modes: an object at the root, all keys required, no other keys."""
    _, parts = msgspec.json.schema_components([shape], ref_template="#/$defs/{name}")
    closed = {
        name: {**part, "required": list(part["properties"]), "additionalProperties": False}
        for name, part in parts.items()
    }
    for part in closed.values():
        part["properties"] = {
            name: {key: value for key, value in of.items() if key != "default"}
            for name, of in part["properties"].items()
        }
    root = closed.pop(shape.__name__)
    return {**root, **({"$defs": closed} if closed else {})}
