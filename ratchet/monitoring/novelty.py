"""Measure how much a prompt differs from the training rows, in columns of one number per prompt; larger is
less familiar.

New subjects are detected best not by one number per row, but by rare word stems that recur in several rows of
a window. `Familiar.stems` gives those to `ratchet/monitoring/drift.py`; docs/benchmarks.md has the figures.
In scripts without blanks between words, a pair of characters counts as a word.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ratchet.data.words import terms_of

Values = NDArray[np.float64]
PART = re.compile(r"_|(?<=[^\W\d_])(?=\d)")  # dtype_float64 → dtype, float, 64
SUFFIX = re.compile(r"(ations?|ings?|ers?|ed|es|ly|s|e|d)$")
COLUMNS = ("rarity", "unseen words", "word surprise", "5-gram surprise", "distance to the nearest row")
GRAM, RARE_ROWS = 5, 2  # a stem is rare when at most so many training rows hold it
NEAREST_ROWS, BLOCK = 20_000, 500  # training rows that are searched for the nearest; rows compared at once
SUBJECTS = 50  # dimensions of the latent semantic analysis


class Stems(NamedTuple):
    """The rare stems of each row: a sparse matrix (rows, stems) of 0 and 1, and the weight of each stem.

    A stem that was never seen in training has the weight 1.
    """

    present: Any
    weights: Values


class _Read(NamedTuple):
    """The measurements of one prompt; stems and words are given by their numbers."""

    columns: tuple[float, ...]
    stems: list[int]  # the rare ones
    words: list[int]
    subjects: NDArray[np.float32]


class Familiar:
    """Counts of the training rows. Building it takes a few seconds for 20,000 of them.

    Each prompt is measured once and kept, because the reference's prompts come again with every window.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """Count the stems, words and 5-grams of the training prompts. Raises ValueError without any."""
        if not texts:
            raise ValueError("no training row: nothing can be familiar")
        self.rows = len(texts)
        self.stem_rows = Counter(stem for text in texts for stem in set(stems_of(text)))
        self._words = _Surprise(Counter(word for text in texts for word in terms_of(text)))
        self._grams = _Surprise(Counter(gram for text in texts for gram in _grams(text)))
        self._space = _Space(texts, list(self._words.counts))
        self._read: dict[str, _Read] = {}
        self._stem_numbers: dict[str, int] = {}
        self._word_numbers: dict[str, int] = {}

    def columns(self, texts: Sequence[str]) -> dict[str, Values]:
        """Return the columns of COLUMNS by name, with one value per row.

        Rarity is the mean over the row's stems of 1 / (1 + training rows with the stem). The others, in their
        order, are a share, nats per word, nats per 5-gram, and 1 - cosine to the nearest training row.
        """
        values = np.array([row.columns for row in self._rows(texts)], dtype=np.float64).reshape(
            -1, len(COLUMNS)
        )
        return {name: values[:, place] for place, name in enumerate(COLUMNS)}

    def stems(self, texts: Sequence[str]) -> Stems:
        """Return which texts contain which stems.

        Only stems that are rare in training and occur in at least two of `texts` are included.
        """
        present = _sparse([row.stems for row in self._rows(texts)], len(self._stem_numbers))
        again = np.flatnonzero(np.asarray(present.sum(axis=0)).ravel() >= 2)
        weights = np.array([1 / (1 + self.stem_rows[stem]) for stem in self._stem_numbers])
        return Stems(present[:, again], weights[again])

    def words(self, texts: Sequence[str]) -> Any:
        """Return which words each row contains, as a sparse matrix (rows, words) of 0 and 1."""
        return _sparse([row.words for row in self._rows(texts)], len(self._word_numbers))

    def subjects(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the place of each row among the subjects of the training rows, of shape (rows, at most 50).

        The subjects come from latent semantic analysis (Deerwester et al. 1990).
        """
        return np.stack([row.subjects for row in self._rows(texts)])

    def _rows(self, texts: Sequence[str]) -> list[_Read]:
        """Return the measurements of each text; a new text is measured now."""
        new = [text for text in dict.fromkeys(texts) if text not in self._read]
        for text, distance, subjects in zip(new, *self._space.measure(new), strict=True):
            self._read[text] = _Read((*self._measure(text), float(distance)), *self._numbered(text), subjects)
        return [self._read[text] for text in texts]

    def _measure(self, text: str) -> tuple[float, ...]:
        """Compute all columns of one text except the distance."""
        found = terms_of(text)
        rarity = _mean([1 / (1 + self.stem_rows[stem]) for stem in set(stems_of(text))])
        unseen = _mean([float(word not in self._words.counts) for word in found])
        return rarity, unseen, self._words.mean(found), self._grams.mean(_grams(text))

    def _numbered(self, text: str) -> tuple[list[int], list[int]]:
        rare = sorted(stem for stem in set(stems_of(text)) if self.stem_rows[stem] <= RARE_ROWS)
        stems = [self._stem_numbers.setdefault(stem, len(self._stem_numbers)) for stem in rare]
        return stems, [
            self._word_numbers.setdefault(word, len(self._word_numbers))
            for word in sorted(set(terms_of(text)))
        ]


class _Surprise:
    """Negative log likelihood under counts, each raised by one, so that unseen tokens have one too."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        total = counts.total() + len(counts) + 1
        self._nats = {token: math.log(total / (count + 1)) for token, count in counts.items()}
        self._unseen = math.log(total)

    def mean(self, tokens: list[str]) -> float:
        return _mean([self._nats.get(token, self._unseen) for token in tokens])


class _Space:
    """TF-IDF of the training rows, to find the nearest row and the directions in which rows differ most."""

    def __init__(self, texts: Sequence[str], words: list[str]) -> None:
        self._texts: Sequence[str] = texts
        self._vocabulary = [
            *words,
            "",
            " ",
        ]  # no word is these two; TruncatedSVD wants two columns, whatever the rows hold
        self._fitted: Any = None

    def measure(self, texts: list[str]) -> tuple[Values, NDArray[np.float32]]:
        """Return, for all texts, (distances to the nearest training row, places among the subjects)."""
        if not texts:
            return np.zeros(0), np.zeros((0, SUBJECTS), dtype=np.float32)
        vectorizer, training, directions = self._fit()
        vectors = vectorizer.transform(texts)
        blocks = [
            (vectors[start : start + BLOCK] @ training.T).max(axis=1).toarray().ravel()
            for start in range(0, len(texts), BLOCK)
        ]
        subjects = np.asarray(vectors @ directions, dtype=np.float32)
        return 1.0 - np.concatenate(blocks), subjects / np.maximum(
            np.linalg.norm(subjects, axis=1, keepdims=True), 1e-6
        )

    def _fit(self) -> Any:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self._fitted is None:
            vectorizer = TfidfVectorizer(
                analyzer=terms_of, sublinear_tf=True, dtype=np.float32, vocabulary=self._vocabulary
            )
            vectors = vectorizer.fit_transform(self._texts)
            kept = vectors[:: -(-vectors.shape[0] // NEAREST_ROWS)]
            with np.errstate(divide="ignore", invalid="ignore"):  # where all rows are equal
                directions = (
                    TruncatedSVD(min(SUBJECTS, vectors.shape[1]), n_iter=2, random_state=0)
                    .fit(kept)
                    .components_.T
                )
            self._fitted, self._texts = (vectorizer, kept, directions), ()
        return self._fitted


def stems_of(text: str) -> list[str]:
    """List the words of a text without the most common English endings; numbers are left out.

    The rule is deliberately crude, and other languages lose little by it.
    """
    parts = (part for word in terms_of(text) for part in PART.split(word) if part and not part.isdigit())
    return [shorter if len(shorter := SUFFIX.sub("", part)) >= 3 else part for part in parts]


def _grams(text: str) -> list[str]:
    padded = f" {text.lower()} "
    return [padded[start : start + GRAM] for start in range(max(1, len(padded) - GRAM + 1))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _sparse(rows: list[list[int]], columns: int) -> Any:
    from scipy.sparse import csr_matrix

    ends = np.cumsum([0, *map(len, rows)])
    numbers = [number for row in rows for number in row]
    return csr_matrix(
        (np.ones(len(numbers), dtype=np.float32), np.array(numbers, dtype=np.int32), ends),
        shape=(len(rows), columns),
    )
