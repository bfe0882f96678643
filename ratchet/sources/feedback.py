"""Answers that people corrected or approved, as rows to learn from. What was left out is counted, never dropped without a word."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ratchet.config import Config, FeedbackSource
from ratchet.examples import normalise
from ratchet.request_log import REDACTED, Feedback, Logged, open_log

CONTRARY = 0.5  # a score under it speaks against the answer, whatever the others say
BROKEN_OFF = ("length", "error", "cancelled")


class Harvest(NamedTuple):
    """Rows in the form `messages`, the oldest first; how many judged answers gave none, by reason."""

    rows: list[dict[str, Any]]
    left_out: Counter[str]


def harvest(root: Path, config: Config) -> list[dict[str, Any]]:
    """The rows; what was left out is told on stderr. Raises ServiceError when the log does not answer."""
    log = open_log(root, config)
    try:
        spoken = log.spoken_of()
    finally:
        log.close()
    found = choose(spoken, config.ingest.feedback)
    if found.left_out:
        sys.stderr.write(f"feedback: {len(found.rows)} rows; left out: {', '.join(f'{count} {reason}' for reason, count in sorted(found.left_out.items()))}\n")
    return found.rows


def choose(spoken: list[tuple[Logged, list[Feedback]]], settings: FeedbackSource) -> Harvest:
    """`spoken` in the order of time: of one user, the oldest count."""
    found, taken = Harvest([], Counter()), Counter[str]()
    for request, feedback in spoken:
        answer, how = _judge(request, feedback, settings.min_score)
        user = _teacher(request, feedback, how)
        if answer is None:
            found.left_out[how] += 1
        elif REDACTED in answer or any(REDACTED in content for _, content in request.messages):
            found.left_out["redacted"] += 1
        elif taken[user] >= settings.max_rows_per_user:
            found.left_out["too many of one user"] += 1
        else:
            taken[user] += 1
            found.rows.append(_row(request, answer, how))
    return found


def _judge(request: Logged, feedback: list[Feedback], min_score: float) -> tuple[str | None, str]:
    """(the right answer, how it is known), or (None, why there is none). A correction wins over a score."""
    if not request.messages:
        return None, "without texts"
    corrections = {corrected for said in feedback if (corrected := normalise(said.answer))}
    if len(corrections) > 1:
        return None, "contradictory"
    if corrections:
        return corrections.pop(), "corrected"
    scores = [said.score for said in feedback if said.score is not None]
    if not scores or fmean(scores) < min_score or min(scores) < CONTRARY or not request.answer.strip():
        return None, "not approved"
    return (None, "broken off") if request.finish in BROKEN_OFF else (request.answer, "approved")


def _teacher(request: Logged, feedback: list[Feedback], how: str) -> str:
    """Whose row it is: the first who said so; where they gave no name, who asked."""
    first = next((said.user for said in feedback if (said.answer if how == "corrected" else said.score is not None)), "")
    return first or request.user or request.id


def _row(request: Logged, answer: str, how: str) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in request.messages]
    return {"messages": [*messages, {"role": "assistant", "content": answer}], "meta": {"kind": "feedback", "source_request": request.id, "how": how}}
