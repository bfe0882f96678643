"""The teacher's client against a real server: protocols, bad answers, busy endpoints, limits, hidden keys."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import scaled
from served import running_gateway
from servers import serving
from teacher_stub import (
    BROKEN,
    BUSY,
    CUT,
    FENCED,
    FILTERED,
    HTML,
    MALFORMED,
    REFUSES,
    THOUGHT,
    WRONG_SHAPE,
    Act,
    TeacherStub,
)

from ratchet.config.synthesis import TeacherConfig
from ratchet.errors import ConfigError
from ratchet.gateway.auth import add_key
from ratchet.llm.budget import Budget, Prices, SpentError, Usage
from ratchet.llm.client import AskError, Said, Teacher, read_retry_after
from ratchet.llm.prompts import Prompt, fence
from ratchet.llm.replies import Malformed, Pairs, Questions, Score, read_reply, schema_of

PASSAGE = "Hail damage is covered from 10 mm on."
PROMPT = Prompt("p@1", "You write pairs.", fence(PASSAGE))
KEY = "sk-teacher-4711"


@pytest.fixture
def stub() -> TeacherStub:
    return TeacherStub()


@pytest.fixture
def address(stub) -> Iterator[str]:
    with serving(stub) as url:
        yield url


def unlimited() -> Budget:
    return Budget(max_cost=1e9, max_tokens=10**12)


def ask(
    address: str, *, times: int = 1, budget: Budget | None = None, prompt: Prompt = PROMPT, **settings: Any
) -> list[Said]:
    config = TeacherConfig(
        **{"url": f"{address}/v1", "model": "big", "tries": 3, "timeout": scaled(5.0), **settings}
    )

    async def run() -> list[Said]:
        teacher = Teacher(config, budget or unlimited(), backoff=0.01)
        try:
            return list(
                await asyncio.gather(
                    *(teacher.ask(prompt, Pairs, seed=7 + number) for number in range(times))
                )
            )
        finally:
            await teacher.close()

    return asyncio.run(run())


def pairs(said: Said) -> list[tuple[str, str]]:
    return [(pair.question, pair.answer) for pair in read_reply(said.raw, Pairs).pairs]


# --- protocols ---


@pytest.mark.parametrize(
    ("protocol", "path"), [("openai", "/v1/chat/completions"), ("anthropic", "/v1/messages")]
)
def test_both_protocols_give_the_same_rows_and_usage(stub, address, protocol, path):
    (said,) = ask(address, protocol=protocol)
    assert (pairs(said)[0][1], said.usage, said.failure) == (PASSAGE, Usage(300, 100), "")
    assert stub.paths == [path]
    assert "You write pairs." in stub.prompts()[0]


def test_the_key_goes_where_the_protocol_wants_it(stub, address, monkeypatch):
    monkeypatch.setenv("RATCHET_TEACHER_KEY", KEY)
    ask(address)
    ask(address, protocol="anthropic")
    assert stub.headers[0]["authorization"] == f"Bearer {KEY}"
    assert (stub.headers[1]["x-api-key"], stub.headers[1]["anthropic-version"]) == (KEY, "2023-06-01")
    assert "authorization" not in stub.headers[1]


def test_an_endpoint_that_takes_a_schema_gets_it_closed_and_whole(stub, address):
    ask(address)
    schema = stub.seen[0]["response_format"]["json_schema"]["schema"]
    assert (schema["required"], schema["additionalProperties"]) == (["pairs"], False)
    assert schema["$defs"]["Pair"]["required"] == ["question", "answer"]
    assert "default" not in schema_of(Score)["properties"]["reason"]


def test_an_endpoint_without_schemas_is_asked_again_without_one_and_never_gets_it_again(address, stub):
    stub.takes_schema = False
    said = ask(address, times=3, parallel=1)
    assert all(found.failure == "" for found in said)
    assert ["response_format" in body for body in stub.seen] == [True, False, False, False]


def test_options_that_a_model_refuses_are_left_out_or_renamed(stub, address):
    stub.script = {
        PASSAGE: [
            Act(
                status=400,
                raw=b'{"error": {"message": "Unsupported parameter: max_tokens. '
                b'Use max_completion_tokens instead."}}',
            ),
            Act(
                status=400, raw=b'{"error": {"message": "temperature does not support 0.7 with this model"}}'
            ),
        ]
    }
    (said,) = ask(address, tries=1)
    assert said.failure == ""
    assert {"max_tokens", "temperature"} & stub.seen[-1].keys() == set()
    assert stub.seen[-1]["max_completion_tokens"] == 2048


# --- answers that are not what was asked for ---


@pytest.mark.parametrize(
    "act", [FENCED, THOUGHT, Act(around="{}\n\nI hope that helps!")], ids=["fence", "thought", "prose"]
)
def test_what_stands_around_the_json_does_not_matter(stub, address, act):
    stub.script = {PASSAGE: [act]}
    (said,) = ask(address)
    assert len(pairs(said)) == stub.requests == 1


@pytest.mark.parametrize("act", [MALFORMED, WRONG_SHAPE, REFUSES])
def test_a_malformed_answer_gets_one_second_try_that_is_paid_as_well(stub, address, act):
    stub.script = {PASSAGE: [act]}
    (said,) = ask(address)
    assert (said.failure, said.usage, stub.requests) == ("", Usage(600, 200), 2)
    assert "That was not the JSON that was asked for" in stub.seen[1]["messages"][-1]["content"]
    assert [message["role"] for message in stub.seen[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]


@pytest.mark.parametrize(
    "act",
    [MALFORMED, WRONG_SHAPE, REFUSES, Act(text='{"pairs": [{"question": "half \\ud800", "answer": "b"}]}')],
)
def test_a_second_malformed_answer_is_a_failure(stub, address, act):
    stub.script = {PASSAGE: [act, act, act]}
    (said,) = ask(address)
    assert (said.failure, stub.requests) == ("malformed", 2)
    assert said.fault


@pytest.mark.parametrize("protocol", ["openai", "anthropic"])
@pytest.mark.parametrize(("act", "failure"), [(CUT, "cut_off"), (FILTERED, "teacher_refused")])
def test_an_answer_that_was_cut_or_filtered_is_not_asked_for_again(stub, address, protocol, act, failure):
    stub.script = {PASSAGE: [act]}
    (said,) = ask(address, protocol=protocol)
    assert (said.failure, stub.requests) == (failure, 1)


def test_what_is_no_answer_of_the_protocol_says_so(stub, address):
    stub.script = {PASSAGE: [HTML]}
    with pytest.raises(AskError, match="no answer of the protocol `openai`") as caught:
        ask(address)
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"choices": null}',
        b'{"choices": [{}]}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}',
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": "many"}}',
    ],
)
def test_an_answer_with_a_value_of_another_type_is_unreadable(stub, address, raw):
    stub.script = {PASSAGE: [Act(raw=raw)]}
    with pytest.raises(AskError) as caught:
        ask(address)
    assert caught.value.reason == "unreadable"


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text):
    try:
        assert isinstance(read_reply(text, Questions), Questions)
    except Malformed as error:
        assert str(error)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 50_000, "{" * 1000, '{"pairs": [' + '{"question": "a", "answer": "b"},' * 3],
)
def test_nested_and_broken_answers_are_malformed_within_a_second(text):
    started = time.thread_time()
    with pytest.raises(Malformed):
        read_reply(text, Questions)
    assert time.thread_time() - started < 1


def test_a_bare_list_stands_for_its_object_and_surplus_keys_are_ignored():
    assert read_reply('["a", "b"]', Questions).questions == ["a", "b"]
    assert (
        read_reply('{"note": 1, "pairs": [{"question": "a", "answer": "b", "why": 2}]}', Pairs)
        .pairs[0]
        .answer
        == "b"
    )


# --- a busy, broken or missing endpoint ---


def test_a_broken_endpoint_is_asked_again(stub, address):
    stub.script = {PASSAGE: [BROKEN, BROKEN]}
    (said,) = ask(address)
    assert (said.failure, stub.requests) == ("", 3)


def test_after_the_last_try_the_reason_and_the_endpoints_words_are_kept(stub, address):
    stub.script = {PASSAGE: [BROKEN] * 3}
    with pytest.raises(AskError, match="500 out of memory") as caught:
        ask(address)
    assert (caught.value.reason, stub.requests) == ("endpoint_error", 3)


def test_retry_after_is_obeyed_by_all_requests(stub, address):
    stub.script = {PASSAGE: [BUSY]}
    started = time.perf_counter()
    ask(address, parallel=1, times=2)
    assert 1.0 <= time.perf_counter() - started < scaled(4)
    assert stub.requests == 3


def test_retry_after_is_read_as_seconds_or_date_and_never_waited_for_longer_than_a_minute(stub, address):
    assert (
        read_retry_after("2.5"),
        read_retry_after("-3"),
        read_retry_after(""),
        read_retry_after("soon"),
    ) == (2.5, 0.0, None, None)
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    teacher = Teacher(TeacherConfig(url=f"{address}/v1", model="big"), unlimited())
    assert teacher.choose_wait(1, 86_400.0) == 60.0
    assert all(teacher.choose_wait(tries, None) <= 30.0 for tries in range(1, 12))


def test_an_answer_that_takes_too_long_is_asked_for_again(stub, address):
    stub.script = {PASSAGE: [Act(wait=scaled(1.5))]}
    (said,) = ask(address, timeout=scaled(0.4))
    assert (said.failure, stub.requests) == ("", 2)


def test_an_address_where_nothing_listens_is_named_by_its_key():
    with pytest.raises(AskError, match=r"synthesize\.teacher\.url does not answer: ConnectError") as caught:
        ask("http://127.0.0.1:1")
    assert caught.value.reason == "unreachable"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": ""}, "synthesize.teacher.url is empty"),
        ({"url": "localhost:8000"}, "no http"),
        ({"url": "http://"}, "no http"),
        ({"url": "http://[::1"}, "no http"),
        ({"url": "http://127.0.0.1:99999/v1"}, "no http"),
        ({"url": "file:///etc/passwd"}, "no http"),
        ({"url": "https://ana:secret@example.org/v1"}, "RATCHET_TEACHER_KEY"),
        ({"url": "https://example.org/v1?key=secret"}, "RATCHET_TEACHER_KEY"),
        ({"model": ""}, "synthesize.teacher.model is empty"),
    ],
)
def test_an_address_that_cannot_be_says_what_to_set(settings, words):
    with pytest.raises(ConfigError) as caught:
        Teacher(TeacherConfig(**{"url": "http://127.0.0.1:8000/v1", "model": "big", **settings}), unlimited())
    assert words in str(caught.value)
    assert "→" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_refused_key_and_an_unknown_page_end_the_run_and_say_what_to_set(stub, address, monkeypatch):
    with pytest.raises(ConfigError, match=r"(?s)404 no page.*mostly ending with /v1"):
        ask(f"{address}/api")
    stub.key = "another"
    monkeypatch.setenv("RATCHET_TEACHER_KEY", KEY)
    with pytest.raises(
        ConfigError, match=r"(?s)refuses the key.*correct the environment variable RATCHET_TEACHER_KEY"
    ) as caught:
        ask(address)
    assert KEY not in str(caught.value)
    assert "[redacted]" in str(caught.value)


def test_other_refusals_are_of_one_request(stub, address):
    stub.script = {PASSAGE: [Act(status=400, raw=b'{"error": {"message": "prompt is too long"}}')]}
    with pytest.raises(AskError, match="400 prompt is too long") as caught:
        ask(address)
    assert caught.value.reason == "endpoint_refused"


# --- limits ---


def test_no_more_requests_are_under_way_than_allowed(stub, address):
    stub.delay = scaled(0.02)
    ask(address, times=20, parallel=3)
    assert stub.most_running == 3


def test_requests_are_spaced_under_the_limit_of_a_minute(stub, address):
    started = time.perf_counter()
    ask(address, times=5, parallel=5, requests_per_minute=1200)
    assert time.perf_counter() - started >= 4 * 0.05


@pytest.mark.parametrize("parallel", [1, 30])
def test_the_money_never_passes_its_limit_and_the_requests_before_it_are_used(stub, address, parallel):
    """A request costs 0.4 at the stub's 300 + 100 tokens; it sets about 1.1 aside before it is sent."""
    budget = Budget(max_cost=4.0, max_tokens=10**12)

    async def run() -> list[Any]:
        teacher = Teacher(
            TeacherConfig(
                url=f"{address}/v1",
                model="big",
                input_price=1000,
                output_price=1000,
                max_tokens=100,
                parallel=parallel,
            ),
            budget,
            backoff=0.01,
        )
        try:
            return list(
                await asyncio.gather(
                    *(teacher.ask(PROMPT, Pairs, seed=1) for _ in range(30)), return_exceptions=True
                )
            )
        finally:
            await teacher.close()

    found = asyncio.run(run())
    spent = [error for error in found if isinstance(error, SpentError)]
    assert len(spent) + stub.requests == 30
    assert 6 <= stub.requests <= 10
    assert budget.cost == pytest.approx(0.4 * stub.requests)
    assert budget.cost <= 4.0
    assert {error.limit for error in spent} == {"max_cost"}


def test_tokens_have_a_limit_of_their_own(stub, address):
    with pytest.raises(SpentError, match="max_run_tokens"):
        ask(address, times=3, parallel=1, max_tokens=100, budget=Budget(max_cost=0, max_tokens=2000))
    assert 1 <= stub.requests < 3


def test_an_answer_that_got_lost_counts_as_paid(stub, address):
    stub.script = {PASSAGE: [Act(wait=scaled(1.0))]}
    budget = unlimited()
    ask(address, timeout=scaled(0.3), max_tokens=100, budget=budget)
    assert budget.usage.output == 200


def test_without_usage_the_most_is_counted(stub, address):
    stub.script = {PASSAGE: [Act(usage=False)]}
    budget = unlimited()
    (said,) = ask(address, budget=budget)
    assert budget.usage == said.usage
    assert said.usage.input >= len(PASSAGE)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), max_size=30), st.integers(1, 8))
def test_no_order_of_requests_passes_a_limit(uses, parallel):
    prices = Prices(1e3, 2e3)
    budget = Budget(max_cost=3.0, max_tokens=3000)

    async def run() -> None:
        slots = asyncio.Semaphore(parallel)

        async def one(used: Usage) -> None:
            async with slots:
                ticket = await budget.hold(Usage(500, 500), prices)
                await asyncio.sleep(0)
                await budget.settle(ticket, used, prices)

        await asyncio.gather(*(one(Usage(*used)) for used in uses), return_exceptions=True)

    asyncio.run(run())
    assert budget.cost <= 3.0
    assert sum(budget.usage) <= 3000


# --- the key ---


def test_a_key_that_an_endpoint_repeats_is_in_no_answer_no_error_and_no_log(
    stub, address, monkeypatch, caplog
):
    monkeypatch.setenv("RATCHET_TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    stub.echo = True
    (said,) = ask(address)
    stub.script = {PASSAGE: [BROKEN] * 3}
    with pytest.raises(AskError) as caught:
        ask(address)
    assert KEY not in said.raw + str(caught.value)
    assert "[redacted]" in said.raw
    assert caplog.text  # httpx does log
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(monkeypatch, key):
    monkeypatch.setenv("RATCHET_TEACHER_KEY", key)
    with pytest.raises(ConfigError, match="RATCHET_TEACHER_KEY holds no key") as caught:
        Teacher(TeacherConfig(url="http://127.0.0.1:8000/v1", model="big"), unlimited())
    assert key not in str(caught.value)


def test_errors_of_an_endpoint_are_cut(stub, address):
    stub.script = {PASSAGE: [Act(status=500, raw=b"x" * 50_000)] * 3}
    with pytest.raises(AskError) as caught:
        ask(address)
    assert len(str(caught.value)) < 300


# --- the gateway as the endpoint ---


def test_the_gateway_of_this_project_answers_the_client_with_its_key(tmp_path, monkeypatch):
    """It takes no schema and says so; the client learns that."""
    with running_gateway(tmp_path) as gateway:
        monkeypatch.setenv("RATCHET_GATEWAY_KEY", add_key(tmp_path, "synthesize", ["infer"]))
        config = TeacherConfig(
            url=f"{gateway.url}/v1", model="pydoc", key_env="RATCHET_GATEWAY_KEY", max_tokens=32, tries=2
        )

        async def both() -> tuple[Said, Said]:
            teacher = Teacher(config, unlimited(), section="gateway", backoff=0.01)
            try:
                return await teacher.say(PROMPT, seed=1), await teacher.ask(PROMPT, Pairs, seed=1)
            finally:
                await teacher.close()

        said, asked = asyncio.run(both())
    assert (said.raw, said.failure) == (" ".join(["pydoc@v1"] * 4), "")
    assert (asked.raw, asked.failure) == (said.raw, "malformed")
