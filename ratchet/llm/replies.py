"""Define the shapes that models answer in, make their JSON schemas, and find the JSON in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
MOST_CHARS, MOST_STARTS = 400_000, 60  # bound the search: characters of an answer, places that are tried


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
    """Say that the JSON asked for is missing; the model reads the message and may try again."""


def read_reply(text: str, shape: type[Reply]) -> Reply:
    """Return the first JSON value of that shape, past any fence, thought or prose. Raises Malformed."""
    fault = "there is no JSON object in it"
    for value in _values(THOUGHT.sub("", text[:MOST_CHARS])):
        try:
            json.dumps(value, ensure_ascii=False).encode()
            return msgspec.convert(_wrap(value, shape), shape)
        except UnicodeEncodeError:
            fault = "it holds half of a surrogate pair"  # JSON can spell it, UTF-8 cannot hold it
        except (msgspec.ValidationError, RecursionError) as error:
            fault = str(error)
    raise Malformed(fault)


def _values(text: str) -> Iterator[Any]:
    """Yield JSON objects and arrays, the outer ones first."""
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
    """Put a bare list into the object that has it as its only key: small models leave the object out."""
    fields = shape.__struct_fields__
    return {fields[0]: value} if isinstance(value, list) and len(fields) == 1 else value


def schema_of(shape: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a JSON schema for strict modes: an object at its root, every key required, no others."""
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
