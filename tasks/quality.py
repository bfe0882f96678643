"""Watch whether the answers are right: a judge scores every new request, people are asked about a few, and
their decisions in the review queue correct the judge.

This is a task of the flow `monitor`. What was judged and who was asked about what is kept in the document
`STATE`, without texts; it begins anew with each champion. The questions are written there before they are
queued, so a run that is killed in between asks them again, and never others in their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from ratchet.audits.judge_client import ask_all, ask_correctness
from ratchet.config.params import Config
from ratchet.data.examples import Message, Meta, RowError, example_id, make_example
from ratchet.monitoring.quality import Days, Labels, Values, choose, estimate, find_fall, inclusion
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Logged
from ratchet.monitoring.verdicts import Quality
from ratchet.pipeline.checkout import locked
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Item, is_right
from ratchet.storage.documents import read_document, write_document

STATE = Path(".ratchet/monitor/quality.json")
SETTLED = 60.0  # seconds after which every request of a moment stands in the log
FIRST = 86_400.0  # seconds before the first look whose requests are judged
MOST_DAYS = 7.0  # days' worth of unanswered questions, beyond which no more are asked
UNKNOWN = 0.5  # score of a request before the judge has scored any
DOUBT = "Is this answer right? Accept: yes; reject, or edit it: no."


class Judged(msgspec.Struct, frozen=True):
    """The requests of a day that the judge scored, and the sum of its scores."""

    requests: int = 0
    scores: float = 0.0


class Question(msgspec.Struct, frozen=True):
    """A request that people are asked about, with the probability that it was chosen."""

    request: str
    day: str
    score: float
    inclusion: float
    item: str
    draft: str


class Watched(msgspec.Struct, frozen=True):
    """What is known of one champion's answers; requests before `until` are done (seconds since 1970).

    `asked_at` is when requests were last chosen; `asking` are questions that may not be in the queue yet.
    """

    version: int
    until: float
    asked_at: float
    days: dict[str, Judged] = {}  # by ISO 8601 date, UTC
    questions: list[Question] = []
    asking: list[Item] = []


class Said(NamedTuple):
    """The answers of people to the questions, in their order; None: nobody has answered yet."""

    right: list[bool | None]
    waiting: int


def watch_quality(root: Path, config: Config, version: int, now: float) -> Quality | None:
    """Judge the requests since the last look, ask people about some, and return what is known now.

    `now` is in seconds since 1970. None where `monitor.quality.labels_per_day` is 0. Raises ServiceError when
    the log, the queue or the judge's address does not answer, ConfigError for a refused key.
    """
    if not config.monitor.quality.labels_per_day:
        return None
    with locked(root, "quality"):
        queue = ReviewQueue(root)
        try:
            watched = _read(root, version, now)
            _queue(queue, watched.asking)
            requests = _new_requests(root, config, watched, now - SETTLED)
            said = _read_answers(queue, watched.questions)
            most = MOST_DAYS * config.monitor.quality.labels_per_day
            unscored = 0
            if requests and said.waiting < most:
                watched, unscored = _ask(root, config, watched, said, requests, now)
                _write(root, watched)
                _queue(queue, watched.asking)
                said = _read_answers(queue, watched.questions)
            elif requests:  # requests that nobody is asked about must not count
                watched = msgspec.structs.replace(watched, until=now - SETTLED)
            _write(root, msgspec.structs.replace(watched, asking=[]))
        finally:
            queue.close()
    return _tell(watched, said, config, unscored)


def _ask(
    root: Path, config: Config, watched: Watched, said: Said, requests: list[Logged], now: float
) -> tuple[Watched, int]:
    """Judge the requests and choose those to ask about; return also how many got no score."""
    scores, unscored = _score(root, config, watched, requests)
    share_of_day = min(1.0, (now - watched.asked_at) / 86_400)
    chances = inclusion(scores, _labels(watched, said), config.monitor.quality.labels_per_day * share_of_day)
    chance = np.random.default_rng([config.monitor.seed, watched.version, int(watched.until * 1000)])
    known = {question.item: question.draft for question in watched.questions}
    questions, asking = list(watched.questions), []
    for place in choose(scores, chances, chance):
        request, day = requests[place], _day(requests[place].at)
        messages = _messages(request)
        item = example_id(messages)
        if item not in known:  # the same answer to the same question needs one decision
            known[item] = f"quality-v{watched.version}-{day.replace('-', '')}"
            # What the judge said is kept from the people who are to correct it.
            meta: Meta = {"request": request.id, "version": request.version}
            asking.append(Item(item, known[item], "feedback", messages, meta=meta, doubts=(DOUBT,)))
        questions.append(
            Question(request.id, day, float(scores[place]), float(chances[place]), item, known[item])
        )
    days = dict(watched.days)
    for request, score in zip(requests, scores, strict=True):
        old = days.get(_day(request.at), Judged())
        days[_day(request.at)] = Judged(old.requests + 1, old.scores + float(score))
    return Watched(watched.version, now - SETTLED, now, days, questions, asking), unscored


def _score(root: Path, config: Config, watched: Watched, requests: list[Logged]) -> tuple[Values, int]:
    """Return the judge's scores; a request without one gets the mean, whose error people correct."""
    judge = config.monitor.quality.judge
    if not judge.model:
        return np.full(len(requests), UNKNOWN), 0
    asks = [ask_correctness(request.prompt, request.answer, "") for request in requests]
    scores = ask_all(asks, judge, root).scores
    found = [score for score in scores if score is not None]
    total = sum(day.requests for day in watched.days.values()) + len(found)
    whole = sum(day.scores for day in watched.days.values()) + sum(found)
    mean = whole / total if total else UNKNOWN
    return np.array([mean if score is None else score for score in scores]), len(scores) - len(found)


def _new_requests(root: Path, config: Config, watched: Watched, until: float) -> list[Logged]:
    """Return the newest answered requests since the last look that people can be shown."""
    log = open_log(root, config)
    try:
        found = log.window(
            limit=config.monitor.window, since=watched.until, until=until, version=watched.version
        )
    finally:
        log.close()
    return [request for request in found if request.status == 200 and _can_be_shown(request)]


def _can_be_shown(request: Logged) -> bool:
    """Tell whether a person could accept it: a conversation in text, with an answer that is not empty."""
    if request.pictures or not request.messages:
        return False
    try:
        make_example(_messages(request), {})
    except RowError:
        return False
    return True


def _messages(request: Logged) -> tuple[Message, ...]:
    turns = (Message(role, content) for role, content in request.messages)
    return (*turns, Message("assistant", request.answer))


# --- what people said ---------------------------------------------------------------------------------------


def _queue(queue: ReviewQueue, items: Iterable[Item]) -> None:
    queue.add(items, share=0.0)  # all have a doubt, so all are shown


def _read_answers(queue: ReviewQueue, questions: list[Question]) -> Said:
    there = {draft.name for draft in queue.drafts()}
    wanted = {question.draft for question in questions} & there
    words = {
        (draft, entry.item.id): (is_right(entry), entry.waits)
        for draft in wanted
        for entry in queue.entries(draft)
    }
    right = [words.get((question.draft, question.item), (None, False))[0] for question in questions]
    asked = {(question.draft, question.item) for question in questions}
    return Said(right, sum(words[key][1] for key in asked if key in words))


def _labels(watched: Watched, said: Said) -> Labels:
    places = {day: place for place, day in enumerate(sorted(watched.days))}
    told: Iterator[tuple[int, float, float, float]] = (
        (places[question.day], question.score, float(right), question.inclusion)
        for question, right in zip(watched.questions, said.right, strict=True)
        if right is not None
    )
    day, score, right, chance = np.array(list(told), dtype=np.float64).reshape(-1, 4).T
    return Labels(day.astype(np.int64), score, right, chance)


def _tell(watched: Watched, said: Said, config: Config, unscored: int) -> Quality:
    names = sorted(watched.days)
    judged = [watched.days[name] for name in names]
    days = Days(
        np.array([day.requests for day in judged], dtype=np.float64),
        np.array([day.scores for day in judged], dtype=np.float64),
    )
    labels, settings = _labels(watched, said), config.monitor.quality
    found = Quality(
        requests=sum(day.requests for day in judged),
        answers=len(labels.right),
        waiting=said.waiting,
        unscored=unscored,
    )
    fall = find_fall(days, labels, rate=settings.false_alarms_per_month, margin=settings.margin)
    if fall is None:
        whole = estimate(days, labels)
        return msgspec.structs.replace(found, right=whole.share if whole else None)
    return msgspec.structs.replace(
        found,
        alarm=fall.alarm,
        right=fall.after.share,
        before=fall.before.share,
        since=names[fall.day],
        most_change=fall.bound,
    )


# --- the state ----------------------------------------------------------------------------------------------


def _read(root: Path, version: int, now: float) -> Watched:
    """Read what is known of this version; of another one, nothing is."""
    raw = read_document(root, STATE)
    found = msgspec.json.decode(raw, type=Watched) if raw else None
    if found and found.version == version:
        return found
    return Watched(version, now - FIRST, now - FIRST)


def _write(root: Path, watched: Watched) -> None:
    write_document(root, STATE, msgspec.json.encode(watched), private=True)


def _day(at: float) -> str:
    return f"{datetime.fromtimestamp(math.floor(at), UTC):%Y-%m-%d}"
