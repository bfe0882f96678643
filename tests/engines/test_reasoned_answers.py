"""Reasoning through the gateway's own code: apart from the answer, whole and streamed, and no part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Example, Message, ToolCall
from ratchet.engines.answering import Row
from ratchet.engines.decoding import Decoder
from ratchet.engines.vocabulary import Vocabulary
from ratchet.gateway.response_encoder import ResponseEncoder
from ratchet.gateway.responses import parse_response
from ratchet.models.chat_template import ChatFormat
from ratchet.parity.paths import Script, replayed_answer, whole_text
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, JsonForm, Piece
from ratchet.serving.protocol import Answer, Chat, ChatEncoder, parse_chat
from tests.models.test_reasoning import ONE, TEMPLATES, TWO, chat_of, row
from tests.models.test_tools import TOOL


def bundle(length: int = 1000) -> Bundle:
    return Bundle("tiny", 1, Path("none"), Path("none"), length, Generation(6))


def told(chat: ChatFormat, example: Example, **fields: Any) -> tuple[Row, list[Piece], Ended]:
    """Decode what the row teaches to say, token by token."""
    start = len(chat.encode_prompt(example.prompt, example.tools))
    ids = chat.encode(example).ids
    heard: list[Any] = []
    ask = Ask("a", 1, example.prompt, max_tokens=len(ids), temperature=0.0, tools=example.tools, **fields)
    asked, decoder = Row(ask, 0.0, heard.append), Decoder(Script(start, ids[start:]), measure_prompts=False)
    if ask.top_logprobs is not None:
        asked.vocabulary = Vocabulary(chat, len(chat.tokenizer))
    decoder.add(bundle(), chat)
    decoder.round([asked])
    while decoder.size:
        decoder.round([])
    return asked, heard[:-1], heard[-1]


def joined(pieces: list[Piece]) -> Message:
    calls = tuple(call for piece in pieces for call in piece.calls)
    text, reasoning = ("".join(getattr(one, name) for one in pieces) for name in ("text", "reasoning"))
    return Message("assistant", text, calls, reasoning)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_engine_tells_reasoning_apart_from_the_answer(name, special):
    long = Message("assistant", "the answer\n  a < b", reasoning="the question\n\nis <thin, so")
    chat = chat_of(name, special=special)
    _, pieces, ended = told(chat, row(ONE[0], long))
    assert joined(pieces) == long and ended.finish == "stop"
    assert len(pieces) > 4 and not any(piece.text and piece.reasoning for piece in pieces)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_has_the_prompt_that_training_had(name):
    """Its earlier reasoning goes through the request's body, and the template keeps or drops it."""
    chat = chat_of(name)
    example = row(*TWO)
    start, ids = len(chat.encode_prompt(example.prompt)), chat.encode(example).ids
    heard = replayed_answer(bundle(), chat, example, start, ids[start:])
    assert (heard.prompt, heard.ids, heard.fault) == (ids[:start], ids[start:], "")
    assert heard.text == whole_text(TWO[-1]) == "so\nb"


def test_calls_are_told_behind_their_reasoning():
    call = Message("assistant", "", (ToolCall("find", {"word": "c"}),), "look it up")
    _, pieces, ended = told(chat_of("qwen3"), row(ONE[0], call, tools=[TOOL]))
    assert joined(pieces) == call and ended.finish == "tool_calls"


def test_an_answer_that_is_cut_within_its_reasoning_is_told_as_reasoning():
    chat = chat_of("qwen3")
    start, ids = len(chat.encode_prompt(ONE[:1])), chat.encode(row(*ONE)).ids
    cut = ids[start : start + 4]
    heard = replayed_answer(bundle(), chat, row(*ONE), start, cut)
    assert (heard.finish, chat.read_answer(chat.decode_answer(cut), []).text) == ("length", "")
    assert heard.text and "think" not in heard.text


@pytest.mark.parametrize("name", ["qwen3", "r1", "smol"])
def test_tokens_of_reasoning_are_not_scored(name):
    _, pieces, _ = told(chat_of(name), row(*ONE), top_logprobs=0)
    scored = b"".join(token.token for piece in pieces for token in piece.tokens)
    assert scored.strip() == b"a"


@pytest.mark.parametrize("fields", [{"form": JsonForm()}, {"reasons": False}])
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_in_a_form_or_without_effort_begins_behind_an_empty_reasoning(name, fields):
    """A grammar holds from the first token on, so the prompt closes what the answer would open."""
    chat = chat_of(name)
    asked, pieces, _ = told(chat, row(*ONE), **fields)
    assert asked.prompt == chat.fit_prompt(ONE[:1], 1000, reasons=False)
    assert not any(piece.reasoning for piece in pieces)


# --- the protocols ------------------------------------------------------------------------------------------


def parse(*messages: dict[str, Any], **more: Any) -> Chat:
    return parse_chat(json.dumps({"model": "m", "messages": messages, **more}).encode(), GatewayConfig())


ASKED = {"role": "user", "content": "q"}
PIECES = [Piece("", (), (), "h"), Piece("", (), (), "m"), Piece("a"), Piece("b")]


def answer() -> Answer:
    made = Answer(ended=Ended("stop", 3, 9))
    for piece in PIECES:
        made.add(piece)
    return made


def test_a_whole_answer_has_its_reasoning_beside_the_content():
    encoder = ChatEncoder("chatcmpl-x1", 7, "m@v1", parse(ASKED))
    (choice,) = json.loads(encoder.whole([answer()]))["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "ab",
        "refusal": None,
        "reasoning_content": "hm",
    }
    assert answer().said == "ab", "the request log learns from answers alone"


def test_a_stream_has_it_in_deltas_of_its_own():
    encoder = ChatEncoder("chatcmpl-x1", 7, "m@v1", parse(ASKED, stream=True))
    events = [encoder.piece(0, piece).removeprefix(b"data: ") for piece in PIECES]
    assert [json.loads(event)["choices"][0]["delta"] for event in events] == [
        {"reasoning_content": "h"},
        {"reasoning_content": "m"},
        {"content": "a"},
        {"content": "b"},
    ]


def test_the_responses_protocol_tells_the_answer_alone():
    chat = parse_response(json.dumps({"model": "m", "input": "q"}).encode(), GatewayConfig())
    encoder = ResponseEncoder("resp_1", 7, "m@v1", chat)
    assert encoder.piece(0, PIECES[0]) == b"" and b'"delta":"a"' in encoder.piece(0, PIECES[2])
    (item,) = json.loads(encoder.whole([answer()]))["output"]
    assert item["content"][0]["text"] == "ab"


@pytest.mark.parametrize(
    "said",
    [
        {"content": "a", "reasoning_content": "hm\r\n"},
        {"content": "<think>\nhm\n</think>\n\na"},
        {"content": [{"type": "text", "text": "<think>hm</think>a"}]},
    ],
)
def test_reasoning_that_comes_back_is_read_as_in_rows(said):
    chat = parse(ASKED, {"role": "assistant", **said}, ASKED)
    assert chat.messages[1] == ONE[1]
    assert [text for _, text in chat.logged()] == ["q", "a", "q"]


def test_no_effort_is_no_reasoning():
    for raw, parsed in (({"messages": [ASKED]}, parse_chat), ({"input": "q"}, parse_response)):
        for effort in ({"reasoning_effort": "none"}, {"reasoning": {"effort": "none"}}):
            if ("messages" in raw) == ("reasoning_effort" in effort):
                body = json.dumps({"model": "m", **raw, **effort}).encode()
                assert not parsed(body, GatewayConfig()).ask("id", 1).reasons
    assert parse(ASKED).ask("id", 1).reasons


def test_a_question_may_hold_a_block():
    assert parse({"role": "user", "content": "<think>x</think>y"}).messages == (
        Message("user", "<think>x</think>y"),
    )
