"""The gateway with the engine `local` on the tiny base: what HTTP says is what the model says."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import openai
import pydantic
import pytest
from media_models import picture, picture_part
from served import put_in_charge, wait_for
from servers import serving

from ratchet.config.params import Config
from ratchet.engines import make_engine
from ratchet.gateway.app import create_app
from ratchet.gateway.routing import Fleet
from ratchet.monitoring.request_log import RequestLog, open_log
from ratchet.serving.bundle import SERVING

ASKED: dict[str, Any] = {
    "model": "pydoc",
    "messages": [{"role": "user", "content": "Which module documents this?"}],
    "max_tokens": 6,
}
CLAIM = {
    "type": "object",
    "properties": {"covered": {"type": "boolean"}, "kind": {"enum": ["hail", "fire"]}},
    "required": ["covered", "kind"],
    "additionalProperties": False,
}


class Local(NamedTuple):
    client: openai.OpenAI
    log: RequestLog


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, candidate: Path) -> Iterator[Local]:
    root = tmp_path_factory.mktemp("local")
    put_in_charge(root, 1, adapter=candidate)
    shutil.copytree(tiny_base, root / SERVING / "bases/base", dirs_exist_ok=True)
    config = Config.model_validate({"project": {"name": "pydoc"}})
    engine, log = make_engine(config), open_log(root, config)
    app = create_app(root, config, engine, fleet := Fleet(root, config, engine), log)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        wait_for(lambda: fleet.table.champion == 1, seconds=30)
        yield Local(client, log)


def test_a_trained_adapter_answers_whole_as_in_a_stream(local: Local):
    chats = local.client.chat.completions

    whole = chats.create(**ASKED)
    streamed = list(chats.create(**ASKED, stream=True))
    with pytest.raises(openai.BadRequestError, match="token"):
        chats.create(**ASKED | {"messages": [{"role": "user", "content": "word " * 2000}]})
    assert local.log.flush()
    logged = local.log.window(limit=10)

    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert (
        whole.choices[0].message.content == text
        and whole.usage is not None
        and 0 < whole.usage.completion_tokens <= 6
    )
    assert [entry.status for entry in logged] == [200, 200, 400]
    assert logged[0].answer == text and logged[0].prompt_nll is not None and logged[0].prompt_nll > 0


def test_a_schema_holds_whatever_the_model_would_say(local: Local):
    form: Any = {"type": "json_schema", "json_schema": {"name": "claim", "schema": CLAIM}}
    asked = ASKED | {"max_tokens": 64, "response_format": form}

    for settings in ({}, {"temperature": 2, "seed": 1, "top_p": 0.9}, {"temperature": 2, "seed": 2}):
        choice = local.client.chat.completions.create(**asked | settings).choices[0]
        claim = json.loads(choice.message.content or "")
        assert choice.finish_reason == "stop" and set(claim) == {"covered", "kind"}
        assert isinstance(claim["covered"], bool) and claim["kind"] in ("hail", "fire")

    form = {"format": {"type": "json_schema", "name": "claim", "schema": CLAIM}}
    response = local.client.responses.create(model="pydoc", input="Covered?", max_output_tokens=64, text=form)
    assert set(json.loads(response.output_text)) == {"covered", "kind"}


class Claim(pydantic.BaseModel):
    covered: bool
    kind: Literal["hail", "fire"]


def test_the_clients_own_classes_are_schemas(local: Local):
    chat = local.client.chat.completions.parse(**ASKED | {"max_tokens": 64}, response_format=Claim)
    response = local.client.responses.parse(
        model="pydoc", input="Covered?", max_output_tokens=64, text_format=Claim
    )

    assert isinstance(chat.choices[0].message.parsed, Claim)
    assert isinstance(response.output_parsed, Claim)


def test_any_object_is_an_answer_in_json(local: Local):
    asked = ASKED | {"response_format": {"type": "json_object"}, "temperature": 1.5, "max_tokens": 80}
    choices = [local.client.chat.completions.create(**asked, seed=seed).choices[0] for seed in range(6)]

    assert all((choice.message.content or "").startswith("{") for choice in choices)
    for choice in choices:
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content or ""), dict)


def test_a_row_with_a_schema_changes_no_other_row(local: Local):
    form: Any = {"type": "json_schema", "json_schema": {"name": "claim", "schema": CLAIM}}
    alone = local.client.chat.completions.create(**ASKED).choices[0].message.content
    raw = local.client.chat.completions

    with raw.create(**ASKED | {"max_tokens": 64, "response_format": form}, stream=True) as other:
        next(iter(other))
        assert raw.create(**ASKED).choices[0].message.content == alone


def test_a_schema_that_cannot_be_held_is_refused_by_its_keyword(local: Local):
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError, match='cannot be held: Unimplemented keys: \\["not"\\]'):
        local.client.chat.completions.create(**ASKED, response_format=form)


def test_greedy_tokens_are_the_likeliest_and_their_bytes_are_the_answer(local: Local):
    chats = local.client.chat.completions
    choice = chats.create(**ASKED, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content
    tokens = choice.logprobs.content

    text = b"".join(bytes(token.bytes or []) for token in tokens).decode("utf-8", "replace")
    assert text.strip() == choice.message.content
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in tokens)
    assert all(token.token == token.top_logprobs[0].token for token in tokens)
    assert all(sum(math.exp(other.logprob) for other in token.top_logprobs) <= 1.0001 for token in tokens)
    streamed = [
        token
        for chunk in chats.create(**ASKED, logprobs=True, top_logprobs=3, stream=True)
        for token in (chunk.choices[0].logprobs and chunk.choices[0].logprobs.content) or []
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_a_seed_repeats_an_answer_and_choices_differ(local: Local):
    asked = ASKED | {"max_tokens": 24, "temperature": 1.5, "seed": 7}
    first, again = (local.client.chat.completions.create(**asked, n=3).choices for _ in range(2))
    texts = [choice.message.content for choice in first]

    assert texts == [choice.message.content for choice in again] and len(set(texts)) == 3
    assert local.client.chat.completions.create(**asked).choices[0].message.content == texts[0]


def test_what_is_sampled_never_becomes_the_default(local: Local):
    local.client.chat.completions.create(**ASKED, temperature=2, seed=1)
    answers = {local.client.chat.completions.create(**ASKED).choices[0].message.content for _ in range(3)}

    assert len(answers) == 1


def test_a_stop_string_ends_the_answer_before_it(local: Local):
    whole = local.client.chat.completions.create(**ASKED | {"max_tokens": 24}).choices[0].message.content
    assert whole and len(whole) > 4
    stop = whole[3:5]
    choice = local.client.chat.completions.create(**ASKED | {"max_tokens": 24}, stop=[stop]).choices[0]

    assert choice.message.content == whole[: whole.index(stop)].rstrip() and choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_that_the_base_cannot_take_is_refused_by_its_place(local: Local, stream: bool):
    shown = {"role": "user", "content": [{"type": "text", "text": "Which one?"}, picture_part(picture(1))]}
    turns: Any = [*ASKED["messages"], {"role": "assistant", "content": "json"}, shown]
    with pytest.raises(openai.BadRequestError, match="a picture is given, and the base reads text") as chat:
        local.client.chat.completions.create(model="pydoc", messages=turns, stream=stream)
    assert chat.value.param == "messages[2].content[1]" and "messages[2].content[1]: " in str(chat.value)
    item: Any = {"type": "input_image", "image_url": picture_part(picture(1))["image_url"]["url"]}
    given: Any = [{"role": "user", "content": [item]}]
    with pytest.raises(openai.BadRequestError, match="a picture is given, and the base reads text") as other:
        local.client.responses.create(model="pydoc", input=given, stream=stream)
    assert other.value.param == "input[0].content[0]"
