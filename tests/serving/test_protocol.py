"""Bodies in, bodies out: what is taken, and what is refused with the field, the value and what to change."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from media_models import sound
from PIL import Image

from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import MEDIA_MARK, to_openai
from ratchet.errors import BusyError, DataError, ServiceError, UserError
from ratchet.media.sounds import to_wav
from ratchet.serving.engine import Ask, Ended, JsonForm, Piece, Scored
from ratchet.serving.faults import Fault, to_fault
from ratchet.serving.protocol import (
    Answer,
    Chat,
    ChatEncoder,
    Model,
    WholeAsk,
    encode_models,
    parse_chat,
    parse_feedback,
)

LIMITS = GatewayConfig(max_messages=3, max_tokens=64, max_pictures=2, max_sounds=2, max_sound_seconds=0.5)


def draw() -> bytes:
    stored = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(stored, "PNG")
    return stored.getvalue()


def shown(data: bytes = b"", url: str = "") -> dict[str, Any]:
    url = url or f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def heard(data: bytes) -> dict[str, Any]:
    return {
        "type": "input_audio",
        "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"},
    }


PICTURE = draw()
SOUND = to_wav(sound(1, 0.2))


def body(**fields: Any) -> bytes:
    return json.dumps(
        {"model": "pydoc", "messages": [{"role": "user", "content": "hello"}], **fields}
    ).encode()


def parse(**fields: Any) -> Chat:
    return parse_chat(body(**fields), LIMITS)


def fault_of(raw: bytes) -> Fault:
    with pytest.raises(Fault) as refused:
        parse_chat(raw, LIMITS)
    assert refused.value.status == 400
    return refused.value


def test_what_is_left_out_is_left_to_the_version():
    ask = parse().ask("chatcmpl-1", 3)

    assert (ask.max_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop) == (None, None, None, None, ())
    assert ask.version == 3 and [(message.role, message.content) for message in ask.messages] == [
        ("user", "hello")
    ]


def test_pictures_stand_in_the_text_at_their_place_and_marks_of_the_clients_own_go():
    parts = [
        {"type": "text", "text": "before\ufffc"},
        shown(PICTURE),
        {"type": "text", "text": "one"},
        {"type": "text", "text": "two"},
    ]
    ask = parse(messages=[{"role": "user", "content": parts}]).ask("chatcmpl-1", 3)
    (message,) = ask.messages
    assert message.content == f"before{MEDIA_MARK}one\ntwo"
    assert {name: ask.media[name] for name in message.media} == ask.media and len(message.media) == 1
    again = parse(messages=to_openai([message], ask.media)).ask("chatcmpl-2", 3)
    assert (again.messages, again.media) == (ask.messages, ask.media)
    assert parse(messages=[{"role": "user", "content": "a\ufffcb"}]).messages[0].content == "ab"


def test_recordings_stand_in_the_text_at_their_place_beside_pictures():
    parts = [heard(SOUND), {"type": "text", "text": "and"}, shown(PICTURE), {"type": "text", "text": "so?"}]
    ask = parse(messages=[{"role": "user", "content": parts}]).ask("chatcmpl-1", 3)
    (message,) = ask.messages
    assert message.content == f"{MEDIA_MARK}and{MEDIA_MARK}so?"
    assert [name.rpartition(".")[2] for name in message.media] == ["flac", "png"]
    again = parse(messages=to_openai([message], ask.media)).ask("chatcmpl-2", 3)
    assert (again.messages, again.media) == (ask.messages, ask.media)
    looks = parse(messages=[{"role": "user", "content": parts}]).looks
    assert tuple(look.name for look in looks) == message.media
    uri = heard(SOUND)
    uri["input_audio"]["data"] = f"data:audio/wav;base64,{uri['input_audio']['data']}"
    assert parse(messages=[{"role": "user", "content": [uri]}]).messages[0].media == message.media[:1]


def test_what_is_asked_for_arrives():
    chat = parse(
        max_completion_tokens=9,
        temperature=0,
        top_p=0.5,
        seed=7,
        stop="\n",
        user="ana",
        stream=True,
        stream_options={"include_usage": True},
    )

    assert chat.ask("x", 1) == Ask("x", 1, chat.messages, 9, 0.0, 0.5, 7, ("\n",))
    assert chat.user == "ana" and chat.stream and chat.include_usage


def test_the_form_of_an_answer_and_its_scores_arrive():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    form = {"type": "json_schema", "json_schema": {"name": "claim", "strict": True, "schema": schema}}

    asked = parse(response_format=form, logprobs=True, top_logprobs=3).ask("x", 1)

    assert asked.form is not None and asked.form.name == "claim" and asked.top_logprobs == 3
    assert list(json.loads(asked.form.schema)["properties"]) == ["b", "a"]
    assert parse(response_format={"type": "json_object"}).ask("x", 1).form == JsonForm()
    assert parse(logprobs=True).ask("x", 1).top_logprobs == 0


def test_each_choice_has_a_seed_of_its_own():
    chat = parse(n=3, temperature=1, seed=7)

    assert [chat.ask("x", 1, choice).seed for choice in range(chat.num_choices)] == [7, 8, 9]
    assert [parse(n=2, temperature=1).ask("x", 1, choice).seed for choice in (0, 1)] == [None, None]


def test_a_safety_identifier_is_the_user():
    assert parse(safety_identifier="ana").user == "ana"
    assert parse(safety_identifier="x", user="ana").user == "ana"


def test_every_choice_stands_in_the_answer_and_the_prompt_counts_once():
    chat = parse(n=2, temperature=1, stream=True, stream_options={"include_usage": True})
    answers = [Answer(["yes"], [], Ended("stop", 4, 2)), Answer(["no"], [], Ended("length", 4, 3))]
    writer = ChatEncoder("chatcmpl-1", 5, "pydoc@v3", chat)

    whole = json.loads(writer.whole(answers))
    events = [json.loads(event[6:]) for event in writer.end(answers).split(b"\n\n")[:-2]]

    assert [(one["index"], one["message"]["content"]) for one in whole["choices"]] == [(0, "yes"), (1, "no")]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert [event["choices"][0]["finish_reason"] for event in events[:2]] == ["stop", "length"]
    assert [event["usage"] for event in events] == [None, None, whole["usage"]]


def test_a_token_is_told_with_its_bytes_and_the_likely_ones():
    half = "é".encode()[:1]
    answer = Answer(["é"], [Scored(half, -0.5, (Scored(b"e", float("-inf")),))], Ended("stop", 4, 2))

    (told,) = json.loads(encoder(logprobs=True, top_logprobs=1).whole([answer]))["choices"][0]["logprobs"][
        "content"
    ]

    assert (told["token"], told["logprob"], told["bytes"]) == ("\ufffd", -0.5, list(half))
    assert told["top_logprobs"] == [{"token": "e", "logprob": -9999.0, "bytes": [101]}]


def test_only_a_client_that_streams_needs_pieces():
    assert isinstance(parse().ask("x", 1), WholeAsk)
    assert not isinstance(parse(stream=True).ask("x", 1), WholeAsk)


def test_prompts_are_normalised_as_training_rows_were():
    assert (
        parse(messages=[{"role": "user", "content": " cafe\u0301\r\nau lait "}]).messages[0].content
        == "café\nau lait"
    )


def test_text_parts_are_joined_and_developers_are_the_system():
    chat = parse(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}],
            },
            {"role": "user", "content": "hi", "name": "ana"},
        ]
    )

    assert (chat.messages[0].role, chat.messages[0].content) == ("system", "be\nbrief")


def test_the_defaults_of_what_is_not_supported_are_taken():
    parse(
        response_format={"type": "text"},
        tools=None,
        tool_choice="none",
        logprobs=False,
        n=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        metadata={"a": "b"},
        store=True,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]),
        ("moderation", {"model": "x"}),
        ("reasoning_effort", "high"),
        ("logit_bias", {"1": 2}),
        ("frequency_penalty", 0.5),
    ],
)
def test_what_is_not_supported_is_named(field, value):
    fault = fault_of(body(**{field: value}))
    assert fault.param == field and f"{field} is not supported" in fault.message


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "holds 0; wanted 1 to 3"),
        ({"messages": [{"role": "user", "content": "x"}] * 4}, "messages", "holds 4; wanted 1 to 3"),
        ({"messages": "hi"}, "messages", "Expected `array`, got `str`"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'; known: system"),
        ({"messages": [{"role": "tool"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "got `int`"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "names no function",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "'input_audio'",
        ),
        (
            {"messages": [{"role": "assistant", "content": [shown(PICTURE)]}]},
            "messages[0].content[0]",
            "in users' messages",
        ),
        (
            {"messages": [{"role": "user", "content": [shown(url="https://example.org/a.png")]}]},
            "messages[0].content[0]",
            "nothing is fetched from elsewhere",
        ),
        (
            {"messages": [{"role": "user", "content": [shown(b"no picture")]}]},
            "messages[0].content[0]",
            "send a PNG or JPEG",
        ),
        (
            {"messages": [{"role": "user", "content": [shown(PICTURE[:-20])]}]},
            "messages[0].content[0]",
            "cut off",
        ),
        (
            {"messages": [{"role": "user", "content": [shown(PICTURE)] * 3}]},
            "messages[0].content[2]",
            "one picture too many",
        ),
        (
            {"messages": [{"role": "assistant", "content": [heard(SOUND)]}]},
            "messages[0].content[0]",
            "in users' messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "holds no recording",
        ),
        (
            {"messages": [{"role": "user", "content": [heard(b"no sound")]}]},
            "messages[0].content[0]",
            "send a WAV or MP3",
        ),
        (
            {"messages": [{"role": "user", "content": [heard(SOUND[:-90])]}]},
            "messages[0].content[0]",
            "cut off",
        ),
        (
            {"messages": [{"role": "user", "content": [heard(to_wav(sound(1, 0.6)))]}]},
            "messages[0].content[0]",
            "0.6 s long; `gateway.max_sound_seconds` is 0.5",
        ),
        (
            {"messages": [{"role": "user", "content": [heard(SOUND)] * 3}]},
            "messages[0].content[2]",
            "one recording too many",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "NUL character at 1"),
        ({"user": "a\0"}, "user", "NUL"),
        (
            {"messages": [{"role": "user", "content": "a" + "\u0301" * 20 + "\u0327" * 20}]},
            "messages[0].content",
            "more than 32 combining marks",
        ),
        ({"max_tokens": 65}, "max_tokens", "65; wanted 1 to 64"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "0; wanted 1 to 64"),
        ({"max_tokens": True}, "max_tokens", "got `bool`"),
        ({"max_tokens": 10**30}, "max_tokens", "wanted 1 to 64"),
        ({"max_tokens": 10**400}, "max_tokens", "wanted 1 to 64"),
        ({"temperature": 2.1}, "temperature", "2.1; wanted 0 to 2"),
        ({"temperature": -1}, "temperature", "wanted 0 to 2"),
        ({"top_p": -0.1}, "top_p", "-0.1"),
        ({"seed": 2**64}, "seed", "wanted"),
        ({"n": 2}, "n", "temperature 0: all choices would be the same"),
        ({"n": 9, "temperature": 1}, "n", "9; wanted 1 to 8"),
        ({"n": 0}, "n", "0; wanted 1 to 8"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "send one of them"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options", "unknown field `usage`"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21; wanted 0 to 20"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "'grammar'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "brings no schema"),
        ({"stop": ["a"] * 5}, "stop", "5 text(s)"),
        ({"stop": [""]}, "stop", "one of them empty"),
        ({"max_token": 3}, None, "unknown field `max_token`"),
        ({"model": None}, "model", "got `null`"),
    ],
)
def test_a_refusal_says_what_was_seen_and_wanted(fields, param, message):
    fault = fault_of(body(**fields))
    assert fault.param == param and message in fault.message, fault.message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"nonsense",
        b"[1]",
        b'"text"',
        b'{"model": "pydoc"}',
        b"\xff\xfe",
        b"{" * 200_000,
        b'{"tools": ' + b"[" * 200_000,
        body().replace(b"hello", b"\xff"),
        body().replace(b"hello", b"\\ud800"),
        body().replace(b"hello", b"\\udc00 x"),
        body(temperature=1).replace(b": 1}", b": NaN}"),
        body(temperature=1).replace(b": 1}", b": 1e999}"),
    ],
)
def test_what_is_no_request_is_400_and_never_more(raw):
    assert len(fault_of(raw).message) < 400


def test_feedback_takes_a_number_or_a_yes():
    assert parse_feedback(b'{"request_id": "x", "score": true}').score == 1.0
    assert parse_feedback(b'{"request_id": "x", "score": 0.5, "user": null}').score == 0.5
    assert parse_feedback(b'{"request_id": "x", "answer": "right"}').score is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"request_id": "x", "score": NaN}', "no JSON"),
        (b'{"request_id": "x", "score": Infinity}', "no JSON"),
        (b'{"request_id": "x", "score": 1e999}', "out of range"),
        (b'{"request_id": "x", "score": 1.01}', "wanted 0 to 1"),
        (b'{"request_id": "x", "score": -0.1}', "wanted 0 to 1"),
        (b'{"request_id": "x", "score": "good"}', "got `str`"),
        (b'{"request_id": "x"}', "says nothing"),
        (b'{"score": 1}', "missing required field `request_id`"),
        (b'{"request_id": "x", "comment": "a\\u0000"}', "NUL"),
        (b'{"request_id": "x", "score": 1, "stars": 5}', "unknown field"),
    ],
)
def test_feedback_that_means_nothing_is_refused(raw, message):
    with pytest.raises(Fault, match=message) as refused:
        parse_feedback(raw)
    assert refused.value.status == 400


def encoder(**fields: Any) -> ChatEncoder:
    return ChatEncoder("chatcmpl-1", 5, "pydoc@v3", parse(**fields))


def test_an_answer_names_its_version():
    whole = json.loads(encoder().whole([Answer(["yes"], [], Ended("stop", 4, 2))]))

    assert (
        whole["system_fingerprint"] == "pydoc@v3"
        and whole["object"] == "chat.completion"
        and whole["created"] == 5
    )
    assert whole["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "yes", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def test_an_event_is_one_line_whatever_the_text_holds():
    event = encoder().piece(0, Piece("a\n\ndata: [DONE]\r\n\u2028"))

    assert (
        event.startswith(b"data: {")
        and event.endswith(b"}\n\n")
        and event.count(b"\n") == 2
        and b"\r" not in event
    )
    assert json.loads(event[6:])["choices"][0]["delta"]["content"] == "a\n\ndata: [DONE]\r\n\u2028"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BusyError("full"), 429, "rate_limit_error"),
        (ServiceError("away"), 502, "server_error"),
        (UserError("too long"), 400, "invalid_request_error"),
        (DataError("odd"), 400, "invalid_request_error"),
        (KeyError("secret"), 500, "server_error"),
        (Fault(404, "no"), 404, "invalid_request_error"),
    ],
)
def test_every_error_has_a_status_and_the_form_of_openai(error, status, kind):
    fault = to_fault(error)
    told = json.loads(fault.body())["error"]

    assert (
        fault.status == status and told["type"] == kind and set(told) == {"message", "type", "param", "code"}
    )
    assert "secret" not in told["message"]
    assert json.loads(encoder().fail(fault)[6:])["error"] == told
    assert (fault.headers() == [(b"retry-after", b"1")]) == (status == 429)


def test_models_are_listed_as_openai_does():
    assert json.loads(encode_models([Model("a", 5), Model("a@v1", 5)]))["data"][1] == {
        "id": "a@v1",
        "object": "model",
        "created": 5,
        "owned_by": "ratchet",
    }
