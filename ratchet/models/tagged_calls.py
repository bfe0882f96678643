"""Read tool calls that are not one JSON object: the name is separate, and arguments may be separate too.

`NamedCalls` are DeepSeek's (`name<|sep|>{…}`), `TaggedCalls` those of Qwen 3.5 (`<parameter=city>…`) and GLM
(`<arg_key>city</arg_key><arg_value>…`). Both formats are found by rendering the probes of
`ratchet/models/tool_calls.py` with the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from ratchet.data.examples import Message, Tool, ToolCall, overlap, trim

NAME = re.compile(r"[\w.:/-]{1,128}")  # name of a function or an argument, unquoted
BARE = ToolCall("look_up", {})
PYTHON = {"True": True, "False": False, "None": None}  # as Jinja writes them without `tojson`
_decoder = json.JSONDecoder()
AnswerOf = Callable[[tuple[ToolCall, ...]], str]


class NamedCalls(NamedTuple):
    """The text before a name, between name and arguments, between calls, and after the last call."""

    before: str
    middle: str
    between: str | None  # None: only one call per turn
    after: str

    @property
    def marks(self) -> str:
        return self.before + self.middle + (self.between or "") + self.after

    def read(self, text: str, tools: Sequence[Tool] = ()) -> Message | None:
        """Read an answer that calls tools; None where it calls none, or where the calls are broken."""
        start, place = _find_start(text, self.before)
        calls: list[ToolCall] = []
        while place >= 0:
            name = text[place : (end := text.find(self.middle, place))].strip()
            if end < 0 or not NAME.fullmatch(name):
                return None
            try:
                arguments, place = _decoder.raw_decode(text, end + len(self.middle))
            except (ValueError, RecursionError):
                return None
            if not isinstance(arguments, dict):
                return None
            calls.append(ToolCall(name, arguments))
            if self.between and text.startswith(self.between, place):
                place += len(self.between)
            elif _ends(text, place, self.after):
                return Message("assistant", trim(text[:start]), tuple(calls))
            else:
                return None
        return None

    def settled(self, text: str) -> int:
        """Count the characters of an unfinished answer that are text, whatever follows: no part of a call."""
        return settled(text, self.before)


class TaggedCalls(NamedTuple):
    """The text around names, keys and values. A value is plain text if it is a string, else JSON."""

    before: str  # the first name
    no_arguments: str  # from a name to the end
    next_bare: str | None  # from a name to the next one
    first_key: str  # from a name to its first key
    middle: str  # from a key to its value
    next_key: str  # from a value to the next key
    next_call: str | None  # from a value to the next name
    after: str  # from a value to the end

    @property
    def marks(self) -> str:
        return "".join(filter(None, self))

    def read(self, text: str, tools: Sequence[Tool] = ()) -> Message | None:
        """Read an answer that calls tools; None where it calls none, or where the calls are broken.

        The schemas of `tools` give the type of a value; without a schema it is text.
        """
        start, place = _find_start(text, self.before)
        calls: list[ToolCall] = []
        while place >= 0:
            if (named := NAME.match(text, place)) is None:
                return None
            name, place = named[0], named.end()
            arguments: dict[str, Any] = {}
            goes_on, more = self.next_bare, self.first_key
            # The end of a call without arguments may begin like a key: it is one if key and value follow.
            while text.startswith(more, place) and (found := self._pair(text, place + len(more))):
                key, value, place = found
                arguments[key] = _typed(value, _schema_of(tools, name, key))
                goes_on, more = self.next_call, self.next_key
            calls.append(ToolCall(name, arguments))
            if goes_on and text.startswith(goes_on, place):
                place += len(goes_on)
            elif _ends(text, place, self.after if arguments else self.no_arguments):
                return Message("assistant", trim(text[:start]), tuple(calls))
            else:
                return None
        return None

    def settled(self, text: str) -> int:
        """Count the characters of an unfinished answer that are text, whatever follows: no part of a call."""
        return settled(text, self.before)

    def _pair(self, text: str, place: int) -> tuple[str, str, int] | None:
        """Read a key and its value: (key, value, place after the value); None if there is none."""
        end = text.find(self.middle, place)
        if end < 0 or not NAME.fullmatch(key := text[place:end]):
            return None
        start = end + len(self.middle)
        ends = [
            at for mark in (self.next_key, self.next_call) if mark and (at := text.find(mark, start)) >= 0
        ]
        last = self.after.rstrip()
        if text.rstrip().endswith(last) and (at := len(text.rstrip()) - len(last)) >= start:
            ends.append(at)
        return (key, text[start : min(ends)], min(ends)) if ends else None


def find_tagged_format(
    answer_of: AnswerOf, probes: tuple[ToolCall, ToolCall]
) -> NamedCalls | TaggedCalls | None:
    """Find the format by `answer_of`, which renders an answer with the given calls.

    None: the template writes no calls, or none that can be read back.
    """
    one, both = answer_of(probes[:1]), answer_of(probes)
    json_text = _parts(one, probes[0].name, json.dumps(probes[0].arguments))
    if json_text:
        before, middle, after = json_text
        first, second = (json.dumps(probe.arguments) for probe in probes)
        between = _parts(both, probes[0].name, first, probes[1].name, second)
        several = between[2] if between and between[3] == middle else None
        return NamedCalls(before, middle, several, after)
    key, value, other = "word", str(probes[0].arguments["word"]), str(probes[1].arguments["word"])
    name = probes[0].name
    single = _parts(one, name, key, value)
    pair = _parts(answer_of((ToolCall(name, {key: value, "also": other}),)), name, key, value, "also", other)
    bare = _parts(answer_of((BARE,)), name)
    if not single or not pair or not bare or pair[:3] != single[:3] or pair[4] != single[2]:
        return None
    calls, bares = (
        _parts(both, name, key, value, name, key, other),
        _parts(answer_of((BARE, BARE)), name, name),
    )
    return TaggedCalls(
        before=single[0],
        no_arguments=bare[1],
        next_bare=bares[1] if bares else None,
        first_key=single[1],
        middle=single[2],
        next_key=pair[3],
        next_call=calls[3] if calls else None,
        after=single[3],
    )


def _parts(text: str, *words: str) -> list[str] | None:
    """Return the texts around consecutive `words`; None if a word is missing, or two words are adjacent.

    Words are searched from the right, since a call ends an answer and any text may precede it.
    """
    parts: list[str] = []
    for word in reversed(words):
        text, found, rest = text.rpartition(word)
        if not found:
            return None
        parts.append(rest)
    parts.append(text)
    return parts[::-1] if all(parts[1:-1]) and text.strip() else None


def settled(text: str, before: str) -> int:
    """Count the characters before the mark that opens a call, or may become one as the answer grows."""
    lead = before.strip()
    start = text.find(lead)
    if start < 0:
        start = len(text) - overlap(text, lead)
    return len(text[:start].rstrip())


def _find_start(text: str, before: str) -> tuple[int, int]:
    """Return the places of the first call and of its name; (-1, -1) if there is no call."""
    lead = before.strip()
    start = text.find(lead)
    if start < 0:
        return start, start
    place = start + len(lead)
    return start, place + len(text[place:]) - len(text[place:].lstrip())


def _ends(text: str, place: int, after: str) -> bool:
    return text[place:].strip() in ("", after.strip())


def _schema_of(tools: Sequence[Tool], name: str, key: str) -> dict[str, Any]:
    for tool in tools:
        if tool["function"]["name"] == name:
            with suppress(AttributeError, KeyError, TypeError):
                return dict(tool["function"]["parameters"]["properties"][key])
    return {}


def _typed(text: str, schema: dict[str, Any]) -> Any:
    """Read a value by its schema; text that is not valid JSON stays text."""
    variants = [schema, *(schema.get("anyOf") or schema.get("oneOf") or ())]
    kinds: set[str] = set()
    for variant in variants:
        kind = variant.get("type") if isinstance(variant, dict) else None
        kinds |= {kind} if isinstance(kind, str) else set(kind or ())
    if not kinds or (kinds <= {"string"}):
        return text
    value = PYTHON.get(text, text)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
    return text if "string" in kinds and not (value is None and "null" in kinds) else value
