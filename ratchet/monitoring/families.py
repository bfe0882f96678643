"""Group the monitor's columns into families that are compared on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ratchet.config.monitoring import MonitorConfig
from ratchet.data.examples import normalise
from ratchet.data.text import REFUSAL_STARTS
from ratchet.data.words import terms_of
from ratchet.media.names import is_sound
from ratchet.monitoring.drift import Family, Measure, growth, higher, lower, mix, novelty, other, subjects
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.pictures import Look, content_family, picture_family
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.monitoring.sounds import sound_family

LEAST_ROWS = 30  # a family needs so many rows on each side
# Least number of reference prompts for a verdict. The permutation test keeps its error rate for any number;
# a project of 100 rows holds out about 22.
LEAST_PROMPTS = 10
MOST_ROWS = 5000  # most rows of a reference; beyond ten times the window more rows only cost time
Row = TypeVar("Row")


class Answered(NamedTuple):
    """One answer of the champion, in the window or on its own test rows.

    The NLL of answers is left out, because it has no reference: tests measure the NLL of the right answers.
    """

    answer: str
    prompt_nll: float | None


class Reference(NamedTuple):
    """What the champion knows: the prompts that it was trained on, held-out prompts like its traffic, and its
    answers to those.
    """

    familiar: Familiar
    training: list[str]
    prompts: list[str]
    answers: list[Answered]
    pictures: Sequence[Look] = ()  # of the held-out prompts
    trained_pictures: Sequence[Look] = ()
    sounds: Sequence[Look] = ()  # of the held-out prompts
    trained_sounds: Sequence[Look] = ()


def all_families(
    window: list[Logged],
    feedback: dict[str, list[Feedback]],
    earlier: list[Logged],
    reference: Reference,
    monitor: MonitorConfig,
) -> tuple[list[Family], list[str]]:
    """Return the families that have a reference, and for each other family the reason why it has none."""
    asked = by_prompt(window)
    prompts = [question.prompt for question in asked]
    families = input_families(prompts, reference.prompts, reference.familiar, monitor)
    looks = [look for request in window for look in request.pictures]
    sounds = sound_family(looks, reference.sounds, reference.trained_sounds)
    looks = [look for look in looks if not is_sound(look.name)]
    pictures = picture_family(looks, list(reference.pictures), list(reference.trained_pictures))
    content = content_family(looks, reference.pictures, reference.trained_pictures)
    others = [
        *(found for found in (pictures, content, sounds) if found),
        *answer_families(asked, reference, monitor),
        *service_families(window, feedback, earlier, monitor.latency_margin),
    ]
    return [*families, *(one for one in others if isinstance(one, Family))], [
        one for one in others if isinstance(one, str)
    ]


class Question(NamedTuple):
    """What was asked: the last turn, and the names of the pictures and recordings shown."""

    prompt: str
    pictures: tuple[str, ...] = ()


def by_prompt(window: list[Logged]) -> dict[Question, Logged]:
    """Map each question to its newest answered request, or to its newest request where none was answered."""
    found: dict[Question, Logged] = {}
    for request in window:
        question = Question(normalise(request.prompt), tuple(look.name for look in request.pictures))
        if question.prompt and (
            question not in found or request.status == 200 or found[question].status != 200
        ):
            found[question] = request
    return found


def input_families(
    prompts: list[str], reference: list[str], familiar: Familiar, monitor: MonitorConfig
) -> list[Family]:
    """Measure the prompts: new subjects, unfamiliar words, lengths, and the mix of known subjects."""
    before, window = _at_most(reference, monitor.seed), len(prompts)
    texts = [*prompts, *before]
    columns = familiar.columns(texts)
    rarity = columns.pop("rarity")
    form = [
        other("prompt length (log characters)", np.log([max(1, len(text)) for text in texts]), window),
        subjects("mix of known subjects", familiar.words(texts), familiar.subjects(texts), window),
    ]
    families = {
        "novelty": [novelty(rarity, familiar.stems(texts), window)],
        "surprise": [higher(name, values, window) for name, values in columns.items()],
        "form and mix": form,
    }
    return [Family(name, window, len(before), measures) for name, measures in families.items()]


def answer_families(
    asked: dict[Question, Logged], reference: Reference, monitor: MonitorConfig
) -> list[Family | str]:
    """Compare the answers, and the NLL of the prompts, with those on the champion's own test rows."""
    mine = [
        Answered(request.answer, request.prompt_nll) for request in asked.values() if request.status == 200
    ]
    theirs = _at_most(reference.answers, monitor.seed)
    both, size = [*mine, *theirs], len(mine)
    if min(size, len(theirs)) < LEAST_ROWS:
        return [
            f"answers: {size} in this window and {len(theirs)} of the champion's test "
            f"rows; wanted {LEAST_ROWS}"
        ]
    kinds = _kinds([one.answer for one in both])
    measures = [
        other(
            "answer length (log characters)", np.array([math.log1p(len(one.answer)) for one in both]), size
        ),
        mix("mix of answers", kinds, size),
        growth("answer that grew most", kinds, size),
        higher("empty answers", np.array([float(not one.answer.strip()) for one in both]), size),
        higher(
            "refusals", np.array([float(one.answer.lower().startswith(REFUSAL_STARTS)) for one in both]), size
        ),
    ]
    surprise = [[one.prompt_nll for one in side if one.prompt_nll is not None] for side in (mine, theirs)]
    return [
        Family("answers", size, len(theirs), measures),
        _one_column("prompt NLL", "prompt NLL (nats a token)", higher, surprise[0], surprise[1]),
    ]


def _kinds(answers: list[str]) -> Any:
    """Return the kind of each answer as a number: a short answer is a kind of its own, a longer one has its
    first word's.

    So each label is a kind, and prose is distinguished by its beginning.
    """
    names = [
        answer.strip().lower() if len(answer) <= 40 else " ".join(terms_of(answer)[:1]) for answer in answers
    ]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def service_families(
    window: list[Logged], feedback: dict[str, list[Feedback]], earlier: list[Logged], latency_margin: float
) -> list[Family | str]:
    """Compare feedback, errors and latency with the same champion's earlier traffic.

    Feedback gives one value per user; errors and latency give one per request that has it. Some hours are
    busier than others, so latency has to be higher by a margin, which is a share of the earlier latency.
    """
    scores = [_by_user(side, feedback) for side in (window, earlier)]
    failed = [[float(one.status >= 500) for one in side] for side in (window, earlier)]
    waited = [[math.log1p(one.latency_ms) for one in side if one.status == 200] for side in (window, earlier)]
    return [
        _one_column("feedback", "feedback", lower, *scores),
        _one_column("errors", "errors", higher, *failed),
        _one_column(
            "latency", "latency (log ms)", partial(higher, margin=math.log1p(latency_margin)), *waited
        ),
    ]


def _one_column(
    family: str,
    name: str,
    measured: Callable[[str, Any, int], Measure],
    window: list[float],
    before: list[float],
) -> Family | str:
    if min(len(window), len(before)) < LEAST_ROWS:
        return (
            f"{family}: {len(window)} in this window and {len(before)} to compare with; wanted {LEAST_ROWS}"
        )
    return Family(
        family, len(window), len(before), [measured(name, np.array([*window, *before]), len(window))]
    )


def _at_most(rows: list[Row], seed: int) -> list[Row]:
    """Draw MOST_ROWS of the rows at random; return all rows if there are no more."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [
        rows[place]
        for place in sorted(np.random.default_rng(seed).choice(len(rows), MOST_ROWS, replace=False))
    ]


def _by_user(requests: list[Logged], feedback: dict[str, list[Feedback]]) -> list[float]:
    """Return the mean score of each user's requests: thirty votes of one person count as one opinion."""
    scores: dict[str, list[float]] = {}
    for request in requests:
        scores.setdefault(request.user or request.id, []).extend(
            said.score for said in feedback.get(request.id, []) if said.score is not None
        )
    return [sum(found) / len(found) for found in scores.values() if found]
