"""Agreement of a judge with people: decisions in the review queue against the judge's on the same answers.

    correctness, groundedness   people: an accepted answer is right, a rejected or edited answer is wrong;
                                the judge: an answer is right from a score of 0.5 on
    preference                  people: an edited answer is better than the draft; the judge: the answer that
                                it prefers

Agreement is Cohen's kappa (1960), the agreement beyond chance. For preferences, where chance is a coin toss,
it is twice the share of equal choices, minus 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ratchet.audits.judge import Measured
from ratchet.audits.judge_client import (
    Ask,
    ask_all,
    ask_correctness,
    ask_groundedness,
    ask_preference,
    prompt_version,
)
from ratchet.config.evaluation import AnswerJudge
from ratchet.evaluation.report import Agreement
from ratchet.evaluation.statistics import Values
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Entry, is_right, split_answer

RIGHT = 0.5  # score from which the judge calls an answer right
ALPHA, DRAWS = 0.05, 4000  # of the one-sided lower bound, and resamples of its bootstrap
FEWEST = 30  # with fewer decisions a bound says nothing


class Label(NamedTuple):
    """What people said, and what the judge is asked about the same answer.

    `right`: the answer is right, or for `preference`, the first answer is better. A preference has two asks,
    the second with the answers swapped.
    """

    metric: str
    right: bool
    asks: list[Ask]


def measure_agreement(
    queue: ReviewQueue, config: AnswerJudge, home: Path, *, backoff: float = 1.0
) -> Measured:
    """Measure the content of `metrics/judge_agreement.json`. Raises as `ask_all` does."""
    labels = [
        label
        for draft in queue.drafts()
        for entry in queue.entries(draft.name)
        for label in _labels(entry)
        if label.metric in config.metrics
    ]
    replies = ask_all([ask for label in labels for ask in label.asks], config, home, backoff=backoff)
    scores = iter(replies.scores)
    found: dict[str, list[tuple[bool, bool]]] = {metric: [] for metric in config.metrics}
    for label in labels:
        given = [next(scores) for _ in label.asks]
        values = [1 - score if place else score for place, score in enumerate(given) if score is not None]
        if len(values) == len(given):
            found[label.metric].append(
                (
                    label.right,
                    float(np.mean(values)) > RIGHT if label.metric == "preference" else values[0] >= RIGHT,
                )
            )
    return Measured(
        config.protocol,
        config.model,
        {metric: prompt_version(metric) for metric in config.metrics},
        {metric: _agreement(metric, pairs) for metric, pairs in found.items()},
        replies.failures,
    )


def _labels(entry: Entry) -> Iterator[Label]:
    before, answer = split_answer(entry.item.messages)
    right = is_right(entry)
    if entry.decision is None or right is None or not answer or not before:
        return
    question = before[-1].content
    edited = split_answer(entry.decision.messages)[1] if entry.decision.verdict == "edit" else ""
    yield Label("correctness", right, [ask_correctness(question, answer, edited)])
    if entry.item.passage:
        yield Label("groundedness", right, [ask_groundedness(question, answer, entry.item.passage)])
    if edited:
        yield Label("preference", True, ask_preference(question, edited, answer, ""))


def _agreement(metric: str, pairs: list[tuple[bool, bool]]) -> Agreement:
    """Compute kappa, with a lower bound from the bootstrap over the decisions."""
    if len(pairs) < FEWEST:
        why = f"{len(pairs)} decisions of people speak of it, {FEWEST} are needed"
        return Agreement(labels=len(pairs), why=why)
    counts = np.zeros(4)  # neither, judge alone, people alone, both say right
    for right, said in pairs:
        counts[2 * right + said] += 1
    drawn = np.random.default_rng(0).multinomial(len(pairs), counts / len(pairs), DRAWS).astype(np.float64)
    kappa, draws = (_kappa(metric, table) for table in (counts[None, :], drawn))
    agree = float((counts[0] + counts[3]) / len(pairs))
    return Agreement(len(pairs), agree, float(kappa[0]), float(np.quantile(draws, ALPHA)))


def _kappa(metric: str, tables: Values) -> Values:
    """Compute the kappa of each row of counts (neither, judge alone, people alone, both say right).

    It is 0 where one side never varies: there is no agreement beyond chance to see.
    """
    neither, judge, people, both = (tables / tables.sum(axis=1, keepdims=True)).T
    agree = neither + both
    if metric == "preference":
        return np.asarray(2 * agree - 1, dtype=np.float64)
    chance = (both + judge) * (both + people) + (neither + people) * (neither + judge)
    return np.asarray(
        np.where(chance < 1, (agree - chance) / np.where(chance < 1, 1 - chance, 1), 0.0), dtype=np.float64
    )
