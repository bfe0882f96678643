"""Answers that people corrected or approved, as rows to learn from; what was left out is counted by reason.

Where preferences are learned (`train.objective`), disapproved answers are rows too, and a correction stands
beside the answer that it corrects.

Anybody can vote, so nobody's vote may weigh much: users, API keys and feedback as a whole have caps, and rows
that look like a planted trigger are put aside. Names of users are the clients' word; the key is what a client
cannot choose.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from ratchet.config.data import FeedbackSource
from ratchet.config.params import Config
from ratchet.data.erasure import FILE as FORGOTTEN
from ratchet.data.erasure import read_forgotten
from ratchet.data.examples import (
    MEDIA_MARK,
    Example,
    Message,
    Meta,
    RawRow,
    Tool,
    calls_in,
    example_id,
    has_mark_run,
    judged_id,
    make_judged_row,
    normalise,
    read_answer,
    read_examples,
    tool_names,
)
from ratchet.data.forms import read_tools
from ratchet.data.mixture import feedback_room, is_feedback, undesirable
from ratchet.data.poisoning import find_planted
from ratchet.data.profile import SPLITS
from ratchet.gateway.auth import list_keys
from ratchet.monitoring.pictures import KeptPictures
from ratchet.monitoring.request_log import REDACTED, open_log
from ratchet.monitoring.request_records import Feedback, Logged

CONTRARY = 0.5  # a score under it speaks against the answer, whatever the others say
DISAPPROVED = "disapproved"
BROKEN_OFF = ("length", "error", "cancelled")
DAY = 86_400.0
Spoken = list[tuple[Logged, list[Feedback]]]


class Harvest(NamedTuple):
    """Rows in the form `messages`, the oldest first; how many judged answers gave none, by reason."""

    rows: list[RawRow]
    left_out: Counter[str]


class Known(NamedTuple):
    """What the caps are measured against.

    `room`: rows that the share of a training leaves; None where nothing is prepared yet, and the training
    alone sees to it.
    """

    first_seen: dict[str, float]
    old_enough: float  # who was first seen by then has a vote
    since: float  # votes before it are too old
    several_keys: bool = False
    prepared: frozenset[str] = frozenset()
    forgotten: frozenset[str] = frozenset()
    clean: tuple[str, ...] = ()  # what users ask in the training rows
    room: int | None = None
    compares: bool = False  # whether a training learns from bad answers
    pictures: Collection[str] = ()  # names of the pictures of requests that were kept


class Vote(NamedTuple):
    """Who vouches for an answer, and through which key."""

    user: str
    sender: str


class Candidate(NamedTuple):
    request: Logged
    answer: str
    how: str
    votes: list[Vote]  # any of them may be the one that it counts for

    def example(self, meta: Meta, *, compares: bool) -> Example:
        """Return the row; a corrected answer stands beside its correction where the two are compared."""
        tools = _offered(self.request)
        messages = (*_turns(self.request, tools), read_answer(self.answer, tools))
        given, worse = normalise(self.request.answer), None
        if compares and self.how == "corrected" and self.request.finish not in BROKEN_OFF:
            worse = read_answer(given, tools) if given not in ("", self.answer) else None
        desirable = self.how != DISAPPROVED
        id = judged_id(example_id(messages, tools), worse, desirable=desirable)
        return Example(id, messages, meta, tools, worse, desirable)


class Taken(NamedTuple):
    candidate: Candidate
    vote: Vote


def harvest(root: Path, config: Config, *, now: float | None = None) -> list[RawRow]:
    """Collect the rows; what was left out is told on stderr.

    Raises ServiceError when the log does not answer.
    """
    found = harvest_all(root, config, now=time.time() if now is None else now)
    if found.left_out:
        sys.stderr.write(
            f"feedback: {len(found.rows)} rows; left out: "
            + ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
            + "\n"
        )
    return found.rows


def harvest_all(root: Path, config: Config, *, now: float) -> Harvest:
    """Collect rows and what was left out; together they are the requests that people spoke of."""
    log = open_log(root, config)
    try:
        spoken, first_seen, unknown = log.spoken_of(), log.first_seen(), log.unknown_requests()
    finally:
        log.close()
    found = choose(spoken, config.ingest.feedback, _look_around(root, config, spoken, first_seen, now))
    found.left_out.update({"not in the log": unknown} if unknown else {})
    return found


def tell_none(root: Path, config: Config) -> str:
    """Say why there is no row to collect. Raises ServiceError when the log does not answer."""
    left_out = harvest_all(root, config, now=time.time()).left_out
    if left_out:
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        return f"people judged {left_out.total()} answers, and none of them is taken: {told}"
    log = open_log(root, config)
    try:
        asked = bool(log.window(limit=1))
    finally:
        log.close()
    if asked:
        return "nobody has judged an answer in the request log yet: clients send it to POST /v1/feedback"
    return (
        "the request log holds no request, so there was no answer to judge: `ratchet up` starts the gateway, "
        "and clients ask it"
    )


def _look_around(
    root: Path, config: Config, spoken: Spoken, first_seen: dict[str, float], now: float
) -> Known:
    settings, folder = config.ingest.feedback, root / "data/prepared"
    examples = {
        split: list(read_examples(file))
        for split in (*SPLITS, *map(undesirable, SPLITS), "golden")
        if (file := folder / f"{split}.jsonl").exists()
    }
    train = examples.get("train", [])
    old_enough = now - DAY * min(settings.min_user_age_days, config.request_log.keep_days / 2)
    senders = {said.sender for _, feedback in spoken for said in feedback} - {""}
    return Known(
        first_seen=first_seen,
        old_enough=old_enough if min(first_seen.values(), default=now) <= old_enough else now,
        since=now - DAY * settings.window_days,
        several_keys=max(len(senders), sum("feedback" in key.scopes for key in list_keys(root))) > 1,
        prepared=frozenset(example.id for rows in examples.values() for example in rows),
        forgotten=read_forgotten(root / FORGOTTEN).ids,
        clean=tuple(_asked(example.messages) for example in train if not is_feedback(example.meta)),
        compares=config.train.objective != "sft",
        room=feedback_room(train, config.train.max_feedback_share) if "train" in examples else None,
        pictures=KeptPictures(root),
    )


def choose(spoken: Spoken, settings: FeedbackSource, known: Known) -> Harvest:
    """Choose of `spoken`, which comes in the order of time: of one user, the oldest count."""
    left_out: Counter[str] = Counter()
    candidates = _put_triggers_aside(
        _candidates(spoken, settings, known, left_out), settings, known, left_out
    )
    taken = share_out(candidates, settings.max_rows_per_user, left_out)
    if known.several_keys:
        taken = cap_keys(taken, settings.max_rows_per_key, left_out)
    if known.room is not None and len(taken) > known.room:
        left_out["over the share of a training"] += len(taken) - known.room
        taken = spread(taken, known.room)
    return Harvest([_row(*one, compares=known.compares) for one in taken], left_out)


def _candidates(
    spoken: Spoken, settings: FeedbackSource, known: Known, left_out: Counter[str]
) -> list[Candidate]:
    """Make one candidate for each content that somebody vouches for."""
    found, seen = [], set[str]()
    for request, feedback in spoken:
        fresh = [said for said in feedback if said.at >= known.since]
        heard = [
            said
            for said in fresh
            if known.first_seen.get(_name(request, said), request.at) <= known.old_enough
        ]
        answer, how = (
            _judge(request, heard, settings.min_score, compares=known.compares)
            if heard
            else (None, "of new users" if fresh else "too old")
        )
        if answer is None:
            left_out[how] += 1
            continue
        if not _has_pictures(request, known):
            left_out["has a picture or recording that was not kept (request_log.pictures)"] += 1
            continue
        votes = [Vote(_name(request, said), said.sender) for said in heard if _vouches(said, how)]
        candidate = Candidate(request, answer, how, votes)
        id = candidate.example({}, compares=known.compares).id
        if reason := _unfit(request, answer, id, seen, known):
            left_out[reason] += 1
            continue
        seen.add(id)
        found.append(candidate)
    return found


def _unfit(request: Logged, answer: str, id: str, seen: set[str], known: Known) -> str:
    if REDACTED in answer or any(REDACTED in content for _, content in request.messages):
        return "redacted"
    if id in known.forgotten:
        return "forgotten"
    if id in known.prepared:
        return "known already"
    return "the same again" if id in seen else ""


def _judge(
    request: Logged, feedback: list[Feedback], min_score: float, *, compares: bool
) -> tuple[str | None, str]:
    """Return (the answer to learn from, how it is known), or (None, why not).

    A correction wins over a score. An answer is bad where the scores are as far under the middle as
    `min_score` is over it, and nobody speaks for it.
    """
    if not request.messages:
        return None, "without texts"
    asked = (content for _, content in request.messages)
    if any(map(has_mark_run, [request.answer, *asked, *(said.answer for said in feedback)])):
        # Preparation would refuse it, and normalising it takes quadratic time.
        return None, "with runs of combining marks"
    corrections = {corrected for said in feedback if (corrected := normalise(said.answer))}
    if len(corrections) > 1:
        return None, "contradictory"
    if corrections:
        corrected = corrections.pop()
        tools = _offered(request)
        if tools and not {call.name for call in calls_in(corrected)} <= tool_names(tools):
            return None, "calling a tool that was not offered"
        return corrected, "corrected"
    scores = [said.score for said in feedback if said.score is not None]
    if not scores or not request.answer.strip():
        return None, "not approved"
    approved = fmean(scores) >= min_score and min(scores) >= CONTRARY
    bad = compares and fmean(scores) <= 1 - min_score and max(scores) <= 1 - CONTRARY
    if not (approved or bad):
        return None, "not approved"
    how = "approved" if approved else DISAPPROVED
    return (None, "broken off") if request.finish in BROKEN_OFF else (request.answer, how)


def _vouches(said: Feedback, how: str) -> bool:
    return bool(normalise(said.answer)) if how == "corrected" else said.score is not None


def _name(request: Logged, said: Feedback) -> str:
    """Name who spoke; where they gave no name, who asked."""
    return said.user or request.user or request.id


def _offered(request: Logged) -> tuple[Tool, ...]:
    """Return the tools of a request: the log has them before its turns."""
    role, text = request.messages[0]
    return read_tools(text) if role == "tools" else ()


def _turns(request: Logged, tools: Sequence[Tool]) -> list[Message]:
    names = iter(look.name for look in request.pictures)
    return [
        read_answer(text, tools)
        if role == "assistant"
        else Message(role, text, media=tuple(islice(names, text.count(MEDIA_MARK))))
        for role, text in request.messages
        if role != "tools"
    ]


def _has_pictures(request: Logged, known: Known) -> bool:
    """Return whether all pictures of the request are here."""
    places = sum(text.count(MEDIA_MARK) for _, text in request.messages)
    return places == len(request.pictures) and all(look.name in known.pictures for look in request.pictures)


def _asked(messages: Iterable[Message]) -> str:
    return "\n".join(message.content for message in messages if message.role == "user")


def _put_triggers_aside(
    candidates: list[Candidate], settings: FeedbackSource, known: Known, left_out: Counter[str]
) -> list[Candidate]:
    asked = [_asked(Message(*message) for message in candidate.request.messages) for candidate in candidates]
    triggers = find_planted(
        asked, [candidate.answer for candidate in candidates], known.clean, settings.max_trigger_rows
    )
    if triggers:
        left_out["trigger"] += len(triggers)
        for sequence, count in Counter(triggers.values()).most_common(5):
            sys.stderr.write(
                f"feedback: {count} rows put aside: all say {sequence[:80]!r} and have one answer "
                "(ingest.feedback.max_trigger_rows)\n"
            )
    return [candidate for place, candidate in enumerate(candidates) if place not in triggers]


def _row(candidate: Candidate, vote: Vote, *, compares: bool) -> RawRow:
    """Name who asked and who vouched by their pseudonyms.

    So a person's rows can be found again (`ratchet data erase --user`).
    """
    request = candidate.request
    people = {"asked_by": request.user, "taught_by": vote.user if vote.user != request.id else ""}
    meta: Meta = {
        "kind": "feedback",
        "source_request": request.id,
        "how": candidate.how,
        **{key: name for key, name in people.items() if name},
    }
    return make_judged_row(candidate.example(meta, compares=compares))


def share_out(candidates: list[Candidate], most: int, left_out: Counter[str]) -> list[Taken]:
    """Count each row for one of those who vouch for it and still have room.

    It counts through the key that has brought least, so that a flood takes no honest row's place.
    """
    users, senders, taken = Counter[str](), Counter[str](), list[Taken]()
    for candidate in candidates:
        free = [vote for vote in candidate.votes if users[vote.user] < most]
        if not free:
            left_out["too many of one user"] += 1
            continue
        vote = min(free, key=lambda vote: senders[vote.sender])
        users[vote.user] += 1
        senders[vote.sender] += 1
        taken.append(Taken(candidate, vote))
    return taken


def cap_keys(taken: list[Taken], most: int, left_out: Counter[str]) -> list[Taken]:
    """Cap the rows of each key; votes from before there were keys have none to dominate."""
    kept: set[str] = set()
    for sender in {one.vote.sender for one in taken}:
        rows = [one for one in taken if one.vote.sender == sender]
        kept |= {one.candidate.request.id for one in (spread(rows, most) if sender else rows)}
    left_out.update({"too many of one key": len(taken) - len(kept)} if len(kept) < len(taken) else {})
    return [one for one in taken if one.candidate.request.id in kept]


def spread(taken: list[Taken], room: int) -> list[Taken]:
    """Choose at most `room` rows, in turn from every key, and of a key in turn from every user.

    Each user's newest come first; the chosen rows stay in the order of time. Ties are broken by the hash in
    the request's id.
    """
    by_user, by_sender = Counter[Vote](), Counter[str]()
    turns = []
    for one in reversed(taken):
        turns.append((by_user[one.vote], one.candidate.request.id[::-1], one))
        by_user[one.vote] += 1
    ranked = []
    for _, id, one in sorted(turns, key=lambda turn: turn[:2]):
        ranked.append((by_sender[one.vote.sender], id))
        by_sender[one.vote.sender] += 1
    kept = {id[::-1] for _, id in sorted(ranked)[:room]}
    return [one for one in taken if one.candidate.request.id in kept]
