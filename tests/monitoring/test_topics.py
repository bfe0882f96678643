"""Topics: words that grew beyond chance, rows that share them, names and examples that tell."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ratchet.monitoring.topics import belongs, find_topics, grown_terms
from ratchet.monitoring.verdicts import Topic

PLACES = ["file", "socket", "date", "thread", "parser", "queue", "signal", "buffer", "codec", "locale"]
VERBS = ["open", "close", "read", "write", "lock", "flush", "copy", "check"]


def known(count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [
        f"how to {chance.choice(VERBS)} the {chance.choice(PLACES)} number {chance.integers(10_000)}"
        for _ in range(count)
    ]


def about(words: list[str], count: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [
        f"how to {chance.choice(VERBS)} the {' '.join(chance.permutation(words)[:2])} number "
        f"{chance.integers(10_000)}"
        for _ in range(count)
    ]


BOAT, BREAD = ["rudder", "keel", "anchor"], ["dough", "yeast", "crust"]


def test_two_new_subjects_become_two_topics_that_keep_apart():
    window = [*known(200, 1), *about(BOAT, 40), *about(BREAD, 25)]
    topics = find_topics(window, known(400, 2), known(1000, 3), most=8, seed=0)
    assert len(topics) >= 2 and all(
        set(topic.terms) <= set(BOAT) or set(topic.terms) <= set(BREAD) for topic in topics
    ), topics
    assert topics[0].share > topics[-1].share or len(topics) == 1
    rows = [text for text in window if any(belongs(topic, text) for topic in topics)]
    assert set(rows) == {*about(BOAT, 40), *about(BREAD, 25)}


def test_a_topic_tells_its_shares_and_shows_rows_of_the_window():
    window = [*known(150, 1), *about(BOAT, 50)]
    topic = find_topics(window, known(400, 2), known(1000, 3), most=1, seed=0)[0]
    assert topic.share == pytest.approx(0.25) and topic.reference_share == 0.0
    assert (
        topic.name == ", ".join(topic.terms[:3])
        and len(topic.examples) == 3
        and set(topic.examples) <= set(about(BOAT, 50))
    )


def test_no_word_that_is_as_common_as_before_is_a_term():
    assert grown_terms(known(300, 1), known(2000, 2)) == {}
    assert find_topics(known(300, 1), known(400, 2), known(1000, 3), most=8, seed=0) == []


def test_a_known_word_that_grew_much_is_a_term_and_one_that_grew_little_is_none():
    before = [*known(1000, 1), *["a rare winch"] * 10]
    assert "winch" in grown_terms([*known(180, 2), *["the winch"] * 20], before)
    assert "winch" not in grown_terms([*known(197, 2), *["the winch"] * 3], before)


def test_numbers_and_short_words_are_no_terms():
    assert grown_terms(["12345 ab zebra"] * 10, known(500)).keys() == {"zebra"}


def test_the_same_window_gives_the_same_topics_and_they_travel_as_json():
    window = [*known(200, 1), *about(BOAT, 40), *about(BREAD, 25)]
    first, again = (find_topics(window, known(400, 2), known(1000, 3), most=3, seed=5) for _ in range(2))
    assert first == again
    assert msgspec.json.decode(msgspec.json.encode(first), type=list[Topic]) == first
