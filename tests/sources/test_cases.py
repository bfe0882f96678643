"""Files in the forms that people have, each with what becomes of it (`tests/sources/cases`).

All files hold the same questions, so an entry names only what is particular to its file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.erasure import Forgotten
from ratchet.data.examples import Example, Message, ToolCall, normalise
from ratchet.data.text import clean
from ratchet.data.validation import Origin
from ratchet.errors import DataError
from tasks.ingest import pull
from tasks.prepare import Incoming, Rejection, sort_batches

CASES = Path(__file__).with_name("cases")
ALL_TO_TRAIN = {"test_share": 0.0, "validation_share": 0.0, "min_rows": 1}
ASKED = "marsh366 north597 basin913 inlet929 pearl223 grove516 tidal142 ember288 haven143"
QUESTION, ANSWER = Message("user", ASKED), Message("assistant", "answer 0")
PLAIN = (QUESTION, ANSWER)
BRIEF = Message("system", "be brief")
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "d",
        "parameters": {"type": "object", "properties": {"k": {"type": "string"}}},
    },
}


def asked(more: str, *, before: str = "") -> Message:
    return Message("user", f"{before}{ASKED}{more}")


def said(text: str, *, reasoning: str = "", learned: bool = True) -> Message:
    return Message("assistant", text, reasoning=reasoning, learned=learned)


# File → the messages of its first row.
READ: dict[str, tuple[Message, ...]] = {
    "alpaca-empty-input.jsonl": PLAIN,
    "alpaca-history.jsonl": (BRIEF, Message("user", "a"), said("b"), *PLAIN),
    "alpaca-null-input.jsonl": PLAIN,
    "array-pretty.json": PLAIN,
    "array.json": PLAIN,
    "bom.jsonl": PLAIN,
    "bool-answer.jsonl": (QUESTION, said("true")),
    "columns.json": PLAIN,
    "crlf.jsonl": PLAIN,
    "data-key.json": PLAIN,
    "dolly.jsonl": PLAIN,
    "emoji.jsonl": (asked(" 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️"), said("👍🏽 0")),
    "emptysys.jsonl": PLAIN,
    "gsm8k.jsonl": (QUESTION, said("3 + 0\n#### 3")),
    "hindi-zwj.jsonl": (asked(" क्‍ष और क्‌ष हिन्दी"), said("हाँ 0")),
    "leading-indent.jsonl": (QUESTION, said("    return 0")),
    "mixed-forms.jsonl": PLAIN,
    "nested-meta.jsonl": PLAIN,
    "numbers-as-answers.jsonl": (QUESTION, said("0")),
    "oai-developer.jsonl": (BRIEF, *PLAIN),
    "oai-name.jsonl": PLAIN,
    "oai-parts.jsonl": PLAIN,
    "oai-preference.jsonl": (QUESTION, said("x")),
    "oai-reasoning.jsonl": (QUESTION, said("answer 0", reasoning="hm")),
    "oai-refusal.jsonl": PLAIN,
    "oai-think-in-content.jsonl": (QUESTION, said("answer 0", reasoning="hm 0")),
    "oai-tools-unused.jsonl": PLAIN,
    "oai-tools.jsonl": (
        QUESTION,
        Message("assistant", "", (ToolCall("look_up", {}),)),
        Message("tool", "r"),
        ANSWER,
    ),
    "oai-weight.jsonl": (
        QUESTION,
        said("wrong", learned=False),
        Message(
            "user", "again ember819 ocean112 shore545 fjord124 marsh82 ledge754 quarry466 grove269 inlet49"
        ),
        ANSWER,
    ),
    "oai-weight1.jsonl": PLAIN,
    "oasst-text.jsonl": (
        Message("user", "Continue."),
        said(f"### Human: {ASKED}### Assistant: answer 0"),
    ),
    "openai-legacy.jsonl": (asked("\n\n###"), said("answer 0 END")),
    "persian-zwnj.jsonl": (asked(" را ببینم", before="می‌خواهم کتاب‌های "), said("می‌شود 0")),
    "plain.jsonl.gz": PLAIN,
    "pretty-objects.json": PLAIN,
    "prompt-and-messages.jsonl": PLAIN,
    "queryresponse.jsonl": PLAIN,
    "rows.arrow": PLAIN,
    "rows.csv": PLAIN,
    "rows.parquet": PLAIN,
    "rows.tsv": PLAIN,
    "rtl.jsonl": (asked(" مرحبا \u200fabc\u200e שלום"), said("نعم 0")),
    "sharegpt-id.jsonl": PLAIN,
    "sharegpt-system-key.jsonl": (BRIEF, *PLAIN),
    "sharegpt-weight.jsonl": PLAIN,
    "sharegpt.jsonl": (BRIEF, *PLAIN),
    "trl-dpo-chat.jsonl": (QUESTION, said("x")),
    "trl-dpo.jsonl": (QUESTION, said("x")),
    "trl-kto.jsonl": PLAIN,
    "trl-promptcompletion-chat.jsonl": PLAIN,
    "u2028.jsonl": (asked("\ntwo"), ANSWER),
}
# File → the reason of each of its rows.
REJECTED = {
    "bidi-isolate.jsonl": "bidi_override",
    "duplicate-keys.jsonl": "duplicate_key",
    "endsuser.jsonl": "no_answer",
    "html.jsonl": "control_token",
    "inst-in-code.jsonl": "control_token",
    "latin1.jsonl": "invalid_utf8",
    "nan.jsonl": "not_finite",
    "oai-image.jsonl": "media_type",
    "oai-null.jsonl": "no_answer",
    "sharegpt-endhuman.jsonl": "no_answer",
    "sharegpt-gptfirst.jsonl": "turn_order",
    "sharegpt-tool.jsonl": "bad_tool_call",  # calls without a name
    "sysmid.jsonl": "turn_order",
    "twouser.jsonl": "turn_order",
}
# File → why it is refused as a whole.
REFUSED = {
    "blank.jsonl": "gave no rows",
    "empty.jsonl": "gave no rows",
    "cr.jsonl": "carriage return alone, wanted a line feed",
    "utf16.jsonl": "is UTF-16, wanted UTF-8",
}
# File → setting of `prepare` that takes its rows, and what their texts then still contain.
KEPT = {
    "bidi-isolate.jsonl": ("isolates", "keep", "\u2068عنوان\u2069"),
    "html.jsonl": ("control_tokens", "keep", "<s>old</s>"),
    "inst-in-code.jsonl": ("control_tokens", "keep", "print('[INST]')"),
}


def read_rows(name: str, **settings: object) -> list[Example | Rejection]:
    """Read and check a file as an ingest and the stage `prepare` do."""
    pulled = pull(Config(), path=str(CASES / name))
    found: list[Example | Rejection] = []
    sort_batches(
        [Incoming(Origin(name, pulled.source, pulled.form), len(pulled.lines), enumerate(pulled.lines, 1))],
        Path("/dev/null"),
        PrepareConfig.model_validate({**ALL_TO_TRAIN, **settings}),
        Forgotten(),
        lambda _, row: found.append(row),
    )
    return found


def test_every_file_is_in_one_table() -> None:
    tables = [*READ, *REJECTED, *REFUSED, "none-rows.jsonl"]
    assert sorted(tables) == sorted(path.name for path in CASES.iterdir())


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_whole(name: str) -> None:
    rows = read_rows(name)
    first, examples = rows[0], [row for row in rows if isinstance(row, Example)]
    assert isinstance(first, Example) and first.messages == READ[name]
    assert len(examples) == len(rows) >= 3
    assert first.rejected == (said("y") if "dpo" in name or "preference" in name else None)
    assert list(first.tools) == ([LOOK_UP] if "tools" in name else [])
    assert sum(not row.desirable for row in examples) == (3 if "kto" in name else 0)


@pytest.mark.parametrize("name", REJECTED)
def test_the_one_reason_that_counts_is_told(name: str) -> None:
    rows = read_rows(name)
    assert [getattr(row, "reason", "") for row in rows] == [REJECTED[name]] * len(rows)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_readable_rows_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=REFUSED[name]):
        read_rows(name)


def test_lines_that_are_no_rows_are_counted_and_the_others_read() -> None:
    first, *others = read_rows("none-rows.jsonl")
    assert isinstance(first, Rejection) and first.reason == "no_object"
    assert all(isinstance(row, Example) for row in others) and len(others) == 5


@pytest.mark.parametrize("name", KEPT)
def test_a_setting_keeps_what_is_rejected_otherwise(name: str) -> None:
    key, value, text = KEPT[name]
    first = read_rows(name, **{key: value})[0]
    assert isinstance(first, Example)
    assert text in f"{first.question} {first.answer}"


def test_blanks_at_the_ends_are_stripped_and_counted_and_an_indent_is_kept() -> None:
    counts: Counter[str] = Counter()
    text = clean("\n    return 1\n", counts)
    assert normalise(text) == "    return 1" and counts == {"outer_blanks": 1}
    assert clean("    return 1", counts) == "    return 1" and counts == {"outer_blanks": 1}
