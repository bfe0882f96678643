"""Rows of every outer form become the one inner form, or are refused with a reason that can be counted."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.data.examples import (
    Example,
    Message,
    RowError,
    encode_line,
    example_id,
    make_example,
    normalise,
    read_examples,
)
from ratchet.data.forms import FORMS, read_conversation, recognise_form
from ratchet.errors import DataError

U, A, S = "user", "assistant", "system"
ROWS = {
    "messages": (
        {"messages": [{"role": S, "content": "s"}, {"role": U, "content": "q"}, {"role": A, "content": "a"}]},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    "completion": ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")]),
    "instruction": ({"instruction": "q", "input": "more", "output": "a"}, [(U, "q\n\nmore"), (A, "a")]),
    "question": ({"question": "q", "answer": "a"}, [(U, "q"), (A, "a")]),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [(U, "q"), (A, "a")]),
    "text": ({"text": "a"}, [(U, "Continue."), (A, "a")]),
}


def conversation(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]


def reason(row: dict) -> str:
    with pytest.raises(RowError) as caught:
        read_conversation(row).example({})
    assert str(caught.value)
    return caught.value.reason


# --- outer forms --------------------------------------------------------------------------------------------


def test_a_run_of_combining_marks_is_refused_before_it_is_put_in_order():
    """NFC would take minutes for a megabyte of it."""
    with pytest.raises(RowError, match="more than 32 combining marks"):
        make_example([Message("user", "a" + "\u0301\u0327" * 100_000), Message("assistant", "b")], {})
    assert (
        make_example(
            [Message("user", "Zalgo a" + "\u0301" * 20), Message("assistant", "tiếng Việt")], {}
        ).answer
        == "tiếng Việt"
    )


def test_every_form_has_a_row_here():
    assert set(ROWS) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised_by_its_keys(form):
    assert recognise_form(ROWS[form][0]) == form


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_messages(form):
    row, turns = ROWS[form]
    example = read_conversation(row, form).example({"batch": "b"})
    assert [(message.role, message.content) for message in example.messages] == turns
    assert example.answer == "a"
    assert example.question == turns[-2][1]
    assert [(message.role, message.content) for message in example.prompt] == turns[:-1]
    assert example.meta == {"batch": "b"}


@pytest.mark.parametrize("nothing", ["", None])
def test_an_instruction_without_input_is_the_question_alone(nothing):
    assert read_conversation({"instruction": "q", "input": nothing, "output": "a"}).messages[0].content == "q"


def test_the_same_conversation_has_the_same_id_in_every_form():
    ids = {read_conversation(ROWS[form][0], form).example({}).id for form in ("completion", "question")}
    ids.add(read_conversation({"instruction": "q", "output": "a"}).example({"other": 1}).id)
    assert len(ids) == 1


def test_keys_that_fit_no_form_are_named():
    with pytest.raises(RowError, match=r"\['body', 'title'\] fit no form; wanted `messages`") as caught:
        recognise_form({"title": "t", "body": "b"})
    assert caught.value.reason == "unknown_form"


# --- refused rows -------------------------------------------------------------------------------------------


def messages(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


REFUSED = {
    "no_answer": {
        "the last turn is the user's": messages((U, "q")),
        "only a system message": messages((S, "s")),
        "no completion": {"prompt": "q"},
        "no output": {"instruction": "q", "input": "more"},
        "no answer key": {"question": "q"},
        "empty answer": messages((U, "q"), (A, "")),
        "blank answer": messages((U, "q"), (A, " \n\t\u3000")),
        "blank completion": {"prompt": "q", "completion": "\r\n"},
    },
    "empty_content": {
        "empty question": messages((U, ""), (A, "a")),
    },
    "empty_messages": {"no message": {"messages": []}, "no turn": {"conversations": []}},
    "unknown_role": {
        "capital": messages(("User", "q"), (A, "a")),
        "sharegpt": {"conversations": [{"from": "bing", "value": "q"}]},
    },
    "turn_order": {
        "two users in a row": messages((U, "q"), (U, "q2"), (A, "a")),
        "two answers in a row": messages((U, "q"), (A, "a"), (A, "a2")),
        "assistant first": messages((A, "a"), (U, "q"), (A, "a")),
        "assistant after system": messages((S, "s"), (A, "a")),
        "a tool's result without a call": messages((U, "q"), ("tool", "t"), (A, "a")),
        "system not first": messages((U, "q"), (S, "s"), (A, "a")),
        "two system messages": messages((S, "s"), (S, "s"), (U, "q"), (A, "a")),
    },
    "wrong_type": {
        "messages a string": {"messages": "q and a"},
        "messages null": {"messages": None},
        "a turn that is text": {"messages": ["q"]},
        "a turn that is null": {"messages": [None]},
        "a part without text": {"messages": [{"role": U, "content": [{"type": "text"}]}]},
        "conversations a mapping": {"conversations": {}},
        "an object for an answer": {"question": "q", "answer": {"a": 4}},
        "input a list": {"instruction": "q", "input": ["x"], "output": "a"},
    },
    "missing_key": {
        "no content": {"messages": [{"role": U}]},
        "content null": {"messages": [{"role": U, "content": None}]},
        "no value": {"conversations": [{"from": "human"}]},
    },
    "invalid_unicode": {
        "lone surrogate in the answer": messages((U, "q"), (A, "a\ud800")),
        "in the question": messages((U, "\udfff q"), (A, "a")),
    },
    "nul_character": {"NUL": messages((U, "q\x00r"), (A, "a"))},
}
CASES = [
    pytest.param(row, code, id=f"{code}: {name}")
    for code, rows in REFUSED.items()
    for name, row in rows.items()
]


@pytest.mark.parametrize(("row", "code"), CASES)
def test_a_row_that_teaches_nothing_is_refused_with_its_reason(row, code):
    assert reason(row) == code


def test_the_message_of_a_refused_role_names_the_known_ones():
    with pytest.raises(RowError, match="role 'bot'; known: system, user, assistant"):
        make_example(conversation((U, "q"), ("bot", "a")), {})


# --- identity -----------------------------------------------------------------------------------------------

LINE_ENDS = ["\n", "\r\n", "\r", "\u2028", "\u2029", "\u0085"]


@pytest.mark.parametrize("end", LINE_ENDS)
def test_the_id_does_not_depend_on_line_ends(end):
    assert make_example(conversation((U, f"q{end}more"), (A, f"a{end}")), {}) == make_example(
        conversation((U, "q\nmore"), (A, "a")), {}
    )


def test_the_id_does_not_depend_on_the_unicode_form():
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert example_id(conversation((U, composed), (A, "a"))) == example_id(
        conversation((U, decomposed), (A, "a"))
    )
    assert make_example(conversation((U, decomposed), (A, "a")), {}).question == composed


def test_the_id_does_not_depend_on_meta():
    assert (
        make_example(conversation((U, "q"), (A, "a")), {"batch": "1"}).id
        == make_example(conversation((U, "q"), (A, "a")), {"batch": "2"}).id
    )


def test_the_id_differs_with_roles_contents_order_and_borders():
    different = [
        conversation((U, "q"), (A, "a")),
        conversation((U, "q"), (A, "A")),
        conversation((U, "Q"), (A, "a")),
        conversation((U, "a"), (A, "q")),
        conversation((S, "q"), (A, "a")),
        conversation((U, "q"), (U, "a")),
        conversation((U, "qa"), (A, "")),
        conversation((U, "q"), (A, "a"), (U, "q"), (A, "a")),
        conversation((U, "q  q"), (A, "a")),
        conversation((U, 'q"],["assistant","a'), (A, "a")),
    ]
    ids = [example_id(turns) for turns in different]
    assert len(set(ids)) == len(different)
    assert all(len(found) == 32 and set(found) <= set("0123456789abcdef") for found in ids)


def test_the_id_stays_the_same_from_release_to_release():
    """Another hash would make each earlier row a new one, and move it between training and test."""
    assert example_id(conversation((U, "q"), (A, "a"))) == "51f9ab4b6bfb2650450c1d415be510a1"


VALID_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(VALID_TEXT)
def test_normalising_twice_is_normalising_once(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not set(once) & {"\r", "\u2028", "\u2029", "\u0085"}


# --- files --------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | VALID_TEXT
)
EXAMPLES = st.builds(
    Example,
    id=VALID_TEXT,
    messages=st.lists(st.builds(Message, role=VALID_TEXT, content=VALID_TEXT), max_size=4).map(tuple),
    meta=st.dictionaries(VALID_TEXT, SCALARS, max_size=4),
)


@settings(deadline=None)
@given(st.lists(EXAMPLES, max_size=4))
def test_what_is_written_is_read_back_equal(tmp_path_factory, examples):
    path = tmp_path_factory.getbasetemp() / "examples.jsonl"
    path.write_bytes(b"".join(map(encode_line, examples)))
    assert list(read_examples(path)) == examples


def test_separators_of_unicode_do_not_cut_a_row(tmp_path):
    example = Example("1", (Message(U, "one\u2028two\u2029three\u0085four\x0bfive"), Message(A, "a")), {})
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode_line(example) + encode_line(example))
    assert list(read_examples(path)) == [example, example]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"id": "1"}',
        b'{"id": 1, "messages": [], "meta": {}}',
        b'{"id": "\xff", "messages": [], "meta": {}}',
    ],
)
def test_a_line_that_is_no_example_is_named_with_its_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode_line(Example("1", (), {})) + line + b"\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2 is no example"):
        list(read_examples(path))


def test_an_unknown_key_inside_a_message_is_no_example(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"id": "1", "messages": [{"role": U, "content": "q", "weight": 0}], "meta": {}})
    )
    with pytest.raises(DataError, match="weight"):
        list(read_examples(path))
