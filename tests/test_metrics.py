"""Scores of one answer: known values, bounds, symmetry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

from ratchet.metrics import ROW_METRICS, chrf, exact_match, rouge_l, token_f1

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(st.sampled_from(["the", "cat", "sat", "Ünï", "!", "👍", "\n", "日本"]), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("answer", "reference", "score"), [("numpy.linalg", "numpy.linalg", 1), (" a  b\n", "a b", 1), ("A b", "a b", 0), ("", "", 1), ("", "a", 0), ("ab", "a b", 0)]
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
    assert chrf(answer, reference) == pytest.approx(CHRF(word_order=0, beta=2).corpus_score([answer], [[reference]]).score / 100, abs=1e-9)


@pytest.mark.parametrize("name", ROW_METRICS)
@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_a_score_lies_between_0_and_1(name, answer, reference):
    assert 0.0 <= ROW_METRICS[name](answer, reference) <= 1.0


@pytest.mark.parametrize("name", ROW_METRICS)
@settings(deadline=None, max_examples=60)
@given(text=TEXT.filter(str.strip))
def test_a_perfect_answer_scores_1(name, text):
    assert ROW_METRICS[name](text, text) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge_l"])
@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_swapping_answer_and_reference_changes_nothing(name, answer, reference):
    assert ROW_METRICS[name](answer, reference) == pytest.approx(ROW_METRICS[name](reference, answer))


@settings(deadline=None, max_examples=60)
@given(answer=TEXT, reference=TEXT)
def test_the_order_of_words_can_only_lower_the_score(answer, reference):
    assert rouge_l(answer, reference) <= token_f1(answer, reference) + 1e-12


def test_the_four_metrics_are_named():
    assert list(ROW_METRICS) == ["exact_match", "token_f1", "rouge_l", "chrf"]
