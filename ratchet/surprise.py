"""How unlike its training rows a prompt is: columns of one number a prompt, larger where the champion has less to go by.

What tells new subjects best is not one number a row but the same rare word stems coming back in several rows of a window:
`Familiar.stems` gives those to `ratchet/drift.py`. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
WORD = re.compile(r"\w+")
PART = re.compile(r"_|(?<=[^\W\d_])(?=\d)")  # dtype_float64 → dtype, float, 64
SUFFIX = re.compile(r"(ations?|ings?|ers?|ed|es|ly|s|e|d)$")
COLUMNS = ("rarity", "unseen words", "word surprise", "5-gram surprise", "distance to the nearest row")
GRAM, NEAREST_BLOCK, CLUSTERS = 5, 500, 12


class Stems(NamedTuple):
    """Which rare stems each row holds: a sparse matrix (rows, stems) of 0 and 1, and each stem's weight (1 for one never seen in training)."""

    present: Any
    weights: Values


class Familiar:
    """Counts of the training rows. A few seconds for 20,000 of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        """`texts` are the training prompts. Raises ValueError for none."""
        if not texts:
            raise ValueError("no training row: nothing can be familiar")
        self.rows = len(texts)
        self.stem_rows = Counter(stem for text in texts for stem in set(stems_of(text)))
        self._words = Counter(word for text in texts for word in words_of(text))
        self._grams = Counter(gram for text in texts for gram in _grams(text))
        self._total = (self._words.total(), self._grams.total())
        self._texts = list(texts)
        self._nearest: Any = None
        self._clusters: Any = None
        self._known: dict[str, tuple[float, ...]] = {}  # what was measured before: reference rows come again
        self._stems: dict[str, frozenset[str]] = {}

    def columns(self, texts: Sequence[str]) -> dict[str, Values]:
        """rarity: mean over the row's stems of 1 / (1 + training rows that hold it); the others: nats a word, nats a 5-gram, 1 - cosine to the nearest training row."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for text, distance in zip(new, self._distances(new), strict=True):
            self._known[text] = (*self._measure(text), float(distance))
        values = np.array([self._known[text] for text in texts], dtype=np.float64).reshape(len(texts), len(COLUMNS))
        return {name: values[:, place] for place, name in enumerate(COLUMNS)}

    def _measure(self, text: str) -> tuple[float, ...]:
        """All but the distance."""
        found = words_of(text)
        return (
            _mean([1 / (1 + self.stem_rows[stem]) for stem in self._stems_of(text)]),
            _mean([float(word not in self._words) for word in found]),
            _mean([-math.log((self._words[word] + 1) / (self._total[0] + len(self._words) + 1)) for word in found]),
            _mean([-math.log((self._grams[gram] + 1) / (self._total[1] + len(self._grams) + 1)) for gram in _grams(text)]),
        )

    def _stems_of(self, text: str) -> frozenset[str]:
        if text not in self._stems:
            self._stems[text] = frozenset(stems_of(text))
        return self._stems[text]

    def stems(self, texts: Sequence[str]) -> Stems:
        """Of stems that at most two training rows hold and at least two of `texts`."""
        from scipy.sparse import csr_matrix

        held = [self._stems_of(text) for text in texts]
        counts = Counter(stem for row in held for stem in row)
        names = sorted(stem for stem, count in counts.items() if count >= 2 and self.stem_rows[stem] <= 2)
        place = {name: number for number, name in enumerate(names)}
        pairs = [(number, place[stem]) for number, row in enumerate(held) for stem in row if stem in place]
        rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
        present = csr_matrix((np.ones(len(pairs), dtype=np.float32), (list(rows), list(columns))), shape=(len(texts), len(names)))
        return Stems(present, np.array([1 / (1 + self.stem_rows[name]) for name in names]))

    def _distances(self, texts: Sequence[str]) -> Values:
        vectorizer, training = self._fit_nearest()
        blocks = [vectorizer.transform(texts[start : start + NEAREST_BLOCK]) @ training.T for start in range(0, len(texts), NEAREST_BLOCK)]
        return np.concatenate([1.0 - block.max(axis=1).toarray().ravel() for block in blocks]) if blocks else np.zeros(0)

    def clusters(self, texts: Sequence[str], *, seed: int) -> NDArray[np.int64]:
        """Number of the cluster of training rows that each text is nearest to (k-means on TF-IDF)."""
        from sklearn.cluster import MiniBatchKMeans

        vectorizer, training = self._fit_nearest()
        if self._clusters is None:
            count = min(self.rows, max(2, min(CLUSTERS, self.rows // 20)))
            self._clusters = MiniBatchKMeans(count, n_init=3, random_state=seed, batch_size=1024).fit(training)
        return np.asarray(self._clusters.predict(vectorizer.transform(texts)), dtype=np.int64)

    def _fit_nearest(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self._nearest is None:
            vectorizer = TfidfVectorizer(token_pattern=WORD.pattern, sublinear_tf=True)
            self._nearest = (vectorizer, vectorizer.fit_transform(self._texts))
        return self._nearest


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def stems_of(text: str) -> list[str]:
    """Words without their commonest English endings; numbers left out. Crude on purpose: other languages lose little by it."""
    parts = (part for word in words_of(text) for part in PART.split(word) if part and not part.isdigit())
    return [shorter if len(shorter := SUFFIX.sub("", part)) >= 3 else part for part in parts]


def _grams(text: str) -> list[str]:
    padded = f" {text.lower()} "
    return [padded[start : start + GRAM] for start in range(max(1, len(padded) - GRAM + 1))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
