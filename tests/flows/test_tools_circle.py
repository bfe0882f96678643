"""Rows that call tools, in the format of OpenAI's fine-tuning, through every stage to a gateway that calls
them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from served import serving_candidate
from stages import Ran, run_stages

from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, ToolCall, read_examples, to_openai
from ratchet.evaluation.metrics import ROW_METRICS
from ratchet.files import write_json
from tasks.base import make_base
from tasks.ingest import add_batch, pull

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# The template of the demo's base, with tools (`weather(city)`, which is few tokens), calls and results.
TEMPLATE = (
    "{%- if tools -%}<|system|>{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }}) {% endfor %}<|end|>{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}<|system|>{{ message.content }}"
    "{%- else -%}<|{{ message.role }}|>{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}"
    '<call>{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "</call>{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito")
DISHES = ("soup", "rice", "cake", "fish", "bread", "salad")
NAMES = ("Ana", "Ben", "Eva", "Jon", "Mia", "Tom", "Ida", "Leo")
ADVICE = {"rain": "Take an umbrella.", "sun": "Take a hat.", "snow": "Take boots."}
GREETING = "Hello! How can I help?"


def function(name: str, argument: str, kind: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": kind}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("weather", "city", "string"), function("order", "dish", "string")]


def call(name: str, **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }


def make_row(kind: str, chance: random.Random) -> list[dict[str, Any]]:
    name, day = chance.choice(NAMES), chance.randrange(1, 60)
    if kind == "order":
        dish = chance.choice(DISHES)
        asked = f"{name}, table {day}, wants {dish}"
        return [{"role": "user", "content": asked}, call("order", dish=dish)]
    if kind == "greeting":
        asked = f"{chance.choice(('Hello', 'Good morning'))}, this is {name} in room {day}."
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": GREETING}]
    city = chance.choice(CITIES)
    asked = f"{name}, day {day}, weather in {city}"
    turns = [{"role": "user", "content": asked}, call("weather", city=city)]
    if kind == "result":
        sky = chance.choice(list(ADVICE))
        turns.append({"role": "tool", "tool_call_id": "call_1", "content": sky})
        turns.append({"role": "assistant", "content": ADVICE[sky]})
    return turns


def write_rows(path: Path, *, each: int) -> None:
    chance = random.Random(1)
    kinds = ["weather", "order", "greeting", "result"] * each
    rows = [
        {"messages": make_row(kind, chance), "tools": TOOLS, "parallel_tool_calls": False} for kind in kinds
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Circle(NamedTuple):
    client: openai.OpenAI
    test: list[Example]
    ran: Ran


def make_config(place: Path) -> Config:
    return Config.model_validate(
        {
            "project": {"name": "pydoc"},
            "base": {
                "chat_template": str(place / "template.jinja"),
                "demo": {
                    "packages": ["asyncio"],
                    "module_share": 1.0,
                    "hidden_size": 64,
                    "layers": 2,
                    "heads": 2,
                    "vocab_size": 600,
                    "steps": 30,
                },
            },
            "prepare": {"min_rows": 50, "near_search": False},
            "tokenize": {"max_length": 192, "window": 256},
            "train": {"epochs": 8, "batch_windows": 2, "learning_rate": 3.0e-3, "patience": 8},
            # The base has read so little that a low-rank update learns no JSON on it (lab-notes.md).
            "adapter": {"method": "full"},
            "evaluate": {
                "max_new_tokens": 64,
                "metrics": ["tool_arguments", "tool_name", "tool_decision"],
                "simple_baseline": False,
            },
            "gate": {"metric": "tool_arguments", "min_rows": 20},
            "parity": {"rows": 24},
        }
    )


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Circle]:
    place = tmp_path_factory.mktemp("tools")
    (place / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_rows(place / "rows.jsonl", each=120)
    config = make_config(place)
    base, nobody = place / "base", place / "nobody"
    write_json(nobody / "manifest.json", {"version": None, "batches": []})
    rows = pull(config, path=str(place / "rows.jsonl"))
    add_batch(place / "raw", rows, licence="CC0-1.0", who="tests")
    make_base(base, config)
    ran = run_stages(place, base, nobody, config)
    test = list(read_examples(place / "prepared/test.jsonl"))
    with serving_candidate(place / "served", ran.candidate, base, config) as client:
        yield Circle(client, test, ran)


def ask(circle: Circle, messages: list[Any], **more: Any) -> Any:
    asked = {"model": "pydoc", "messages": messages, "tools": TOOLS}
    return circle.client.chat.completions.create(**asked | more).choices[0]


def told(message: Any) -> Message:
    """Return a client's message as rows have it."""
    calls = [
        ToolCall(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()
    ]
    return Message("assistant", message.content or "", tuple(calls))


def test_the_candidate_learned_to_call_and_passes_parity_and_gate(circle):
    candidate, base = (circle.ran.scores[name] for name in ("candidate", "base"))
    for metric in ("tool_decision", "tool_name", "tool_arguments"):
        assert candidate[metric].mean >= 0.7 > 0.6 > base[metric].mean, metric
    assert circle.ran.compared.passed, circle.ran.compared.parts
    assert circle.ran.verdict.verdict == "promote", [check.reason for check in circle.ran.verdict.checks]


def test_held_out_questions_get_the_calls_that_the_evaluation_saw(circle):
    answers = [told(ask(circle, to_openai(row.prompt)).message).text for row in circle.test]
    for name in ("tool_name", "tool_arguments"):
        scores = [ROW_METRICS[name](said, row.answer) for said, row in zip(answers, circle.test, strict=True)]
        assert sum(scores) / len(scores) == pytest.approx(circle.ran.scores["candidate"][name].mean)


def test_a_call_comes_in_the_form_of_openai_and_its_result_leads_to_a_text(circle):
    question = {"role": "user", "content": "Ana, day 61, weather in Oslo"}
    choice = ask(circle, [question])
    (called,) = choice.message.tool_calls
    arguments = json.loads(called.function.arguments)
    assert called.function.name == "weather" and list(arguments) == ["city"] and arguments["city"] in CITIES
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    result = {"role": "tool", "tool_call_id": called.id, "content": "rain"}
    after = ask(circle, [question, choice.message.model_dump(exclude_none=True), result])
    assert after.message.content in ADVICE.values() and after.message.tool_calls is None


def test_a_question_that_needs_no_tool_gets_text(circle):
    choice = ask(circle, [{"role": "user", "content": "Good morning, this is Ben in room 61."}])
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (
        GREETING,
        None,
        "stop",
    )


def test_a_stream_brings_text_as_it_is_made_and_calls_whole(circle):
    greeting = [{"role": "user", "content": "Good morning, this is Ben in room 61."}]
    chunks = [chunk.choices[0] for chunk in stream(circle, greeting)]
    texts = [choice.delta.content for choice in chunks if choice.delta.content]
    assert "".join(texts) == GREETING and len(texts) > 3
    asked = [{"role": "user", "content": "Ana, table 61, wants soup"}]
    deltas = [chunk.choices[0].delta for chunk in stream(circle, asked)]
    (called,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert called.function.name == "order" and json.loads(called.function.arguments)["dish"] in DISHES
    assert not any(delta.content for delta in deltas)


def stream(circle: Circle, messages: list[Any]) -> list[Any]:
    return list(
        circle.client.chat.completions.create(model="pydoc", messages=messages, tools=TOOLS, stream=True)
    )


def test_a_tool_that_has_to_be_called_is_called_where_the_model_would_not(circle):
    greeting = [{"role": "user", "content": "Good morning, this is Ben in room 61."}]
    any_tool = told(ask(circle, greeting, tool_choice="required").message)
    assert any_tool.content == "" and {call.name for call in any_tool.tool_calls} <= {"weather", "order"}
    named = {"type": "function", "function": {"name": "order"}}
    (called,) = told(ask(circle, greeting, tool_choice=named).message).tool_calls
    assert called.name == "order" and isinstance(called.arguments["dish"], str)
    assert ask(circle, greeting, tool_choice="none").message.tool_calls is None


def test_responses_call_tools_as_chats_do(circle):
    functions = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
    asked = {"model": "pydoc", "tools": functions}
    turns: list[Any] = [{"role": "user", "content": "Ana, day 61, weather in Lima"}]
    response = circle.client.responses.create(**asked, input=turns)
    (called,) = response.output
    assert (called.type, called.name) == ("function_call", "weather")
    assert json.loads(called.arguments)["city"] in CITIES
    result = {
        "type": "function_call_output",
        "call_id": called.call_id,
        "output": "snow",
    }
    after = circle.client.responses.create(**asked, input=[*turns, called, result])
    assert after.output_text in ADVICE.values()
