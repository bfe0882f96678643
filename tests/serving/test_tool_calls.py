"""Tools through the gateway's own code: offered, called, answered, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Message, ToolCall, make_example
from ratchet.engines.answering import Row
from ratchet.engines.decoding import Decoder
from ratchet.engines.loaded_model import LoadedModel
from ratchet.parity.paths import Script, replayed_answer
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Piece
from ratchet.serving.faults import Fault
from ratchet.serving.protocol import Answer, Chat, ChatEncoder, parse_chat
from tests.models.test_tools import ASKED, CALL, CONTROL, TOOL, chat_of, row

LIMITS = GatewayConfig()


def parse(**body: Any) -> Chat:
    asked = {"model": "m", "messages": [{"role": "user", "content": "q"}], "tools": [TOOL], **body}
    return parse_chat(json.dumps(asked).encode(), LIMITS)


def called(id: str, word: str) -> dict[str, Any]:
    return {
        "id": id,
        "type": "function",
        "function": {"name": "find", "arguments": json.dumps({"word": word})},
    }


def refusal(**body: Any) -> Fault:
    with pytest.raises(Fault) as caught:
        parse(**body)
    return caught.value


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("calls", [1, 2])
def test_the_engine_tells_calls_as_calls_and_as_the_evaluation_reads_them(name, calls):
    if name == "llama" and calls == 2:
        pytest.skip("its template takes one call a turn")
    chat = chat_of(name)
    example = row(ASKED, Message("assistant", "", (CALL, ToolCall("find", {"word": "c"}))[:calls]))
    prompt = len(chat.encode_prompt(example.prompt, example.tools))
    ids = chat.encode(example).ids
    bundle = Bundle("tiny", 1, Path("none"), Path("none"), len(ids) + 8, Generation(6))
    told = replayed_answer(bundle, chat, example, prompt, ids[prompt:])
    assert (told.prompt, told.ids, told.fault) == (ids[:prompt], ids[prompt:], "")
    assert told.text == example.answer and told.finish == "stop"


def test_an_answer_without_a_call_stays_text_where_tools_are_offered():
    chat = chat_of("hermes")
    example = row(ASKED, Message("assistant", "no tool needed"))
    prompt = len(chat.encode_prompt(example.prompt, example.tools))
    ids = chat.encode(example).ids
    bundle = Bundle("tiny", 1, Path("none"), Path("none"), len(ids) + 8, Generation(6))
    assert replayed_answer(bundle, chat, example, prompt, ids[prompt:]).text == "no tool needed"


def told_pieces(name: str, answer: Message, **more: Any) -> list[Piece | Ended]:
    """Return what the engine tells of an answer, piece by piece."""
    chat, example = chat_of(name), row(ASKED, answer)
    prompt = len(chat.encode_prompt(example.prompt, example.tools))
    ids = chat.encode(example).ids
    said: list[Any] = []
    asked = Ask("id", 1, example.prompt, tools=example.tools, max_tokens=len(ids) - prompt, **more)
    decoder = Decoder(cast(LoadedModel, Script(prompt, ids[prompt:])), measure_prompts=False)
    decoder.add(Bundle("tiny", 1, Path("none"), Path("none"), len(ids) + 8, Generation(6)), chat)
    decoder.round([Row(asked, 0.0, said.append)])
    while decoder.size:
        decoder.round([])
    return said


def test_text_is_told_while_it_is_made_and_calls_at_the_end():
    said = told_pieces("hermes", Message("assistant", "let me see <b>", (CALL,)))
    *texts, last, ended = said
    assert len(texts) > 5 and "".join(piece.text for piece in texts) == "let me see <b>"
    assert (last.text, last.calls, ended.finish) == ("", (CALL,), "tool_calls")


@pytest.mark.parametrize("name", CONTROL)
def test_a_plain_answer_is_told_as_without_tools(name):
    *texts, ended = told_pieces(name, Message("assistant", "no < tool [ needed {"))
    assert "".join(piece.text for piece in texts) == "no < tool [ needed {" and ended.finish == "stop"
    assert len(texts) > 5


def test_one_call_alone_is_told_where_the_client_wants_one_at_a_time():
    calls = (CALL, ToolCall("find", {"word": "c"}))
    *_, last, ended = told_pieces("hermes", Message("assistant", "", calls), parallel_calls=False)
    assert last.calls == calls[:1] and ended.finish == "tool_calls"


def test_a_conversation_with_calls_is_read_as_rows_are():
    chat = parse(
        messages=[
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [called("b", "2"), called("a", "1")]},
            {"role": "tool", "tool_call_id": "a", "content": "of 1"},
            {"role": "tool", "tool_call_id": "b", "content": "of 2"},
        ]
    )
    calls = (ToolCall("find", {"word": "2"}), ToolCall("find", {"word": "1"}))
    assert chat.tools == (TOOL,)
    assert chat.messages[1:] == (
        Message("assistant", "", calls),
        Message("tool", "of 2"),
        Message("tool", "of 1"),
    )
    assert make_example([*chat.messages, Message("assistant", "a")], {}, tools=chat.tools)
    assert chat.ask("id", 1).tools == chat.tools
    assert [role for role, _ in chat.logged()] == ["tools", "user", "assistant", "tool", "tool"]


def test_tools_that_shall_not_be_called_are_not_offered():
    assert parse().ask("id", 1).parallel_calls
    assert not parse(parallel_tool_calls=False).ask("id", 1).parallel_calls
    assert parse(tool_choice="none").tools == () and parse(tool_choice="auto").tools == (TOOL,)


def test_a_tool_that_has_to_be_called_is_asked_for_by_its_name():
    other = {"type": "function", "function": {"name": "other"}}
    required = parse(tools=[TOOL, other], tool_choice="required").ask("id", 1)
    named = parse(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "other"}}).ask(
        "id", 1
    )
    assert (required.must_call, required.parallel_calls) == (("find", "other"), True)
    assert (named.must_call, named.parallel_calls, len(named.tools)) == (("other",), False, 2)
    assert parse(tool_choice="auto").ask("id", 1).must_call == ()


@pytest.mark.parametrize("nested", [True, False], ids=["as in chats", "as in responses"])
def test_of_allowed_tools_the_others_are_not_offered(nested: bool):
    other = {"type": "function", "function": {"name": "other"}}
    for mode, must_call in (("auto", ()), ("required", ("other",))):
        inner = {"mode": mode, "tools": [other if nested else {"type": "function", "name": "other"}]}
        choice = {"type": "allowed_tools", **({"allowed_tools": inner} if nested else inner)}
        asked = parse(tools=[TOOL, other], tool_choice=choice).ask("id", 1)
        assert (asked.tools, asked.must_call, asked.parallel_calls) == ((other,), must_call, True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "find"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{**TOOL, "function": {"name": "gone"}}],
                }
            },
            "tool_choice",
        ),
        ({"tool_choice": {"type": "allowed_tools", "mode": "all", "tools": [TOOL]}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": 1}}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        (
            {"messages": [{"role": "user", "content": "q", "tool_calls": [called("a", "1")]}]},
            "messages[0].tool_calls",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [called("a", "1")]},
                    {"role": "tool", "tool_call_id": "z", "content": "r"},
                ]
            },
            "messages",
        ),
    ],
)
def test_what_is_not_held_is_refused_by_its_field(body, param):
    fault = refusal(**body)
    assert (fault.status, fault.param) == (400, param)


def encoded(*, stream: bool) -> tuple[ChatEncoder, list[Answer], Piece]:
    piece = Piece("", (), (CALL, ToolCall("find", {})))
    answer = Answer(ended=Ended("tool_calls", 3, 5))
    answer.add(piece)
    return ChatEncoder("chatcmpl-x1", 7, "m@v1", parse(stream=stream)), [answer], piece


def test_a_whole_answer_has_calls_in_the_form_of_openai():
    encoder, answers, _ = encoded(stream=False)
    (choice,) = json.loads(encoder.whole(answers))["choices"]
    first, second = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert json.loads(first["function"]["arguments"]) == CALL.arguments and first["type"] == "function"
    assert first["id"] != second["id"] and second["function"] == {"name": "find", "arguments": "{}"}


def test_a_stream_has_the_same_calls_with_their_numbers():
    encoder, answers, piece = encoded(stream=True)
    events = (encoder.begin() + encoder.piece(0, piece) + encoder.end(answers)).split(b"\n\n")
    chunks = [
        json.loads(event.removeprefix(b"data: ")) for event in events if event and b"[DONE]" not in event
    ]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    (whole,) = json.loads(encoder.whole(answers))["choices"]
    assert [call.pop("index") for call in calls] == [0, 1]
    assert calls == whole["message"]["tool_calls"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
