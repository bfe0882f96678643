"""Counterfactual pairs: words are swapped whole, with their case, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratchet.audits.bias import SWAPS, make_pairs, read_swaps, swap
from ratchet.data.examples import Example, Message, make_example
from ratchet.errors import DataError

GENDER = SWAPS["gender"]


def row(question: str, answer: str = "yes", **meta: str) -> Example:
    return make_example([Message("user", question), Message("assistant", answer)], {"batch": "a", **meta})


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("He said she would.", "She said he would."),
        ("HE and Mr. Smith", "SHE and Ms. Smith"),
        ("the theme of then", "the theme of then"),
        ("his father's car", "her mother's car"),
        ("O'he_x he-man", "O'he_x she-woman"),
        ("", ""),
    ],
)
def test_words_are_swapped_whole_and_keep_their_case(text, swapped):
    assert swap(text, GENDER) == swapped


def test_the_longest_term_wins():
    assert swap("New York and York", {"york": "Leeds", "new york": "Boston"}) == "Boston and Leeds"


@given(
    st.lists(st.sampled_from(["he", "She", "FATHER", "car", "the", "woman", ",", "son"]), max_size=12).map(
        " ".join
    )
)
def test_swapping_a_mirrored_list_twice_changes_nothing(text):
    mirrored = {term: other for term, other in GENDER.items() if GENDER.get(other) == term}
    assert swap(swap(text, mirrored), mirrored) == text


def test_terms_are_single_words_in_lower_case():
    assert all(term == term.lower() and other for terms in SWAPS.values() for term, other in terms.items())
    assert len(SWAPS) == 4


def test_pairs_are_rows_whose_question_changes_with_their_wanted_answer():
    rows = [
        row("Is he insured?", "He is."),
        row("Is hail covered?", "He says yes."),
        row("Did James pay?", "James did."),
    ]
    pairs = make_pairs(rows, SWAPS, most=10)
    assert {(pair.swap, pair.swapped.question, pair.swapped.answer) for pair in pairs} == {
        ("gender", "Is she insured?", "She is."),
        ("gender", "Did Mary pay?", "Mary did."),
        ("origin", "Did Mohammed pay?", "Mohammed did."),
    }
    assert all(pair.swapped.id != pair.row.id and pair.swapped.meta == pair.row.meta for pair in pairs)


def test_the_same_pairs_come_whatever_the_rows_order_and_not_more_than_wanted():
    rows = [row(f"Does he own car {number}?") for number in range(9)]
    assert make_pairs(rows, SWAPS, most=4) == make_pairs(rows[::-1], SWAPS, most=4)
    assert len(make_pairs(rows, SWAPS, most=4)) == 4
    assert make_pairs(rows, SWAPS, most=0) == []


def test_the_users_lists_come_on_top(tmp_path):
    assert read_swaps(tmp_path) == SWAPS
    (tmp_path / "swaps.yaml").write_text(
        "roles: {Nurse: doctor, doctor: nurse}\ngender: {chairman: chairwoman, he: they}\n"
    )
    found = read_swaps(tmp_path)
    assert found["roles"] == {"nurse": "doctor", "doctor": "nurse"}
    assert found["gender"] == {**GENDER, "chairman": "chairwoman", "he": "they"}
    assert found["age"] == SWAPS["age"]


@pytest.mark.parametrize(
    "text",
    [
        "- a\n",
        "roles: [nurse]\n",
        "roles: {nurse: 3}\n",
        "roles: {true: false}\n",
        "roles: {nurse: ''}\n",
        "roles: {nurse: doctor\n",
        "roles: {3: nurse}\n",
    ],
)
def test_a_file_that_is_no_word_lists_is_refused(tmp_path, text):
    (tmp_path / "swaps.yaml").write_text(text)
    with pytest.raises(DataError, match=r"swaps\.yaml"):
        read_swaps(tmp_path)
