"""Preparation: every row is accounted for, splits stay, near duplicates stay together."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.config.data import PrepareConfig
from ratchet.data.batches import read_manifest, write_batch
from ratchet.data.dedup import Clusters, jaccard, shingle, split_by_hash
from ratchet.data.examples import Example, Message, counted_in, make_example, read_examples
from ratchet.data.mixture import read_undesirable
from ratchet.data.profile import SPLITS
from ratchet.errors import DataError
from tasks.prepare import Rejection, prepare

LENIENT = PrepareConfig(max_rejected_share=1.0, max_reason_share=1.0, max_leaked_share=1.0, min_rows=1)
NOWHERE = Path("no-such-golden-file.jsonl")


def row(question: str, answer: str = "yes", **meta: Any) -> bytes:
    return msgspec.json.encode({"prompt": question, "completion": answer, "meta": meta})


def questions(count: int, topic: str = "topic") -> list[str]:
    """Of 20 words each, no two alike."""
    return [" ".join(f"{topic}{index}word{position}" for position in range(20)) for index in range(count)]


def slightly_other(question: str) -> str:
    """One word more at the end: Jaccard 18/19 over word trigrams."""
    return f"{question} indeed"


def add(
    raw: Path,
    lines: list[bytes],
    *,
    month: int = 1,
    form: str = "auto",
    source: str = "jsonl",
    held_out: bool = False,
    like: str = "",
) -> str:
    return write_batch(
        raw,
        lines,
        source=source,
        label=f"month-{month}",
        time=f"2026-{month:02}-01T00:00:00Z",
        licence="CC0-1.0",
        who="tests",
        form=form,
        held_out=held_out,
        like=like,
    ).name


def ids(prepared: Path) -> dict[str, set[str]]:
    return {
        split: {example.id for example in read_examples(prepared / f"{split}.jsonl")}
        for split in (*SPLITS, "golden")
    }


def rejections(prepared: Path) -> list[Rejection]:
    return [
        msgspec.json.decode(line, type=Rejection)
        for line in (prepared / "rejected.jsonl").read_bytes().splitlines()
    ]


# --- every row is accounted for -----------------------------------------------------------------------------

BAD = {
    "invalid_json": [b"", b"{", b'{"prompt": "a"', b'{"prompt": "a", "completion": "b"} {}'],
    "invalid_utf8": [b"\xff", b'{"prompt": "a\xff", "completion": "b"}'],
    "lone_surrogate": [b'{"prompt": "\\ud800", "completion": "b"}'],
    "too_deep": [b"[" * 2000, b'{"meta": ' + b"[" * 16 + b"]" * 16 + b', "prompt": "a", "completion": "b"}'],
    "no_object": [b"null", b"[]", b'"text"', b"4"],
    "unknown_form": [b"{}", b'{"body": "a"}'],
    "unknown_key": [
        b'{"prompt": "a", "completion": "b", "sytem": "c"}',
        b'{"messages": [{"role": "user", "content": "a", "mood": 1}]}',
        b'{"prompt": "a", "completion": "b", "system": "c"}',
    ],
    "duplicate_key": [b'{"prompt": "a", "prompt": "b", "completion": "c"}'],
    "no_answer": [
        b'{"prompt": "a"}',
        b'{"prompt": "a", "completion": " "}',
        b'{"messages": [{"role": "user", "content": "a"}]}',
    ],
    "wrong_type": [
        b'{"prompt": "a", "completion": {"b": 4}}',
        b'{"messages": "a"}',
    ],
    "missing_key": [b'{"messages": [{"role": "user"}]}', b'{"prompt": null, "completion": "b"}'],
    "empty_content": [b'{"prompt": "", "completion": "b"}'],
    "empty_messages": [b'{"messages": []}'],
    "unknown_role": [b'{"messages": [{"role": "critic", "content": "a"}]}'],
    "turn_order": [
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
    ],
    "nul_character": [b'{"prompt": "a\\u0000b", "completion": "b"}'],
    "loop": [row("x" * 40_000)],
    "too_many_chars": [row(" ".join(map(str, range(12_000))))],
    "line_too_long": [row("x" * 2**20)],
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_rejected_with_its_reason_batch_and_line(tmp_path, reason):
    lines = [line for place, bad in enumerate(BAD[reason]) for line in (bad, row(f"good row {place}"))]
    batch = add(tmp_path / "raw", lines)
    prepare(
        tmp_path / "raw",
        NOWHERE,
        tmp_path / "out",
        LENIENT.model_copy(update={"test_share": 0, "validation_share": 0}),
    )
    assert [(found.batch, found.line, found.reason) for found in rejections(tmp_path / "out")] == [
        (batch, number, reason) for number in range(1, len(lines), 2)
    ]
    assert all(found.message for found in rejections(tmp_path / "out"))


GOOD = st.integers(0, 30).map(lambda number: row(questions(31)[number]))
NEAR = st.integers(0, 30).map(lambda number: row(slightly_other(questions(31)[number])))
ANY_ROW = st.one_of(
    GOOD,
    NEAR,
    st.sampled_from([line for reason, lines in BAD.items() if reason != "line_too_long" for line in lines]),
    st.binary(max_size=30).map(lambda text: text.replace(b"\n", b"")),
)


@settings(deadline=None, max_examples=40)
@given(
    batches=st.lists(st.lists(ANY_ROW, min_size=1, max_size=25), min_size=1, max_size=3),
    number=st.integers(0, 30),
)
def test_rows_in_are_rows_accepted_rejected_or_duplicate(tmp_path_factory, batches, number):
    folder = tmp_path_factory.mktemp("counts")
    names = [
        add(folder / "raw", [*lines, row(questions(31)[number])], month=month)
        for month, lines in enumerate(batches, start=1)
    ]
    try:
        profile = prepare(folder / "raw", NOWHERE, folder / "out", LENIENT)
    except DataError:  # all that was good went into validation and test
        assert not ids(folder / "out")["train"]
        return
    for name, lines in zip(names, batches, strict=True):
        counts = profile.batches[name]
        groups = (counts.accepted, counts.rejected, counts.duplicate)
        assert counts.rows == len(lines) + 1 == sum(group["rows"] for group in groups)
        assert counts.rejected["rows"] == sum(found.batch == name for found in rejections(folder / "out"))
        assert all(group["rows"] == sum(group.values()) / 2 for group in groups)
    written = ids(folder / "out")
    assert {split: len(written[split]) for split in SPLITS if written[split]} == {
        split: count for split, count in profile.total.accepted.items() if split in SPLITS
    }
    assert Counter(found.reason for found in rejections(folder / "out")) == {
        reason: count for reason, count in profile.total.rejected.items() if reason != "rows"
    }


def test_what_a_row_says_about_itself_is_kept_and_cannot_name_another_batch(tmp_path):
    name = add(
        tmp_path / "raw",
        [row("a question", kind="module", batch="golden", size=3, nested={"a": 1}, nothing=None)],
    )
    prepare(
        tmp_path / "raw",
        NOWHERE,
        tmp_path / "out",
        PrepareConfig(min_rows=1, test_share=0, validation_share=0),
    )
    (example,) = read_examples(tmp_path / "out/train.jsonl")
    assert example.meta == {"kind": "module", "size": 3, "nested.a": 1, "batch": name, "source": "jsonl"}


def test_numbers_that_no_file_can_hold_do_not_stop_a_preparation(tmp_path):
    huge = (
        b'{"prompt": "a question", "completion": "b", "meta": {"big": 123456789012345678901234567890, '
        b'"inf": 1e999, "negative": -99999999999999999999}}'
    )
    add(tmp_path / "raw", [huge, row("another question")])
    profile = prepare(
        tmp_path / "raw",
        NOWHERE,
        tmp_path / "out",
        PrepareConfig(min_rows=1, test_share=0, validation_share=0, max_rejected_share=1),
    )
    assert profile.total.rows == 2
    assert len(list(read_examples(tmp_path / "out/train.jsonl"))) == profile.total.accepted["train"]


def test_the_form_that_the_batch_names_is_the_one_that_is_read(tmp_path):
    line = msgspec.json.encode({"text": "plain text", "question": "one?", "answer": "two"})
    add(tmp_path / "raw", [line], form="text")
    prepare(
        tmp_path / "raw",
        NOWHERE,
        tmp_path / "out",
        PrepareConfig(min_rows=1, test_share=0, validation_share=0, extra_keys=["question", "answer"]),
    )
    (example,) = read_examples(tmp_path / "out/train.jsonl")
    assert example.answer == "plain text" and example.meta["question"] == "one?"


# --- splits stay --------------------------------------------------------------------------------------------


def test_no_row_moves_while_data_grow(tmp_path, raw, prepared, tiny_config):
    first = read_manifest(raw)[0]
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw/manifest.jsonl").write_bytes(msgspec.json.encode(first) + b"\n")
    prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", tiny_config.prepare)
    earlier, later = ids(tmp_path / "out"), ids(prepared)
    assert all(earlier[split] <= later[split] and len(earlier[split]) > 5 for split in SPLITS)
    assert sum(map(len, later.values())) > sum(map(len, earlier.values()))


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(40)), added=st.integers(1, 39))
def test_a_row_keeps_its_split_whatever_comes_after(order, added):
    rows = [question for original in questions(20) for question in (original, slightly_other(original))]
    examples = [example_of(rows[index]) for index in order]
    short, long = Clusters(LENIENT), Clusters(LENIENT)
    assert [short.place(example) for example in examples[:added]] == [
        long.place(example) for example in examples
    ][:added]


def example_of(question: str) -> Example:
    return make_example([Message("user", question), Message("assistant", "yes")], {})


def test_near_duplicates_never_straddle(prepared):
    """Of all pairs of real rows in different splits, none is near."""
    examples = {
        split: [shingle(example) for example in read_examples(prepared / f"{split}.jsonl")]
        for split in SPLITS
    }
    pairs = [
        (left, right)
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test"))
        for left in examples[one]
        for right in examples[other]
    ]
    assert len(pairs) > 10_000
    assert max(jaccard(left, right) for left, right in pairs) < PrepareConfig().near_duplicate


def test_a_near_duplicate_follows_the_first_of_its_kind_against_its_own_hash(tmp_path):
    config = LENIENT.model_copy(update={"test_share": 0.4, "validation_share": 0.4})
    pairs = [(question, slightly_other(question)) for question in questions(60)]
    add(tmp_path / "raw", [row(question) for pair in pairs for question in pair])
    prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", config)
    split_of = {
        example.question: split
        for split in SPLITS
        for example in read_examples(tmp_path / f"out/{split}.jsonl")
    }
    assert all(split_of[first] == split_of[second] for first, second in pairs)
    assert len({split_of[first] for first, _ in pairs}) == 3
    assert sum(split_by_hash(example_of(second).id, config) != split_of[second] for _, second in pairs) > 10


def test_a_row_between_two_splits_is_refused():
    """`a b` and `b c` are not near to each other, but both are to the row that joins them."""
    config = LENIENT.model_copy(update={"near_duplicate": 0.5, "test_share": 0.4, "validation_share": 0.4})
    straddling = 0
    for topic in range(20):
        words = [f"t{topic}w{position}" for position in range(41)]
        clusters = Clusters(config)
        left, right = (clusters.place(example_of(" ".join(part))).side for part in (words[:22], words[19:]))
        bridge = clusters.place(example_of(" ".join(words)))
        assert bridge.side == (left if left == right else "straddles")
        straddling += left != right
    assert straddling > 3


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.65, 0.8, 0.9, 1.0])
def test_near_pairs_are_found_at_any_threshold(threshold):
    """Pairs that are just near enough; the bands may miss one in 1,000."""
    clusters, found = Clusters(LENIENT.model_copy(update={"near_duplicate": threshold})), 0
    for topic in range(200):
        words = [f"t{topic}w{position}" for position in range(202)]
        clusters.place(example_of(" ".join(words)))
        found += (
            clusters.place(example_of(" ".join(words[: math.ceil(200 * threshold) + 2]))).near is not None
        )
    assert found >= 198


def test_shares_are_about_what_was_asked_for():
    found = Counter(
        split_by_hash(example_of(question).id, PrepareConfig(test_share=0.2, validation_share=0.1))
        for question in questions(2000)
    )
    assert found["test"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert found["validation"] / 2000 == pytest.approx(0.1, abs=0.03)


# --- the golden set -----------------------------------------------------------------------------------------


def test_golden_rows_and_their_near_duplicates_stay_out_of_every_split(tmp_path):
    golden, other = questions(20, "golden"), questions(20, "other")
    (tmp_path / "golden.jsonl").write_bytes(b"".join(row(question) + b"\n" for question in golden))
    add(tmp_path / "raw", [row(question) for question in [*golden, *map(slightly_other, golden), *other]])
    profile = prepare(tmp_path / "raw", tmp_path / "golden.jsonl", tmp_path / "out", LENIENT)
    asked = {
        split: {example.question for example in read_examples(tmp_path / f"out/{split}.jsonl")}
        for split in (*SPLITS, "golden")
    }
    assert asked["golden"] == set(golden)
    assert asked["train"] | asked["validation"] | asked["test"] == set(other)
    assert profile.golden == 20
    assert profile.total.duplicate == {"rows": 20, "exact": 20}
    assert profile.total.rejected == {"rows": 20, "near_golden": 20}


def test_a_golden_row_that_is_broken_is_named_with_its_line(tmp_path):
    add(tmp_path / "raw", [row("a question")])
    (tmp_path / "golden.jsonl").write_bytes(row("a question") + b"\n{\n")
    with pytest.raises(DataError, match=r"golden\.jsonl:2 \(invalid_json\)"):
        prepare(tmp_path / "raw", tmp_path / "golden.jsonl", tmp_path / "out", LENIENT)


def bad(question: str, answer: str = "no") -> bytes:
    return msgspec.json.encode({"prompt": question, "completion": answer, "label": False})


@pytest.mark.parametrize("near_search", [True, False])
def test_answers_not_to_give_stand_beside_the_split_of_their_prompt(tmp_path, near_search):
    asked = questions(60)
    add(tmp_path / "raw", [*map(bad, asked), bad("another question"), *map(row, asked), bad(asked[0])])
    config = LENIENT.model_copy(update={"near_search": near_search})
    profile = prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", config)

    found = {
        split: (
            {row.question for row in read_examples(tmp_path / f"out/{split}.jsonl")},
            {row.question for row in read_undesirable(tmp_path / "out", split)},
        )
        for split in SPLITS
    }
    assert [good == wrong - {"another question"} for good, wrong in found.values()] == [True] * 3
    assert sum(len(wrong) for _, wrong in found.values()) == 61, "nothing contradicts a bad answer"
    assert profile.total.duplicate["rows"] == 1
    assert profile.total.accepted["rows"] == 121
    assert all(row.desirable for split in SPLITS for row in read_examples(tmp_path / f"out/{split}.jsonl"))


def test_a_thumb_down_corrects_nobody(tmp_path):
    add(tmp_path / "raw", [row("why?", "so")])
    add(tmp_path / "raw", [bad("why?", "not so")], month=2, source="feedback")
    config = LENIENT.model_copy(update={"test_share": 0.0, "validation_share": 0.0})
    prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", config)
    assert [row.answer for row in read_examples(tmp_path / "out/train.jsonl")] == ["so"]
    assert [row.answer for row in read_undesirable(tmp_path / "out", "train")] == ["not so"]


def test_a_golden_row_is_a_right_answer(tmp_path):
    golden = tmp_path / "golden.jsonl"
    golden.write_bytes(bad("why?") + b"\n")
    add(tmp_path / "raw", [row("why not?")])
    with pytest.raises(DataError, match=r"golden\.jsonl:1: `label` is false"):
        prepare(tmp_path / "raw", golden, tmp_path / "out", LENIENT)


# --- what stops a preparation -------------------------------------------------------------------------------


def test_too_many_rejected_rows_are_named_with_their_count_reasons_and_first_line(tmp_path):
    add(tmp_path / "raw", [row(question) for question in questions(100)])
    name = add(tmp_path / "raw", [row("fine"), b"{", b"[]", row("fine too"), b"7"], month=2)
    with pytest.raises(DataError, match="3 of 5 rows") as caught:
        prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", PrepareConfig(min_rows=1))
    for part in (
        name,
        "invalid_json",
        "no_object",
        f"{name}:2: no valid JSON",
        "max_rejected_share",
        "rejected.jsonl",
    ):
        assert part in str(caught.value)
    assert len(rejections(tmp_path / "out")) == 3


def test_a_rejected_share_at_the_limit_passes(tmp_path):
    add(tmp_path / "raw", [b"{", *(row(question) for question in questions(19))])
    profile = prepare(
        tmp_path / "raw", NOWHERE, tmp_path / "out", PrepareConfig(min_rows=1, max_rejected_share=0.05)
    )
    assert profile.total.rejected["rows"] == 1


def test_too_few_training_rows_are_named_with_both_numbers(tmp_path):
    add(tmp_path / "raw", [row(question) for question in questions(30)])
    with pytest.raises(DataError, match=r"\d+ training rows are left of 30; `prepare.min_rows` is 200"):
        prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", PrepareConfig(min_rows=200))


def test_a_tampered_batch_stops_the_preparation_and_leaves_the_old_splits(tmp_path):
    name = add(tmp_path / "raw", [row(question) for question in questions(30)])
    prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", LENIENT)
    before = ids(tmp_path / "out")
    path = tmp_path / "raw" / name
    path.write_bytes(path.read_bytes().replace(b"yes", b"no!", 1))
    with pytest.raises(DataError, match="a batch is immutable"):
        prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", LENIENT)
    assert ids(tmp_path / "out") == before


def test_without_a_batch_there_is_nothing_to_prepare(tmp_path):
    with pytest.raises(DataError, match=r"(?s)holds no batch.*ratchet ingest"):
        prepare(tmp_path / "raw", NOWHERE, tmp_path / "out", LENIENT)
    assert not (tmp_path / "out").exists()


def test_the_same_batches_give_the_same_bytes(tmp_path, raw, prepared, tiny_config):
    prepare(raw, NOWHERE, tmp_path / "again", tiny_config.prepare)
    names = sorted(path.name for path in prepared.iterdir())
    assert names == [
        "golden.jsonl",
        "profile.html",
        "profile.json",
        "rejected.jsonl",
        "test.jsonl",
        "train.jsonl",
        "undesirable_test.jsonl",
        "undesirable_train.jsonl",
        "undesirable_validation.jsonl",
        "validation.jsonl",
    ]
    assert all((tmp_path / "again" / name).read_bytes() == (prepared / name).read_bytes() for name in names)


# --- held-out batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("near_search", [True, False])
def test_rows_of_a_held_out_batch_are_test_rows_and_change_no_training(tmp_path, near_search):
    config = LENIENT.model_copy(update={"near_search": near_search})
    raw, first = tmp_path / "raw", questions(200, "first")
    old = add(raw, [row(question) for question in first])
    prepare(raw, NOWHERE, tmp_path / "before", config)

    more = [row(question, part_of="a lie") for question in questions(60, "more")]
    name = add(raw, more, month=2, held_out=True, like=old)
    profile = prepare(raw, NOWHERE, tmp_path / "after", config)

    for split in ("train", "validation"):
        assert (tmp_path / f"after/{split}.jsonl").read_bytes() == (
            tmp_path / f"before/{split}.jsonl"
        ).read_bytes()
    new = [one for one in read_examples(tmp_path / "after/test.jsonl") if one.meta["batch"] == name]
    assert len(new) == 60 and {counted_in(one) for one in new} == {old}
    assert profile.batches[name].accepted == {"rows": 60, "test": 60}


def test_a_held_out_row_near_to_a_learned_one_is_its_duplicate_and_later_rows_follow_into_the_test(tmp_path):
    raw, first = tmp_path / "raw", questions(40, "first")
    add(raw, [row(question) for question in first])
    prepare(raw, NOWHERE, tmp_path / "before", LENIENT)
    sides = ids(tmp_path / "before")
    learned = next(one for one in first if make_row(one).id in sides["train"])
    tested = next(one for one in first if make_row(one).id in sides["test"])
    alone = questions(1, "alone")[0]
    held = add(
        raw,
        [row(slightly_other(learned)), row(slightly_other(tested)), row(alone), row(learned)],
        month=2,
        held_out=True,
    )
    add(raw, [row(slightly_other(alone))], month=3)

    profile = prepare(raw, NOWHERE, tmp_path / "after", LENIENT)

    counts = profile.batches[held]
    assert counts.accepted == {"rows": 2, "test": 2} and rejections(tmp_path / "after") == []
    assert counts.duplicate == {"rows": 2, "exact": 1, "near": 1}
    after = ids(tmp_path / "after")
    assert make_row(slightly_other(alone)).id in after["test"]
    assert after["train"] == sides["train"]


def make_row(question: str) -> Example:
    return make_example([Message("user", question), Message("assistant", "yes")], {})
