"""Answer with a simple baseline: logistic regression on TF-IDF where answers are labels, otherwise the answer
of the nearest training question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ratchet.data.examples import Example

MIN_ROWS = 5  # rows that an answer needs to count as a label


def simple_answers(train: Sequence[Example], rows: Sequence[Example]) -> list[str]:
    """Return one answer per row, learned from all training rows."""
    known, asked = vectors([row.question for row in train], [row.question for row in rows])
    counts = Counter(row.answer for row in train)
    labelled = [index for index, row in enumerate(train) if counts[row.answer] >= MIN_ROWS]
    if len(labelled) >= len(train) / 2 and len({train[index].answer for index in labelled}) > 1:
        return _by_regression(known[labelled], [train[index].answer for index in labelled], asked)
    return [train[index].answer for index in (asked @ known.T).toarray().argmax(axis=1)]


def vectors(known: list[str], asked: list[str]) -> tuple[Any, Any]:
    """Return TF-IDF vectors of both lists, over words and pairs of words.

    Where the known texts yield no words, as in scripts without blanks, the vectors are over characters and
    pairs of them.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2 if len(known) > 100 else 1)
    try:
        return words.fit_transform(known), words.transform(asked)
    except ValueError:  # scikit-learn raises it for an empty vocabulary
        characters = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), analyzer="char")
        return characters.fit_transform(known), characters.transform(asked)


def _by_regression(known: Any, answers: list[str], asked: Any) -> list[str]:
    from sklearn.linear_model import LogisticRegression

    return [
        str(answer)
        for answer in LogisticRegression(C=10.0, max_iter=300, tol=3e-4).fit(known, answers).predict(asked)
    ]
