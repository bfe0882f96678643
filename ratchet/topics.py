"""Which topics of a window grew: words that came into use, the rows that hold them, clustered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ratchet.regions import Topic, belongs
from ratchet.surprise import WORD, words_of

LEAST_ROWS, GROWTH, TERMS, EXAMPLES = 4, 4.0, 12, 3
LEAST_SHARE = 0.02  # of the window: what is smaller is noise to whoever reads it


def find_topics(window: Sequence[str], reference: Sequence[str], training: Sequence[str], *, most: int, seed: int) -> list[Topic]:
    """At most `most`, those that grew most first. Empty when no word came into use: the drift is then of another kind than new subjects."""
    terms = grown_terms(window, [*reference, *training])
    rows = [text for text in window if terms.keys() & set(words_of(text))]
    if not rows:
        return []
    groups = _cluster(rows, sorted(terms), most, seed)
    found = [_topic(group, rows, terms, window, reference) for group in groups]
    kept = [topic for topic in found if topic.terms and topic.share - topic.reference_share >= LEAST_SHARE]
    return sorted(kept, key=lambda topic: topic.reference_share - topic.share)[:most]


def grown_terms(window: Sequence[str], known: Sequence[str]) -> dict[str, float]:
    """Words of several window rows whose share of rows grew at least fourfold → by how much, smoothed."""
    inside = Counter(word for text in window for word in set(words_of(text)))
    before = Counter(word for text in known for word in set(words_of(text)))
    growth = {word: (count / len(window)) / ((before[word] + 1) / (len(known) + 2)) for word, count in inside.items()}
    return {word: growth[word] for word, count in inside.items() if count >= LEAST_ROWS and growth[word] >= GROWTH and not word.isdigit() and len(word) > 2}


def _cluster(rows: list[str], terms: list[str], most: int, seed: int) -> list[list[str]]:
    """Rows by the grown words that they share (TF-IDF, k-means)."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors: Any = TfidfVectorizer(token_pattern=WORD.pattern, vocabulary=terms).fit_transform(rows)
    distinct = len({tuple(row.indices) for row in vectors})
    count = max(1, min(most, len(rows) // 15, distinct))
    labels = KMeans(count, n_init=4, random_state=seed).fit_predict(vectors)
    return [[row for row, label in zip(rows, labels, strict=True) if label == number] for number in range(count)]


def _topic(group: list[str], rows: list[str], terms: dict[str, float], window: Sequence[str], reference: Sequence[str]) -> Topic:
    """Named by the words that are at home in this group: most rows that hold them are its own."""
    inside = Counter(word for text in group for word in set(words_of(text)) if word in terms)
    whole = Counter(word for text in rows for word in set(words_of(text)) if word in terms)
    own = [word for word, count in inside.items() if count >= 2 and 2 * count > whole[word]]
    chosen = sorted(own, key=lambda word: (-inside[word] * np.log(terms[word]), word))[:TERMS]
    topic = Topic(", ".join(chosen[:3]), chosen)
    share, before = (sum(belongs(topic, text) for text in texts) / max(1, len(texts)) for texts in (window, reference))
    best = sorted(dict.fromkeys(group), key=lambda text: (-len(set(chosen) & set(words_of(text))), text))[:EXAMPLES]
    return Topic(topic.name, chosen, share, before, best)
