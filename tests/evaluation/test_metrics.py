"""Scores of one answer: known values, bounds, symmetry."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import Message, ToolCall
from ratchet.evaluation.metrics import (
    ROW_METRICS,
    bleu,
    chrf,
    exact_match,
    json_fields,
    json_valid,
    last_number,
    length,
    numeric_match,
    propose_metrics,
    refusal,
    regex_match,
    rouge_2,
    rouge_l,
    row_metrics,
    token_f1,
    tool_arguments,
    tool_decision,
    tool_name,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(["the", "cat", "sat", "Ünï", "!", "👍", "\n", "日本"]), max_size=12
).map(" ".join)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("numpy.linalg", "numpy.linalg", 1),
        (" a  b\n", "a b", 1),
        ("A b", "a b", 0),
        ("", "", 1),
        ("", "a", 0),
        ("ab", "a b", 0),
    ],
)
def test_exact_match_looks_through_blanks_alone(answer, reference, score):
    assert exact_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The Cat!", "the cat", 1.0),
        ("the cat", "the dog sat", 0.4),  # 1 in common: precision 1/2, recall 1/3
        ("a a a", "a", 0.5),  # as multisets: precision 1/3, recall 1
        ("sat cat the", "the cat sat", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("", "", 1.0),
        ("👍", "👎", 0.0),
        ("👍", "👍", 1.0),
    ],
)
def test_token_f1_is_what_a_hand_computes(answer, reference, score):
    assert token_f1(answer, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1: LCS 3 of 4
        ("the gunman kill police", "police killed the gunman", 0.5),  # the same, S3: LCS 2 of 4
        ("a b c d", "a c", 2 * 2 / 6),
        ("c b a", "a b c", 1 / 3),
        ("", "a", 0.0),
        ("", "", 1.0),
        ("+", "-", 0.0),
        ("+", "+", 1.0),
    ],
)
def test_rouge_l_is_what_a_hand_computes(answer, reference, score):
    assert rouge_l(answer, reference) == pytest.approx(score)


@settings(deadline=None, max_examples=50)
@given(answer=TEXT, reference=TEXT)
def test_chrf_is_sacrebleus(answer, reference):
    assert chrf(answer, reference) == pytest.approx(
        CHRF(word_order=0, beta=2).corpus_score([answer], [[reference]]).score / 100, abs=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(answer=TEXT.filter(str.strip), reference=TEXT.filter(str.strip))
def test_bleu_is_sacrebleus(answer, reference):
    assert bleu(answer, reference) == pytest.approx(
        min(1.0, BLEU(effective_order=True).sentence_score(answer, [reference]).score / 100), abs=1e-9
    )


def test_bleu_is_what_a_hand_computes():
    """In common are 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 fours; the lengths are equal."""
    assert bleu("the cat sat on a mat", "the cat sat on the mat") == pytest.approx(
        (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6
    )


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 1 / 3),  # one pair of three is common to both
        (
            "the gunman police killed",
            "police killed the gunman",
            2 / 3,
        ),  # Lin 2004, section 3.1: S3's order costs ROUGE-2 one pair
        ("a a a", "a a", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("one", "one", 1.0),
        ("one", "two", 0.0),
        ("one two", "one", 0.0),
    ],
)
def test_rouge_2_is_what_a_hand_computes(answer, reference, score):
    assert rouge_2(answer, reference) == pytest.approx(score)


@settings(deadline=None, max_examples=60)
@given(
    answer=st.lists(st.sampled_from("abc"), min_size=2, max_size=8),
    reference=st.lists(st.sampled_from("abc"), min_size=2, max_size=8),
)
def test_rouge_2_is_the_f1_of_pairs(answer, reference):
    left, right = (Counter(pairwise(side)) for side in (answer, reference))
    common = sum(min(left[pair], right[pair]) for pair in left)
    assert rouge_2(" ".join(answer), " ".join(reference)) == pytest.approx(
        2 * common / (sum(left.values()) + sum(right.values()))
    )


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": [1, 2.5e3, null]}', True),
        ("3", True),
        (' "text" \n', True),
        ("{'a': 1}", False),
        ('{"a": NaN}', False),
        ("", False),
        ('{"a": 1} and more', False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_valid_when_it_is_one_value_of_the_standard(answer, valid):
    assert json_valid(answer, "") == float(valid)


@settings(deadline=None, max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=6,
    )
)
def test_what_json_writes_is_valid(value):
    assert json_valid(json.dumps(value), "") == 1.0


@pytest.mark.parametrize(
    ("answer", "reference", "share"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ('{"a": 1, "b": 3}', '{"a": 1, "b": 2}', 0.5),
        ('{"a": 1}', '{"a": 1, "b": 2}', 0.5),
        ('{"a": 1, "b": 2, "c": 3}', '{"a": 1, "b": 2}', 2 / 3),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": {"x": [1, 2]}}', '{"a": {"x": [1, 2]}}', 1.0),
        ("{}", "{}", 1.0),
        ('{"a": 1', '{"a": 1}', 0.0),
        ("[1]", '{"a": 1}', 0.0),
        ("[1, 2]", "[1,2]", 1.0),
        ("no JSON", "no JSON", 1.0),
        ('{"a": 1}', "no JSON", 0.0),
    ],
)
def test_the_fields_of_json_objects_are_compared_one_by_one(answer, reference, share):
    assert json_fields(answer, reference) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,250.50 in all", 1250.5),
        ("-3", -3.0),
        ("2 plus 2 is 4.", 4.0),
        ("1e3", 1000.0),
        ("none", None),
        ("", None),
        ("9" * 400, 9.0e299),
        ("1e999", None),
    ],
)
def test_the_last_number_is_read(text, number):
    found = last_number(text)
    assert found == pytest.approx(number, rel=1) if number and number > 1e200 else found == number


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("so 12 + 6 = 18", "18", 1),
        ("18.0000001", "18", 1),
        ("18.1", "18", 0),
        ("1,000", "1000.00", 1),
        ("no idea", "18", 0),
        ("yes", "yes", 1),
        ("yes 3", "yes", 0),
        ("0", "0.0", 1),
    ],
)
def test_numbers_match_by_value(answer, reference, score):
    assert numeric_match(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry, no.", True),
        ("As an AI language model, I have no opinion.", True),
        ("I don't know.", True),
        ("Unfortunately, I cannot say.", True),
        ("I am not able to open files.", True),
        ("The customer said: I'm sorry.", False),
        ("Icann is an organisation.", False),
        ("", False),
    ],
)
def test_a_refusal_is_told_by_how_it_begins(answer, refused):
    assert refusal(answer, "whatever") == float(refused)


def test_a_pattern_has_to_fit_the_whole_answer():
    metric = regex_match(r"[A-Z]{2}-\d+")
    assert [metric(text, "") for text in (" AB-12\n", "AB-12 or so", "ab-12", "")] == [1.0, 0.0, 0.0, 0.0]
    assert regex_match("a.*b")("a\nb", "") == 1.0


def test_length_counts_words():
    assert [length(text, "") for text in ("", "one", "one, two  three!")] == [0.0, 1.0, 3.0]


def test_a_label_is_the_same_whatever_its_case_blanks_and_last_mark():
    assert [
        ROW_METRICS["accuracy"](text, "Refund  request")
        for text in ("refund request.", " REFUND REQUEST", "refund", "")
    ] == [1.0, 1.0, 0.0, 0.0]


def test_exact_match_is_always_among_the_scores_and_others_as_listed():
    assert list(row_metrics(EvaluateConfig(metrics=["chrf", "macro_f1"]))) == ["exact_match", "chrf"]
    assert list(row_metrics(EvaluateConfig(metrics=["regex_match", "bleu"], pattern="a+"))) == [
        "exact_match",
        "regex_match",
        "bleu",
    ]
    assert row_metrics(EvaluateConfig(metrics=["regex_match"], pattern="a+"))["regex_match"]("aa", "") == 1.0


@pytest.mark.parametrize("name", sorted(set(ROW_METRICS) - {"length"}))
@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_a_score_lies_between_0_and_1(name, answer, reference):
    assert 0.0 <= ROW_METRICS[name](answer, reference) <= 1.0


@pytest.mark.parametrize("name", sorted(set(ROW_METRICS) - {"length", "json_valid", "refusal"}))
@settings(deadline=None, max_examples=60)
@given(text=TEXT.filter(str.strip))
def test_a_perfect_answer_scores_1(name, text):
    assert ROW_METRICS[name](text, text) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "accuracy"])
@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_swapping_answer_and_reference_changes_nothing(name, answer, reference):
    assert ROW_METRICS[name](answer, reference) == pytest.approx(ROW_METRICS[name](reference, answer))


@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_the_order_of_words_can_only_lower_the_score(answer, reference):
    assert rouge_l(answer, reference) <= token_f1(answer, reference) + 1e-12


def calling(*calls: ToolCall, content: str = "") -> str:
    return Message("assistant", content, calls).text


FIND, OTHER = ToolCall("find", {"word": "a", "n": 1}), ToolCall("send", {})


@pytest.mark.parametrize(
    ("answer", "reference", "scores"),
    [
        (calling(FIND), calling(ToolCall("find", {"n": 1, "word": "a"})), (1, 1, 1)),
        (calling(FIND, OTHER), calling(OTHER, FIND), (1, 1, 1)),
        (calling(FIND, content="let me see"), calling(FIND), (1, 1, 1)),
        (calling(ToolCall("find", {"word": "b"})), calling(FIND), (1, 1, 0)),
        (calling(OTHER), calling(FIND), (1, 0, 0)),
        (calling(FIND), calling(FIND, FIND), (1, 0, 0)),
        ("it is a", calling(FIND), (0, 0, 0)),
        ('<tool_call>{"name": "find", "arguments": {</tool_call>', calling(FIND), (0, 0, 0)),
        (calling(FIND), "it is a", (0, 0, 0)),
        ("it is a", "it is b", (1, 1, 1)),
    ],
)
def test_calls_of_tools_are_compared_as_calls(answer, reference, scores):
    assert (
        tool_decision(answer, reference),
        tool_name(answer, reference),
        tool_arguments(answer, reference),
    ) == scores


@pytest.mark.parametrize(
    ("references", "first"),
    [
        ([calling(FIND), "it is a", calling(OTHER)], "tool_arguments"),
        ([f"{number} + 1\n#### {number + 1:,}" for number in range(995, 1005)], "numeric_match"),
        ([f'{{"covered": {flag}}}' for flag in ("true", "false")] * 5, "exact_match"),
        (["refund", "card lost"] * 10, "exact_match"),
        ([f"{number}" for number in range(20)], "numeric_match"),
        (
            [f"It is covered up to {n} euros a year where the policy says so" for n in range(9)],
            "rouge_l",
        ),
        ([f"city {number}" for number in range(9)], "exact_match"),
    ],
)
def test_a_metric_is_proposed_that_can_see_these_answers(references, first):
    found = propose_metrics(references)
    assert found.metrics[0] == first and found.why
    known = {*ROW_METRICS, "macro_f1"}
    assert known.issuperset(found.metrics)


def test_json_and_labels_bring_their_own_metrics_and_nothing_proposes_nothing():
    assert {"json_valid", "json_fields"} <= {*propose_metrics(['{"a": 1}'] * 9 + ["none"]).metrics}
    assert "macro_f1" in propose_metrics(["yes", "no"] * 9).metrics
    assert propose_metrics([]) is None
