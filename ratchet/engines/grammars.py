"""Write the form that an answer must have as a grammar for llguidance: JSON, calls of tools, or either.

A call is written as the base's template writes one (`ratchet/models/tool_calls.py`), with the JSON schema of
the tool's parameters in place of the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ratchet.data.examples import Tool
from ratchet.errors import UserError
from ratchet.models.tool_calls import CallFormat, JsonCalls
from ratchet.serving.engine import Ask

# Between the parts of JSON: a blank, or a line break with its indentation. If any number of blanks were
# allowed, a model that was not taught JSON would write them until its tokens run out.
BLANKS = r"( |\n {0,16})?"
OBJECT: dict[str, Any] = {"type": "object"}
Quote = Callable[[str], str]  # writes a text of the template as symbols of a grammar


class Grammar(NamedTuple):
    """A grammar in llguidance's Lark, the request's part that asks for it, and a remedy if it fails."""

    lark: str
    what: str
    remedy: str


def write_grammar(ask: Ask, calls: CallFormat | None, quote: Quote) -> Grammar:
    """Return the grammar of an answer to `ask`, which has a form or names tools that must be called.

    Raises UserError: the template's calls have no grammar, or a tool's arguments are no object.
    """
    if ask.must_call:
        tools = [tool for tool in ask.tools if tool["function"]["name"] in ask.must_call]
        rules = _write_calls(_require(calls), tools, quote, several=ask.parallel_calls)
        return Grammar(
            f"start: calls\n{rules}", "a tool's schema", "take a simpler schema for its parameters"
        )
    assert ask.form is not None
    schema = json.loads(ask.form.schema) if ask.form.schema else OBJECT
    lark = f"start: {_json(schema)}"
    what, remedy = "response_format's schema", "leave that keyword out, or send {'type': 'json_object'}"
    if (
        ask.tools and isinstance(calls, JsonCalls) and calls.heads
    ):  # the model may still call tools before it answers in the form
        rules = _write_calls(calls, ask.tools, quote, several=ask.parallel_calls)
        lark, what = f"start: calls | form\nform: {_json(schema)}\n{rules}", f"{what}, or a tool's,"
    return Grammar(lark, what, remedy)


def _require(calls: CallFormat | None) -> JsonCalls:
    if not isinstance(calls, JsonCalls) or calls.heads is None:
        raise UserError(
            "tool_choice wants a call, and this base's chat template writes none that answers can be held to",
            remedy="send tool_choice: auto, or take a base whose template writes a call as one JSON object, "
            "the name before the arguments",
        )
    return calls


def _write_calls(calls: JsonCalls, tools: Sequence[Tool], quote: Quote, *, several: bool) -> str:
    """Return the rule `calls` with a rule for each tool."""
    assert calls.heads is not None
    first, second = calls.heads
    more = f"({quote(calls.between)} call)*" if several and calls.between is not None else ""
    rules = [
        f"calls: {quote(calls.before)} call {more} {quote(calls.after)}",
        "call: " + " | ".join(f"call_{place}" for place in range(len(tools))),
    ]
    for place, tool in enumerate(tools):
        head = quote(f"{first}{json.dumps(tool['function']['name'], ensure_ascii=False)}{second}")
        rules.append(f'call_{place}: {head} {_json(_parameters(tool))} "}}"')
    return "\n".join(rules)


def _parameters(tool: Tool) -> dict[str, Any]:
    schema = tool["function"].get("parameters") or OBJECT
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise UserError(
            f"the tool {tool['function']['name'][:40]!r} has parameters that are no object",
            remedy='send a JSON schema of {"type": "object"}',
        )
    return OBJECT | schema


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": BLANKS}, **schema})
