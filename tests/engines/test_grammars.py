"""Answers that are held to calls of tools, by each template's own way of writing them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ratchet.data.examples import Message, Tool, ToolCall, make_example
from ratchet.engines.vocabulary import Vocabulary
from ratchet.errors import UserError
from ratchet.models.chat_template import ChatFormat
from ratchet.serving.engine import Ask, JsonForm
from tests.models.test_chat_template import make_tokenizer
from tests.models.test_tools import ASKED, CONTROL, QWEN, chat_of

MOST_TOKENS = 4000
JSON_CALLS = ("hermes", "mistral", "llama")


def tool(name: str, **properties: Any) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters | CLOSED}}


CLOSED = {"additionalProperties": False}
LIGHT = tool("light", on={"type": "boolean"}, room={"enum": ["hall", 'a "b"']})
HEAT = tool("heat", degrees={"type": "integer", "minimum": 10, "maximum": 25})
LINKED = tool("linked", where={"$ref": "#/$defs/place"})
LINKED["function"]["parameters"]["$defs"] = {"place": {"enum": ["left", "right"]}}
TOOLS = (LIGHT, HEAT, LINKED)
NAMES = ("light", "heat", "linked")
FORM = JsonForm(json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, **CLOSED}))


def ask(**more: Any) -> Ask:
    return Ask("id", 1, (ASKED,), tools=TOOLS, **more)


def say(chat: ChatFormat, asked: Ask, *, seed: int, rather: tuple[int, ...] = ()) -> list[int]:
    """Return what a model of random logits says, which likes the tokens `rather` best."""
    size = len(chat.tokenizer)
    constraint = Vocabulary(chat, size).constrain(asked)
    chance, ids = torch.Generator().manual_seed(seed), list[int]()
    for place in range(MOST_TOKENS):
        logits = torch.randn(size, generator=chance)
        if place < len(rather):
            logits[rather[place]] = 100.0
        token = int(constraint.mask(logits).argmax())
        constraint.take(token)
        ids.append(token)
        if token in chat.stop_ids:
            return ids
    raise AssertionError("the answer did not end")


@pytest.mark.parametrize("name", JSON_CALLS)
@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_model_would_say_it_calls_a_tool_by_its_schema(name, seed):
    chat = chat_of(name)
    said = chat.read_answer(
        chat.decode_answer(say(chat, ask(must_call=NAMES, parallel_calls=False), seed=seed)), TOOLS
    )
    (call,) = said.tool_calls
    assert said.content == ""
    if call.name == "heat":
        assert list(call.arguments) == ["degrees"] and 10 <= call.arguments["degrees"] <= 25
    elif call.name == "light":
        assert isinstance(call.arguments["on"], bool) and call.arguments["room"] in ("hall", 'a "b"')
    else:
        assert call.arguments["where"] in ("left", "right")


def test_control_tokens_that_are_not_flagged_special_are_held_as_well():
    template, control, end = CONTROL["hermes"]  # as in Qwen's tokenizer
    chat = ChatFormat(make_tokenizer(template, control, end=end, special=False))
    call = ToolCall("heat", {"degrees": 20})
    example = make_example([ASKED, Message("assistant", "", (call,))], {}, tools=TOOLS)
    wanted = tuple(chat.encode(example).ids[len(chat.encode_prompt(example.prompt, TOOLS)) :])
    assert tuple(say(chat, ask(must_call=NAMES), seed=0, rather=wanted)) == wanted


@pytest.mark.parametrize("name", JSON_CALLS)
def test_a_named_tool_is_the_one_that_is_called(name):
    chat = chat_of(name)
    for seed in range(3):
        ids = say(chat, ask(must_call=("heat",), parallel_calls=False), seed=seed)
        (call,) = chat.read_answer(chat.decode_answer(ids), TOOLS).tool_calls
        assert call.name == "heat"


@pytest.mark.parametrize("name", JSON_CALLS)
def test_a_call_may_be_written_as_training_taught_it(name):
    chat = chat_of(name)
    calls = (ToolCall("light", {"on": True, "room": 'a "b"'}), ToolCall("heat", {"degrees": 20}))
    calls = calls[:1] if name == "llama" else calls
    example = make_example([ASKED, Message("assistant", "", calls)], {}, tools=TOOLS)
    prompt = len(chat.encode_prompt(example.prompt, TOOLS))
    wanted = tuple(chat.encode(example).ids[prompt:])
    ids = say(chat, ask(must_call=NAMES), seed=0, rather=wanted)
    if name == "mistral":  # its ids are left out
        assert chat.read_answer(chat.decode_answer(ids), TOOLS).tool_calls[0] == calls[0]
    else:
        assert tuple(ids) == wanted


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_several_calls_are_held_where_the_template_and_the_request_take_them(name):
    chat = chat_of(name)
    counts = {
        len(
            chat.read_answer(chat.decode_answer(say(chat, ask(must_call=NAMES), seed=seed)), TOOLS).tool_calls
        )
        for seed in range(12)
    }
    assert max(counts) > 1 and min(counts) >= 1


@pytest.mark.parametrize("name", JSON_CALLS)
def test_an_answer_with_a_form_and_tools_is_one_or_the_other(name):
    chat, seen = chat_of(name), set()
    for seed in range(12):
        text = chat.decode_answer(say(chat, ask(form=FORM, parallel_calls=False), seed=seed))
        said = chat.read_answer(text, TOOLS)
        seen.add(bool(said.tool_calls))
        assert said.tool_calls or set(json.loads(text)) <= {"ok"}
    assert seen == {True, False}


def test_a_template_whose_calls_are_no_json_says_so():
    chat = ChatFormat(make_tokenizer(QWEN, CONTROL["hermes"][1], end="<|im_end|>"))
    with pytest.raises(UserError, match="tool_choice wants a call"):
        Vocabulary(chat, len(chat.tokenizer)).constrain(ask(must_call=NAMES))


@pytest.mark.parametrize(
    ("parameters", "complaint"),
    [({"type": "string"}, "no object"), ({"not": {"type": "object"}}, "cannot be held")],
)
def test_parameters_that_cannot_be_held_are_refused(parameters, complaint):
    chat, odd = chat_of("hermes"), {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(UserError, match=complaint):
        Vocabulary(chat, len(chat.tokenizer)).constrain(
            Ask("id", 1, (ASKED,), tools=(odd,), must_call=("f",))
        )
