"""Rows in the formats of OpenAI, TRL, ShareGPT, Alpaca and Dolly, read whole: nothing of them is lost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import Example, Message, RowError, ToolCall, make_raw_row
from ratchet.data.forms import read_conversation
from ratchet.data.validation import Checked, Origin, Validator

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def check(row: dict[str, Any], **settings: Any) -> Checked:
    line = json.dumps(row).encode()
    return Validator(PrepareConfig(**settings)).check(line, Origin("b", "jsonl"))


def read(row: dict[str, Any], **settings: Any) -> Example:
    return check(row, **settings).example


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


def called(name: str, arguments: str, id: str = "c") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


PLAIN = [("user", "q"), ("assistant", "a")]
BRIEF = [("system", "be brief"), *PLAIN]
SAME = {
    "a speaker's name": ({"messages": [Q | {"name": "ana"}, A]}, PLAIN),
    "parts of text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, PLAIN),
    "no refusal": ({"messages": [Q, A | {"refusal": None}]}, PLAIN),
    "a refusal": (
        {"messages": [Q, {"role": "assistant", "content": None, "refusal": "a"}]},
        PLAIN,
    ),
    "a developer": ({"messages": [{"role": "developer", "content": "be brief"}, Q, A]}, BRIEF),
    "an empty system message": ({"messages": [{"role": "system", "content": ""}, Q, A]}, PLAIN),
    "weight 1": ({"messages": [Q, A | {"weight": 1}]}, PLAIN),
    "a prompt beside its messages": ({"prompt": "q", "prompt_id": "0", "messages": [Q, A]}, PLAIN),
    "TRL's chats": ({"prompt": [Q], "completion": [A]}, PLAIN),
    "ShareGPT's system": (
        {
            "system": "be brief",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        BRIEF,
    ),
    "ShareGPT's weight": (
        {
            "conversations": [
                {"from": "human", "value": "q", "weight": None},
                {"from": "gpt", "value": "a", "weight": 1},
            ]
        },
        PLAIN,
    ),
    "Alpaca's history": (
        {"instruction": "q", "input": "", "output": "a", "system": "be brief", "history": [["b", "c"]]},
        [("system", "be brief"), ("user", "b"), ("assistant", "c"), *PLAIN],
    ),
    "Dolly": ({"instruction": "q", "context": "", "response": "a", "category": "qa"}, PLAIN),
    "Dolly with a context": (
        {"instruction": "q", "context": "c", "response": "a"},
        [("user", "q\n\nc"), ("assistant", "a")],
    ),
    "query and response": ({"query": "q", "response": "a"}, PLAIN),
    "a number": ({"prompt": "q", "completion": 0}, [("user", "q"), ("assistant", "0")]),
    "true": ({"question": "q", "answer": True}, [("user", "q"), ("assistant", "true")]),
    "code": (
        {"prompt": "q", "completion": "\n    return 1\n"},
        [("user", "q"), ("assistant", "    return 1")],
    ),
    "a legacy blank": ({"prompt": "q\n\n", "completion": " a"}, PLAIN),
}


@pytest.mark.parametrize("name", SAME)
def test_a_known_form_is_read_whole(name):
    row, wanted = SAME[name]
    assert turns(read(row, extra_keys=["category", "prompt_id"])) == wanted


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": [Q | {"name": "ana"}, A]}, "speaker_name"),
        ({"messages": [{"role": "system", "content": " "}, Q, A]}, "empty_system"),
        ({"prompt": "q", "completion": 1.5}, "value_as_text"),
        ({"messages": [Q, A, Q, A | {"weight": 0}]}, "unlearned_end"),
    ],
)
def test_what_is_read_otherwise_than_it_stands_there_is_counted(row, note):
    assert check(row).sanitised == (note,)


def test_an_answer_of_weight_0_stays_in_the_prompt_and_is_not_learned():
    row = read({"messages": [Q, {"role": "assistant", "content": "wrong", "weight": 0}, Q, A]})
    assert [message.learned for message in row.messages] == [True, False, True, True]
    plain = read({"messages": [Q, {"role": "assistant", "content": "wrong"}, Q, A]})
    assert row.id != plain.id and row.messages[1].content == "wrong"
    with pytest.raises(RowError, match="nothing is learned") as caught:
        read({"messages": [Q, A | {"weight": 0}]})
    assert caught.value.reason == "no_answer"
    with pytest.raises(RowError, match="wanted 0 or 1"):
        read({"messages": [Q, A | {"weight": 0.5}]})


def test_calls_of_tools_are_answers_and_their_results_are_asked():
    both = [called("look_up", '{"k": "b"}', "2"), called("look_up", '{"k": "a"}', "1")]
    row = read(
        {
            "messages": [
                Q,
                {"role": "assistant", "content": None, "tool_calls": both},
                {"role": "tool", "tool_call_id": "1", "content": "of a"},
                {"role": "tool", "tool_call_id": "2", "content": "of b"},
                A,
            ],
            "tools": [LOOK_UP],
            "parallel_tool_calls": False,
        }
    )
    assert row.tools == (LOOK_UP,)
    assert row.messages[1].tool_calls == (ToolCall("look_up", {"k": "b"}), ToolCall("look_up", {"k": "a"}))
    assert [message.content for message in row.messages[2:4]] == ["of b", "of a"]  # in the calls' order
    again = read(make_raw_row(row.messages, {}, row.tools))
    assert again == row


def test_a_row_may_end_with_a_call():
    row = read(
        {
            "messages": [Q, {"role": "assistant", "tool_calls": [called("look_up", '{"k": 1}')]}],
            "tools": [LOOK_UP],
        }
    )
    assert row.answer == '<tool_call>{"arguments": {"k": 1}, "name": "look_up"}</tool_call>'


def test_older_spellings_of_calls_give_the_same_row():
    wanted = read(
        {
            "messages": [Q, {"role": "assistant", "tool_calls": [called("look_up", '{"k": 1}')]}],
            "tools": [LOOK_UP],
        }
    )
    legacy = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "look_up", "arguments": '{"k": 1}'},
    }
    said = json.dumps({"name": "look_up", "arguments": {"k": 1}})
    for row in (
        {"messages": [Q, legacy], "functions": [LOOK_UP["function"]]},
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": said}],
            "tools": json.dumps([LOOK_UP["function"]]),
        },
    ):
        assert read(row).id == wanted.id


@pytest.mark.parametrize("content", ["a", "<think>\nhm\n</think>\n\na"])
def test_reasoning_is_kept_apart_from_the_answer(content):
    more = {} if "hm" in content else {"reasoning_content": "hm"}
    row = read({"messages": [Q, {"role": "assistant", "content": content, **more}]})
    assert row.messages[-1] == Message("assistant", "a", reasoning="hm")
    assert row.answer == "a" and row.id != read({"messages": [Q, A]}).id


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "<think>hm</think>a"},
        {"instruction": "q", "output": "<think>hm</think>a"},
        {"question": "q", "answer": "\n<think>\nhm\n</think>\n\na"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>hm</think>a"}]},
        {"prompt": "q", "chosen": "<think>hm</think>a", "rejected": "<think>hm</think>b"},
    ],
)
def test_a_block_before_an_answer_is_reasoning_in_every_form(row):
    assert read(row).messages == (Message("user", "q"), Message("assistant", "a", reasoning="hm"))


def test_a_block_that_begins_no_answer_is_text():
    """And text holds no control token, unless the settings say so."""
    for row in (
        {"prompt": "<think>x</think>q", "completion": "a"},
        {"prompt": "q", "completion": "a<think>"},
    ):
        with pytest.raises(RowError) as caught:
            read(row)
        assert caught.value.reason == "control_token"


PREFERENCES = (
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [Q], "chosen": [A], "rejected": [A | {"content": "b"}]},
    {"chosen": [Q, A], "rejected": [Q, A | {"content": "b"}]},
    {"prompt": "q", "chosen": [Q, A], "rejected": [Q, A | {"content": "b"}]},
    {
        "input": {"messages": [Q]},
        "preferred_output": [A],
        "non_preferred_output": [A | {"content": "b"}],
    },
)


@pytest.mark.parametrize("row", PREFERENCES)
def test_a_preference_holds_both_answers(row):
    found = read(row)
    assert turns(found) == PLAIN and found.rejected == Message("assistant", "b")
    assert found.id == read(PREFERENCES[0]).id != read({"prompt": "q", "completion": "a"}).id


def test_a_thumb_down_is_no_answer_to_learn():
    bad, good = (
        read_conversation({"prompt": "q", "completion": "a", "label": label}).example({})
        for label in (False, True)
    )
    assert (bad.desirable, good.desirable) == (False, True)
    assert bad.id != good.id == read({"prompt": "q", "completion": "a"}).id
    assert not read({"prompt": "q", "completion": "a", "label": False}).desirable


@pytest.mark.parametrize("key", ["system", "history", "tools", "rejected"])
def test_no_setting_makes_a_part_of_the_conversation_vanish(key):
    with pytest.raises(RowError, match=key) as caught:
        read({"question": "q", "answer": "a", key: "c"}, extra_keys=[key], unknown_keys="drop")
    assert caught.value.reason == "unknown_key"


def test_a_file_may_mix_forms_and_metadata_may_be_nested():
    line = json.dumps({"prompt": "q", "completion": "a", "metadata": {"a": {"b": 1}}}).encode()
    example = Validator(PrepareConfig()).check(line, Origin("b", "jsonl", form="messages")).example
    assert turns(example) == PLAIN and example.meta["a.b"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [Q, {"role": "assistant", "content": None}]}, "no_answer"),
        ({"messages": [Q | {"content": [{"type": "image_url", "image_url": {}}]}, A]}, "media"),
        ({"prompt": "other", "messages": [Q, A]}, "ambiguous"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "preference"),
        ({"prompt": "q", "chosen": "a"}, "no_answer"),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            "turn_order",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "q"},
                ]
            },
            "no_answer",
        ),
        ({"messages": [Q, A], "tools": "[{"}, "bad_tool"),
        ({"messages": [Q, A], "tools": "[" * 50_000}, "bad_tool"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": "[" * 50_000},
                ]
            },
            "bad_tool_call",
        ),
        ({"messages": [Q, A], "tools": [LOOK_UP, LOOK_UP]}, "bad_tool"),
        (
            {
                "messages": [
                    Q,
                    {"role": "assistant", "tool_calls": [called("look_up", "{}")]},
                    {"role": "tool", "tool_call_id": "x", "content": "r"},
                    A,
                ],
                "tools": [LOOK_UP],
            },
            "tool_results",
        ),
        (
            {
                "messages": [Q, {"role": "assistant", "tool_calls": [called("look_up", "{}")]}, Q, A],
                "tools": [LOOK_UP],
            },
            "turn_order",
        ),
        (
            {
                "messages": [
                    Q,
                    {
                        "role": "assistant",
                        "tool_calls": [called("look_up", '{"k": "\\u001b[31m AKIAIOSFODNN7EXAMPLQ"}')],
                    },
                ],
                "tools": [LOOK_UP],
            },
            "secret",
        ),
    ],
)
def test_what_cannot_be_learned_has_one_reason(row, reason):
    with pytest.raises(RowError) as caught:
        read(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("<s>old</s> [INST] <|im_end|>", {"control_tokens": "keep"}),
        ("\u2068عنوان\u2069", {"isolates": "keep"}),
    ],
)
def test_what_some_data_need_is_a_setting_and_kept_as_it_is(text, settings):
    row = {"prompt": "q", "completion": text}
    with pytest.raises(RowError, match=next(iter(settings))):
        read(row)
    assert read(row, **settings).answer == text
    with pytest.raises(RowError, match="direction"):
        read({"prompt": "q", "completion": "\u202e" + text}, **settings)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_system_message_may_repeat_itself_and_what_is_learned_may_not(role):
    texts = {"system": "s", "user": "q", "assistant": "a"} | {role: "Answer in one short sentence. " * 130}
    row = {"messages": [{"role": name, "content": text} for name, text in texts.items()]}
    if role == "system":
        assert read(row).messages[0].content.startswith("Answer in one")
    else:
        with pytest.raises(RowError, match="repeats itself") as caught:
            read(row)
        assert caught.value.reason == "loop"


def test_the_reader_alone_says_what_form_it_wants():
    with pytest.raises(RowError, match="`text` is missing"):
        read_conversation({"prompt": "q", "completion": "a"}, "text")
