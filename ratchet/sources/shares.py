"""Who may bring how much: caps on users and API keys, and a fair choice where there is too much."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ratchet.monitoring.request_log import Logged


class Vote(NamedTuple):
    """Who vouches for an answer, and through which key."""

    user: str
    sender: str


class Candidate(NamedTuple):
    request: Logged
    answer: str
    how: str
    votes: list[Vote]  # any of them may be the one that it counts for


class Taken(NamedTuple):
    candidate: Candidate
    vote: Vote


def share_out(candidates: list[Candidate], most: int, left_out: Counter[str]) -> list[Taken]:
    """Each to one of those who vouch for it and still have room, through the key that has brought least: a flood takes no honest row's place."""
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
    """Votes from before there were keys have none to dominate."""
    kept: set[str] = set()
    for sender in {one.vote.sender for one in taken}:
        rows = [one for one in taken if one.vote.sender == sender]
        kept |= {one.candidate.request.id for one in (spread(rows, most) if sender else rows)}
    left_out.update({"too many of one key": len(taken) - len(kept)} if len(kept) < len(taken) else {})
    return [one for one in taken if one.candidate.request.id in kept]


def spread(taken: list[Taken], room: int) -> list[Taken]:
    """In turn from every key, and of a key from every user, each user's newest first; in the order of time. What is equal is told apart by hash."""
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
