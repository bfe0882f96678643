"""How a chat template writes calls of tools, learned from the template itself; calls read back from answers.

Templates differ (`<tool_call>{…}</tool_call>`, `[TOOL_CALLS] [{…}]`, a bare object). One call and two calls
are rendered; what stands around their JSON is the format. Calls that are not one JSON object are those of
`ratchet/models/tagged_calls.py`. A base whose calls cannot be read back takes no rows with calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from ratchet.data.examples import Message, Tool, ToolCall, trim
from ratchet.models.tagged_calls import AnswerOf, NamedCalls, TaggedCalls, find_tagged_format, settled

PROBE_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
PROBES = (ToolCall("look_up", {"word": "one"}), ToolCall("look_up", {"word": "two"}))
_decoder = json.JSONDecoder()


class JsonCalls(NamedTuple):
    """What a template writes before, between and after the JSON of calls, and the keys that it uses.

    `between` is None where the template takes one call a turn. `heads` stand before the name and between the
    name and the arguments of a call; None where the arguments come first, or as text.
    """

    before: str
    between: str | None
    after: str
    name_key: str
    arguments_key: str
    heads: tuple[str, str] | None = None

    @property
    def marks(self) -> str:
        return self.before + (self.between or "") + self.after

    def read(self, text: str, tools: Sequence[Tool] = ()) -> Message | None:
        """Read an answer that calls tools; None where it calls none, or where the calls are broken."""
        lead = self.before.strip()
        start = text.find(lead) if lead else 0
        if start < 0 or (not lead and not text.lstrip().startswith("{")):
            return None
        calls: list[ToolCall] = []
        place = start + len(lead)
        while True:
            try:
                said, place = _decoder.raw_decode(text, place + _blanks(text[place:]))
            except (ValueError, RecursionError):
                return None
            call = self._call(said)
            if call is None:
                return None
            calls.append(call)
            rest = text[place:].lstrip()
            between = (self.between or "").strip()
            if between and rest.startswith(between) and "{" in rest[len(between) :]:
                place = len(text) - len(rest) + len(between)
            elif self.between is not None and not between and rest.startswith("{"):
                place = len(text) - len(rest)
            else:
                break
        if rest and rest.strip() != self.after.strip():
            return None
        return Message("assistant", trim(text[:start]), tuple(calls))

    def settled(self, text: str) -> int:
        """Count the characters of an unfinished answer that are text, whatever follows: no part of a call."""
        lead = self.before.strip()
        if not lead:
            begun = text.lstrip()[:1]
            return 0 if begun in ("", "{") else len(text)
        return settled(text, lead)

    def _call(self, said: Any) -> ToolCall | None:
        if not isinstance(said, dict) or not isinstance(name := said.get(self.name_key), str):
            return None
        arguments = said.get(self.arguments_key)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                return None
        return ToolCall(name, arguments) if isinstance(arguments, dict) else None


CallFormat = JsonCalls | NamedCalls | TaggedCalls


def find_call_format(answer_of: AnswerOf) -> CallFormat | None:
    """Learn the format from `answer_of`, which renders an answer that makes these calls.

    None: the template writes no calls, or none that can be read back.
    """
    found = _find_json_format(answer_of) or find_tagged_format(answer_of, PROBES)
    return found if found and _reads_back(found, answer_of(PROBES[:1]), PROBES[:1]) else None


def _find_json_format(answer_of: AnswerOf) -> JsonCalls | None:
    text = answer_of(PROBES[:1])
    one = _objects(text)
    if one is None or len(one) != 1:
        return None
    start, end, said = one[0]
    keys = {
        "name": next((key for key, value in said.items() if value == PROBES[0].name), None),
        "arguments": next(
            (
                key
                for key, value in said.items()
                if value in (PROBES[0].arguments, json.dumps(PROBES[0].arguments))
            ),
            None,
        ),
    }
    if keys["name"] is None or keys["arguments"] is None:
        return None
    both = answer_of(PROBES)
    two = _objects(both)
    between = both[two[0][1] : two[1][0]] if two and len(two) == 2 else None
    return JsonCalls(
        text[:start],
        between,
        text[end:],
        str(keys["name"]),
        str(keys["arguments"]),
        _heads(text[start:end]),
    )


def _heads(call: str) -> tuple[str, str] | None:
    """Return what stands before the name and before the arguments in a call of the probe's."""
    first, found, rest = call.partition(json.dumps(PROBES[0].name))
    start = rest.find("{")
    if not found or start < 0 or rest[:start].rstrip().endswith('"'):
        return None
    return first, rest[:start]


def _reads_back(found: CallFormat, text: str, calls: tuple[ToolCall, ...]) -> bool:
    read = found.read(text, [PROBE_TOOL])
    return read is not None and read.tool_calls == calls


def _objects(text: str) -> list[tuple[int, int, dict[str, Any]]] | None:
    """Find the JSON objects of a text: (start, end, value)."""
    found: list[tuple[int, int, dict[str, Any]]] = []
    place = 0
    while (start := text.find("{", place)) >= 0:
        try:
            said, place = _decoder.raw_decode(text, start)
        except ValueError:
            return None
        found.append((start, place, said))
    return found


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())
