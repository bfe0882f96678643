"""The gateway over HTTP, with the official `openai` client unchanged: real uvicorn, fleet, request log, and a
stub behind the engine `openai`.
"""

from __future__ import annotations

import base64
import json
import sqlite3
from collections.abc import Iterator

import httpx
import openai
import pytest
from media_models import name_of, picture, sound
from patience import scaled
from places import write_files
from served import Gateway, open_rollout, running_gateway, wait_for, wait_until_served

from ratchet.data.examples import MEDIA_MARK
from ratchet.gateway.auth import add_key
from ratchet.gateway.identity import Ids
from ratchet.media.sounds import to_wav
from ratchet.monitoring.pictures import KeptPictures
from ratchet.monitoring.sounds import sound_of

ANSWER = " ".join(["pydoc@v1"] * 4)
TIMEOUT = round(scaled(0.8), 1)  # the gateway's, in seconds


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("gateway"),
        gateway={"max_messages": 8, "max_tokens": 64, "max_body_bytes": 4096, "timeout": TIMEOUT},
    ) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with client_of(gateway) as client:
        yield client


def client_of(gateway: Gateway, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def question(text: str = "hello") -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_picture_goes_to_the_upstream_as_it_came_and_is_kept_where_the_log_says_so(tmp_path):
    drawn = picture(5, 60, 40)
    name, uri = name_of(drawn), f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
    content = [{"type": "text", "text": "what is"}, {"type": "image_url", "image_url": {"url": uri}}]
    with running_gateway(tmp_path, request_log={"pictures": True}) as gateway:
        with client_of(gateway) as client:
            client.chat.completions.create(model="pydoc", messages=[{"role": "user", "content": content}])
            client.responses.create(
                model="pydoc",
                input=[{"role": "user", "content": [{"type": "input_image", "image_url": uri}]}],
            )
        assert gateway.stub.seen[-2]["messages"][0]["content"] == content
        wait_for(lambda: name in KeptPictures(tmp_path))
        first, second = gateway.logged()
    assert KeptPictures(tmp_path)[name] == drawn
    assert first.messages == (("user", f"what is{MEDIA_MARK}"),) and second.messages == (
        ("user", MEDIA_MARK),
    )
    assert [look.name for look in (*first.pictures, *second.pictures)] == [name, name]


def test_a_recording_goes_to_the_upstream_as_wav_and_is_kept_where_the_log_says_so(tmp_path):
    played = sound(5)
    name, wav = name_of(played), to_wav(played)
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}
    content = [{"type": "text", "text": "what is"}, part]
    with running_gateway(tmp_path, request_log={"pictures": True}) as gateway:
        with client_of(gateway) as client:
            client.chat.completions.create(model="pydoc", messages=[{"role": "user", "content": content}])
            client.responses.create(model="pydoc", input=[{"role": "user", "content": [part]}])
        assert gateway.stub.seen[-2]["messages"][0]["content"] == content
        wait_for(lambda: name in KeptPictures(tmp_path))
        first, second = gateway.logged()
    assert KeptPictures(tmp_path)[name] == played
    assert first.messages == (("user", f"what is{MEDIA_MARK}"),)
    assert [look.name for look in (*first.pictures, *second.pictures)] == [name, name]
    assert first.pictures[0] == sound_of(name, played)


# --- the official client ------------------------------------------------------------------------------------


def test_a_chat_is_answered_by_the_champion(client):
    answered = client.chat.completions.with_raw_response.create(
        model="pydoc", messages=question(), user="ana"
    )
    chat = answered.parse()

    assert chat.choices[0].message.content == ANSWER and chat.choices[0].finish_reason == "stop"
    assert (chat.model, chat.system_fingerprint) == ("pydoc", "pydoc@v1")
    assert chat.usage is not None and (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (7, 4)
    assert answered.headers["x-ratchet-version"] == "1" and answered.headers["x-ratchet-arm"] == "champion"
    assert answered.headers["x-request-id"] == chat.id


def test_a_stream_comes_in_pieces_and_ends_with_its_usage(client):
    with client.chat.completions.with_streaming_response.create(
        model="pydoc", messages=question(), stream=True, stream_options={"include_usage": True}
    ) as answered:
        assert answered.headers["x-ratchet-version"] == "1"
        chunks = list(answered.parse())

    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4
    assert {chunk.id for chunk in chunks} == {answered.headers["x-request-id"]} and {
        chunk.system_fingerprint for chunk in chunks
    } == {"pydoc@v1"}


def test_a_stream_ends_with_done_and_without_usage_that_nobody_asked_for(gateway):
    events = [line for line in gateway.ask(stream=True).text.split("\n\n") if line]

    assert events[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-1])


def test_models_are_the_name_and_what_is_served(client):
    assert [model.id for model in client.models.list()] == ["pydoc", "pydoc@v1"]
    assert client.models.retrieve("pydoc@v1").id == "pydoc@v1"
    assert client.models.retrieve("pydoc").owned_by == "ratchet"
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist → ask for 'pydoc'"):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("stream", [False, True])
def test_choices_come_each_with_its_number_and_count_as_one_request(gateway, client, stream):
    answered = client.chat.completions.create(
        model="pydoc", messages=question("wait:0.1"), n=3, temperature=1, seed=5, stream=stream
    )
    if stream:
        chunks = list(answered)
        id, texts = chunks[0].id, [""] * 3
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            texts[choice.index] += choice.delta.content or ""
    else:
        id, texts = answered.id, [choice.message.content for choice in answered.choices]
        assert answered.usage.completion_tokens == 3 * 4

    assert texts == [ANSWER] * 3
    assert sorted(body["seed"] for body in gateway.stub.seen[-3:]) == [5, 6, 7]
    assert [entry.answer for entry in gateway.logged() if entry.id == id] == [ANSWER]
    assert gateway.say(request_id=id, score=1).status_code == 200


def test_a_choice_that_fails_fails_the_request(gateway):
    assert gateway.ask("fault:broken", n=2, temperature=1).status_code == 502


def test_an_upstream_is_asked_for_the_form_and_the_scores(gateway, client):
    schema = {"type": "object", "properties": {"covered": {"type": "boolean"}}}
    form = {"type": "json_schema", "json_schema": {"name": "claim", "schema": schema}}

    client.chat.completions.create(model="pydoc", messages=question(), response_format=form)
    assert gateway.stub.seen[-1]["response_format"]["json_schema"]["schema"] == schema
    client.chat.completions.create(
        model="pydoc", messages=question(), response_format={"type": "json_object"}
    )
    assert gateway.stub.seen[-1]["response_format"] == {"type": "json_object"}
    with pytest.raises(openai.BadRequestError, match="upstream gives no log probabilities"):
        client.chat.completions.create(model="pydoc", messages=question(), logprobs=True, top_logprobs=2)
    assert gateway.stub.seen[-1]["top_logprobs"] == 2


# --- responses ----------------------------------------------------------------------------------------------


TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_offered_called_and_its_result_sent_back(gateway, client, stream):
    asked = {"model": "pydoc", "tools": TOOLS, "messages": question("call:find")}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        (call,) = [call for delta in deltas for call in delta.tool_calls or ()]
        finish = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(**asked).choices
        (call,), finish = choice.message.tool_calls, choice.finish_reason
    assert (call.function.name, json.loads(call.function.arguments)) == ("find", {"word": "a"})
    assert finish == "tool_calls" and gateway.stub.seen[-1]["tools"] == TOOLS
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump(exclude={"index"})]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "the result"}
    client.chat.completions.create(**asked | {"messages": [*question(), turn, result]})
    sent = gateway.stub.seen[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"] and sent[2]["content"] == "the result"


def test_a_response_is_answered_logged_and_judged_like_a_chat(gateway, client):
    answered = client.responses.with_raw_response.create(
        model="pydoc",
        instructions="Be brief.",
        input="hello",
        max_output_tokens=9,
        user="ana",
        metadata={"page": "help"},
    )
    response = answered.parse()
    logged = next(entry for entry in gateway.logged() if entry.id == response.id)

    assert (response.output_text, response.status, response.store) == (ANSWER, "completed", False)
    assert response.usage is not None and (response.usage.input_tokens, response.usage.output_tokens) == (
        7,
        4,
    )
    assert (response.instructions, response.metadata) == ("Be brief.", {"page": "help"})
    assert answered.headers["x-ratchet-version"] == "1" and answered.headers["x-request-id"] == response.id
    assert logged.messages == (("system", "Be brief."), ("user", "hello")) and logged.answer == ANSWER
    assert gateway.stub.seen[-1]["max_tokens"] == 9
    assert gateway.say(request_id=response.id, score=1, user="ana").status_code == 200


def test_a_response_streams_its_events_in_order(client):
    events = list(client.responses.create(model="pydoc", input="hello", stream=True))
    kinds = [event.type for event in events]

    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) == 4 + 4 + 4
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events[4:-4]) == ANSWER == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_clients_own_collector_makes_a_response_of_the_events(client):
    with client.responses.stream(model="pydoc", input="hello") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == ANSWER


FUNCTION = {"type": "function", "name": "find", "parameters": {"type": "object"}, "strict": True}


def test_a_response_calls_a_tool_and_takes_its_result(gateway, client):
    asked = {"model": "pydoc", "tools": [FUNCTION], "parallel_tool_calls": False}
    response = client.responses.create(**asked, input="call:find")
    (called,) = response.output
    assert (called.type, called.name, json.loads(called.arguments)) == (
        "function_call",
        "find",
        {"word": "a"},
    )
    assert gateway.stub.seen[-1]["tools"] == TOOLS and response.tools[0].name == "find"
    assert (response.status, response.parallel_tool_calls, response.output_text) == ("completed", False, "")

    result = {"type": "function_call_output", "call_id": called.call_id, "output": "the result"}
    turns = [{"role": "user", "content": "hello"}, *response.output, result]
    assert client.responses.create(**asked, input=turns).output_text == ANSWER
    sent = gateway.stub.seen[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool"]
    assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"] and sent[2]["content"] == "the result"


def test_a_response_streams_a_call_as_the_clients_collector_wants_it(client):
    events = list(client.responses.create(model="pydoc", input="call:find", tools=[FUNCTION], stream=True))
    assert [event.type for event in events[2:-1]] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with client.responses.stream(model="pydoc", input="call:find", tools=[FUNCTION]) as stream:
        kinds = [event.type for event in stream]
        (called,) = stream.get_final_response().output
    assert kinds[-1] == "response.completed" and json.loads(called.arguments) == {"word": "a"}


def test_texts_and_calls_of_one_answer_are_one_message(gateway, client):
    call = {"type": "function_call", "name": "find", "arguments": '{"word": "a"}'}
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "I look."},
        call | {"call_id": "1"},
        call | {"call_id": "2"},
        {"type": "function_call_output", "call_id": "2", "output": "second"},
        {"type": "function_call_output", "call_id": "1", "output": "first"},
        call | {"call_id": "3"},
        {"type": "function_call_output", "call_id": "3", "output": [{"type": "input_text", "text": "third"}]},
    ]
    client.responses.create(model="pydoc", input=turns, tools=[FUNCTION])
    sent = gateway.stub.seen[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    assert sent[1]["content"] == "I look." and len(sent[1]["tool_calls"]) == 2
    assert [message["content"] for message in sent if message["role"] == "tool"] == [
        "first",
        "second",
        "third",
    ]


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("required", "required"),
        ({"type": "function", "name": "find"}, {"type": "function", "function": {"name": "find"}}),
        ("auto", None),
    ],
)
def test_a_tool_that_has_to_be_called_is_the_upstreams_to_hold(gateway, client, choice, sent):
    client.responses.create(model="pydoc", input="call:find", tools=[FUNCTION], tool_choice=choice)
    assert gateway.stub.seen[-1].get("tool_choice") == sent
    named = choice if isinstance(choice, str) else sent
    client.chat.completions.create(
        model="pydoc", messages=question("call:find"), tools=TOOLS, tool_choice=named
    )
    assert gateway.stub.seen[-1].get("tool_choice") == sent


def test_a_conversation_is_sent_whole_in_the_input(gateway, client):
    first = client.responses.create(model="pydoc", input="hello")
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        *[item.to_dict() for item in first.output],
        {"role": "user", "content": "again"},
    ]
    client.responses.create(model="pydoc", input=turns)

    assert [message["role"] for message in gateway.stub.seen[-1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert gateway.stub.seen[-1]["messages"][2]["content"] == ANSWER


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "send the earlier turns in `input`"),
        ({"conversation": "c"}, "conversation", "no response is kept"),
        ({"background": True}, "background", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "'web_search': not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "no name"),
        ({"tool_choice": "required"}, "tool_choice", "no tools are offered"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"truncation": "auto"}, "truncation", "not supported"),
        ({"include": ["file_search_call.results"]}, "include", "file_search_call.results"),
        ({"max_output_tokens": 65}, "max_output_tokens", "65; wanted 1 to 64"),
        ({"input": []}, "input", "holds 0 messages"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "nothing is fetched from elsewhere",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]", "of type 'reasoning'"),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]},
            "input[0]",
            "answers the call '1', which is none",
        ),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]},
            "input[0].tool_calls",
            "no JSON",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "brings no schema"),
    ],
)
def test_what_a_response_cannot_hold_is_refused_in_words(client, fields, param, message):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": "pydoc", "input": "hello"} | fields)
    assert refused.value.param == param and message in str(refused.value)


def test_a_response_that_breaks_off_ends_with_the_reason(client):
    failed = list(client.responses.create(model="pydoc", input="fault:cut", stream=True))[-1]

    assert failed.type == "response.failed"
    assert "ended before its answer did" in failed.response.error.message


def test_answers_are_not_kept_for_a_look_up(client):
    response = client.responses.create(model="pydoc", input="hello", store=True)
    for look_up in (
        lambda: client.responses.retrieve(response.id),
        lambda: client.responses.cancel(response.id),
        lambda: client.responses.input_items.list(response.id),
        lambda: client.chat.completions.retrieve("chatcmpl-1"),
    ):
        with pytest.raises(openai.NotFoundError, match="are not kept"):
            look_up()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' does not exist → ask for 'pydoc'"),
        ({"model": "pydoc@v1"}, openai.PermissionDeniedError, "up to the rollout"),
        ({"model": "pydoc@v9"}, openai.NotFoundError, "does not exist"),
        ({"temperature": 3}, openai.BadRequestError, "temperature is 3"),
        ({"max_tokens": 65}, openai.BadRequestError, "wanted 1 to 64"),
        ({"n": 2}, openai.BadRequestError, "temperature 0: all choices would be the same"),
        (
            {"tools": [{"type": "function", "function": {}}]},
            openai.BadRequestError,
            "a tool has no name",
        ),
        ({"messages": question() * 9}, openai.BadRequestError, "holds 9; wanted 1 to 8"),
        ({"messages": question("x" * 5000)}, openai.APIStatusError, "bytes, wanted at most 4096"),
        ({"messages": question("fault:long")}, openai.BadRequestError, "maximum context length"),
        ({"messages": question("fault:busy")}, openai.RateLimitError, "takes no more requests"),
        ({"messages": question("fault:broken")}, openai.InternalServerError, "out of memory"),
        pytest.param(
            {"messages": question(f"wait:{10 * TIMEOUT}")},
            openai.InternalServerError,
            f"over {TIMEOUT:g} s",
            id="late",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_is_one_of_the_clients_own(client, fields, error, message, stream):
    with pytest.raises(error) as refused:
        client.chat.completions.create(
            **{"model": "pydoc", "messages": question(), "stream": stream} | fields
        )
    assert message in str(refused.value)
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def test_an_error_after_the_stream_began_is_told_in_it(client):
    with pytest.raises(openai.APIError, match="ended before its answer did"):
        list(client.chat.completions.create(model="pydoc", messages=question("fault:cut"), stream=True))


# --- statuses and headers -----------------------------------------------------------------------------------


def test_a_failed_answer_still_names_its_version_and_id(gateway):
    failed = gateway.ask("fault:broken")

    assert failed.status_code == 502 and failed.json()["error"]["code"] == "engine_failed"
    assert failed.headers["x-ratchet-version"] == "1" and failed.headers["x-request-id"].startswith(
        "chatcmpl-"
    )


def test_busy_is_429_with_retry_after(gateway):
    refused = gateway.ask("fault:busy")

    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"


def test_an_answer_that_takes_too_long_is_504(gateway):
    assert gateway.ask(f"wait:{10 * TIMEOUT}").status_code == 504
    wait_for(lambda: gateway.stub.running == 0)


def test_malformed_json_is_400_in_the_same_form(gateway):
    refused = gateway.http.post(
        "/v1/chat/completions", content=b'{"model": ', headers={"content-type": "application/json"}
    )

    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("POST", "/v1/completions", 404), ("GET", "/docs", 404)],
)
def test_what_is_not_served_says_what_is(gateway, method, path, status):
    refused = gateway.http.request(method, path, headers={"content-type": "application/json"})

    assert (
        refused.status_code == status
        and "known: POST /v1/chat/completions" in refused.json()["error"]["message"]
    )


def test_a_body_that_grows_too_large_is_read_no_further(gateway):
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(20_000):
            sent += 1024
            yield b" " * 1024

    try:
        status = gateway.http.post(
            "/v1/chat/completions", content=chunks(), headers={"content-type": "application/json"}
        ).status_code
    except httpx.NetworkError:  # it hung up while we still sent
        status = 413
    assert status == 413 and sent < 10_000 * 1024


def test_another_sites_page_gets_nowhere(gateway):
    body = json.dumps({"model": "pydoc", "messages": question()})

    rebound = gateway.http.post(
        "/v1/chat/completions",
        content=body,
        headers={"host": "evil.example:8400", "content-type": "application/json"},
    )
    simple = gateway.http.post("/v1/chat/completions", content=body, headers={"content-type": "text/plain"})
    preflight = gateway.http.options(
        "/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )

    assert (rebound.status_code, simple.status_code, preflight.status_code) == (403, 415, 405)
    assert "access-control-allow-origin" not in preflight.headers
    assert gateway.get("/metrics", headers={"host": "localhost:1"}).status_code == 200
    assert gateway.get("/metrics", headers={"host": "[::1]:1"}).status_code == 200
    # A container's health check knows the gateway by another name.
    assert gateway.get("/healthz", headers={"host": "gateway:8400"}).status_code == 200


def test_metrics_count_what_happened(gateway):
    gateway.ask()
    gateway.ask(n=2)
    text = gateway.get("/metrics").text

    assert 'ratchet_requests_total{arm="champion",status="200",version="1"}' in text
    assert 'ratchet_requests_total{arm="",status="400",version=""}' in text
    assert 'ratchet_first_token_seconds_count{arm="champion",version="1"}' in text
    for name in (
        "ratchet_under_way 0.0",
        "ratchet_log_waiting",
        "ratchet_log_dropped 0.0",
        'ratchet_tokens_total{arm="champion",kind="answer",version="1"}',
    ):
        assert name in text


# --- the log and feedback -----------------------------------------------------------------------------------


def test_the_log_has_the_answer_and_a_pseudonym(gateway):
    id = gateway.ask("mail ana@example.org", user="ana").headers["x-request-id"]
    logged = next(entry for entry in gateway.logged() if entry.id == id)

    assert logged.answer == ANSWER and logged.messages == (("user", "mail [redacted]"),)
    assert len(logged.user) == 16 and logged.user != "ana"
    assert (logged.arm, logged.version, logged.finish, logged.status, logged.answer_tokens) == (
        "champion",
        1,
        "stop",
        200,
        4,
    )
    assert 0 < logged.first_ms <= logged.latency_ms < 5000


def test_a_session_stands_for_its_user_and_nobody_has_no_name(gateway):
    session = gateway.ask(headers={"x-session-id": "tab-1"}).headers["x-request-id"]
    nobody = gateway.ask().headers["x-request-id"]
    users = {entry.id: entry.user for entry in gateway.logged()}

    assert len(users[session]) == 16 and users[nobody] == ""


def test_a_failed_answer_is_logged_with_its_status(gateway):
    id = gateway.ask("fault:broken").headers["x-request-id"]
    logged = next(entry for entry in gateway.logged() if entry.id == id)

    assert (logged.status, logged.finish) == (502, "error") and "out of memory" in logged.error


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_the_work_and_is_logged(gateway, stream):
    before = gateway.stub.hung_up
    body = {"model": "pydoc", "messages": question(f"wait:{0.9 * TIMEOUT} words:70"), "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        (
            gateway.http.post("/v1/chat/completions", json=body, timeout=TIMEOUT / 4)
            if not stream
            else read_first(gateway, body)
        )

    wait_for(lambda: gateway.stub.running == 0)
    assert gateway.stub.hung_up == before + 1
    wait_for(lambda: gateway.logged()[-1].finish == "cancelled")
    assert gateway.logged()[-1].status == 499


def read_first(gateway: Gateway, body: dict) -> None:
    with gateway.http.stream("POST", "/v1/chat/completions", json=body) as answered:
        for _ in answered.iter_lines():
            raise httpx.ReadTimeout("enough")


def test_a_users_later_feedback_takes_the_place_of_the_earlier(gateway):
    id = gateway.ask(user="ana").json()["id"]

    assert gateway.say(request_id=id, score=True, user="ana").status_code == 200
    assert gateway.say(request_id=id, score=0.5, user="bob", comment="so so").status_code == 200
    assert gateway.say(request_id=id, score=0, user="ana").status_code == 200

    said = gateway.log.feedback_of([id])[id]
    assert [(feedback.score, feedback.comment) for feedback in said] == [(0.5, "so so"), (0.0, "")]
    assert said[1].user == next(entry.user for entry in gateway.logged() if entry.id == id)
    assert {feedback.sender for feedback in said} == {""}


def test_feedback_for_a_foreign_id_is_404(gateway):
    for id in ("chatcmpl-123", "chatcmpl-" + "0" * 24 + "-" + "0" * 16, "' OR 1=1"):
        assert gateway.say(request_id=id, score=1).status_code == 404


def test_feedback_of_nan_is_400(gateway):
    id = gateway.ask().json()["id"]
    for score in ("NaN", "Infinity", "1e999", "2", '"good"'):
        raw = f'{{"request_id": "{id}", "score": {score}}}'.encode()
        assert (
            gateway.http.post(
                "/v1/feedback", content=raw, headers={"content-type": "application/json"}
            ).status_code
            == 400
        )


def test_a_broken_log_costs_no_answer_and_refuses_feedback(tmp_path):
    blocked = tmp_path / ".ratchet/requests.db"
    blocked.mkdir(parents=True)
    with running_gateway(tmp_path) as gateway:
        answered = gateway.ask()
        said = gateway.say(request_id=answered.json()["id"], score=1)

        assert answered.status_code == 200
        assert said.status_code == 503 and "request log" in said.json()["error"]["message"]
        blocked.rmdir()
        assert gateway.say(request_id=answered.json()["id"], score=1).status_code == 200
        wait_for(lambda: len(gateway.log.window(limit=5)) == 1)
    with sqlite3.connect(blocked) as database:
        assert database.execute("select count(*) from feedback").fetchone() == (1,)
    database.close()


# --- versions -----------------------------------------------------------------------------------------------


def test_before_the_first_champion_it_lives_and_is_not_ready(tmp_path):
    with running_gateway(tmp_path, version=None) as gateway:
        assert gateway.get("/healthz").status_code == 200
        ready, answered = gateway.get("/readyz"), gateway.ask()

    assert ready.status_code == answered.status_code == 503
    assert "ratchet retrain" in ready.json()["error"]["message"] and answered.headers["retry-after"] == "5"


def test_a_user_stays_with_one_arm_and_the_share_holds(tmp_path):
    with running_gateway(tmp_path) as gateway:
        open_rollout(tmp_path, champion=1, version=2, share=0.5)
        wait_until_served(tmp_path, challenger=2)
        answers = {
            user: {
                gateway.ask(user=user, headers={"x-ratchet-arm": "challenger"}).headers["x-ratchet-arm"]
                for _ in range(2)
            }
            for user in map(str, range(40))
        }
        logged = gateway.logged()

    assert all(len(arms) == 1 for arms in answers.values())
    assert 8 <= sum(arms == {"challenger"} for arms in answers.values()) <= 32
    assert {(entry.arm, entry.version, entry.rollout, entry.step) for entry in logged} == {
        ("champion", 1, "r1", 0),
        ("challenger", 2, "r1", 0),
    }
    assert all(entry.answer == " ".join([f"pydoc@v{entry.version}"] * 4) for entry in logged)


def test_only_an_admin_names_a_version(tmp_path):
    admin, user = add_key(tmp_path, "admin", ["infer", "admin"]), add_key(tmp_path, "user", ["infer"])
    with running_gateway(tmp_path) as gateway:
        open_rollout(tmp_path, champion=1, version=2, share=0.01)
        wait_until_served(tmp_path, challenger=2)
        with client_of(gateway, admin) as client:
            named = client.chat.completions.create(model="pydoc@v2", messages=question())
        with client_of(gateway, user) as client, pytest.raises(openai.PermissionDeniedError):
            client.chat.completions.create(model="pydoc@v2", messages=question())
        logged = gateway.logged()

    assert named.system_fingerprint == "pydoc@v2" and logged[-1].arm == "named" and logged[-1].rollout == ""


# --- keys and limits ----------------------------------------------------------------------------------------


def test_keys_open_what_their_scopes_say(tmp_path):
    infer, feedback, admin = (add_key(tmp_path, scope, [scope]) for scope in ("infer", "feedback", "admin"))
    with (
        running_gateway(tmp_path) as gateway,
        client_of(gateway, infer) as client,
        client_of(gateway, "sk-ratchet-wrong") as stranger,
    ):
        id = client.chat.completions.create(model="pydoc", messages=question()).id
        assert next(model.id for model in client.models.list()) == "pydoc"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert gateway.say(request_id=id, score=1).status_code == 401
        assert gateway.say(request_id=id, score=1, headers=bearer(infer)).status_code == 403
        assert gateway.say(request_id=id, score=1, headers=bearer(feedback)).status_code == 200
        assert gateway.get("/metrics").status_code == 401
        assert gateway.get("/metrics", headers=bearer(infer)).status_code == 403
        assert gateway.get("/metrics", headers=bearer(admin)).status_code == 200
        assert gateway.get("/").headers["www-authenticate"].startswith("Basic")
        assert gateway.get("/readyz").status_code == gateway.get("/healthz").status_code == 200


def test_feedback_knows_which_key_it_came_with_by_a_pseudonym(tmp_path):
    website, other = (
        add_key(tmp_path, "website", ["infer", "feedback"]),
        add_key(tmp_path, "other", ["feedback"]),
    )
    with running_gateway(tmp_path) as gateway:
        id = gateway.ask(headers=bearer(website)).json()["id"]
        assert gateway.say(request_id=id, score=1, user="ana", headers=bearer(website)).status_code == 200
        assert gateway.say(request_id=id, score=0, user="ben", headers=bearer(other)).status_code == 200
        for_ana = gateway.say(request_id=id, score=0, user="ana", headers=bearer(other))
        said = gateway.log.feedback_of([id])[id]

    assert for_ana.status_code == 409 and "another key" in for_ana.json()["error"]["message"]
    assert [feedback.sender for feedback in said] == [
        Ids(tmp_path).sender("website"),
        Ids(tmp_path).sender("other"),
    ]
    assert len({feedback.sender for feedback in said}) == 2 and "website" not in str(said)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_that_asks_too_often_is_told_when_to_come_again(tmp_path):
    key = add_key(tmp_path, "website", ["infer"])
    with running_gateway(tmp_path, gateway={"requests_per_minute": 3}) as gateway:
        answers = [gateway.ask(headers=bearer(key)) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 20


def test_more_than_the_queue_takes_is_429_and_the_rest_is_answered(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with (
        running_gateway(tmp_path, gateway={"max_batch": 2, "max_queue": 2}) as gateway,
        ThreadPoolExecutor(8) as pool,
    ):
        answers = list(pool.map(lambda _: gateway.ask(f"wait:{scaled(0.6)}"), range(8)))

    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 4
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)


def test_the_pages_that_the_page_links_are_served_apart_from_it_and_nothing_else_is(gateway):
    write_files(
        gateway.root,
        {
            ".ratchet/evaluations/made.html": "<title>v1: promote</title>",
            ".ratchet/monitor/reports/made/report.html": "<title>Evidently</title>",
            ".ratchet/monitor/reports/made/report.json": "{}",
        },
    )
    for path, title in (("evaluations/made.html", "v1"), ("monitor/reports/made/report.html", "Evidently")):
        answer = gateway.get(f"/{path}")
        assert answer.status_code == 200 and title in answer.text
        assert answer.headers["content-security-policy"] == "sandbox allow-scripts"
    for path in (
        "evaluations/none.html",
        "monitor/reports/made/report.json",
        "monitor/reports/%2e%2e/verdicts.jsonl",
        "evaluations/..%2fgateway.key",
        "evaluations/",
    ):
        assert gateway.get(f"/{path}").status_code == 404, path


def test_every_page_is_served_so_that_nothing_of_it_can_run_or_be_framed(gateway):
    write_files(gateway.root, {".ratchet/evaluations/framed.html": "<title>v1: promote</title>"})
    for path in ("/", "/review", "/evaluations/framed.html"):
        page = gateway.get(path)
        policy = page.headers["content-security-policy"]
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html"), path
        assert page.headers["x-content-type-options"] == "nosniff"
        assert (page.headers["referrer-policy"], page.headers["cache-control"]) == ("no-referrer", "no-store")
        assert "script-src 'unsafe" not in policy and ("default-src 'none'" in policy or "sandbox" in policy)
        assert "frame-ancestors 'none'" in policy or "sandbox" in policy, path
    assert "v1" in gateway.get("/").text
    assert "content-security-policy" not in gateway.get("/v1/models").headers
