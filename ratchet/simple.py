"""A simple honest baseline: logistic regression on TF-IDF where answers are labels, the nearest question's answer elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ratchet.examples import Example

MIN_ROWS = 5  # of an answer, to count as a label


def simple_answers(train: Sequence[Example], rows: Sequence[Example]) -> list[str]:
    """An answer a row, learned from all training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2 if len(train) > 100 else 1)
    known = vectorizer.fit_transform([row.question for row in train])
    asked = vectorizer.transform([row.question for row in rows])
    counts = Counter(row.answer for row in train)
    labelled = [index for index, row in enumerate(train) if counts[row.answer] >= MIN_ROWS]
    if len(labelled) >= len(train) / 2 and len({train[index].answer for index in labelled}) > 1:
        return _by_regression(known[labelled], [train[index].answer for index in labelled], asked)
    return [train[index].answer for index in (asked @ known.T).toarray().argmax(axis=1)]


def _by_regression(known: object, answers: list[str], asked: object) -> list[str]:
    from sklearn.linear_model import LogisticRegression

    return [str(answer) for answer in LogisticRegression(C=10.0, max_iter=300).fit(known, answers).predict(asked)]
