"""Answers that people corrected or approved, as rows to learn from. What was left out is counted, never dropped without a word."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ratchet.config import Config
from ratchet.request_log import REDACTED, Feedback, Logged, open_log

MOST = 1_000_000  # requests that are looked at; retention keeps the log far below


def harvest(root: Path, config: Config) -> list[dict[str, Any]]:
    """Rows in the form `messages`, the oldest first. Raises ServiceError when the log does not answer."""
    log = open_log(root, config)
    try:
        requests = log.window(limit=MOST)
        spoken = log.feedback_of([request.id for request in requests])
    finally:
        log.close()
    return rows_of([(request, spoken[request.id]) for request in requests if request.id in spoken], config)


def rows_of(spoken: list[tuple[Logged, list[Feedback]]], config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    left_out, taken = Counter[str](), Counter[str]()
    for request, feedback in spoken:
        answer, how = _judge(request, feedback, config.ingest.feedback.min_score)
        user = request.user or request.id
        if answer is None:
            left_out[how] += 1
        elif REDACTED in answer or any(REDACTED in content for _, content in request.messages):
            left_out["redacted"] += 1
        elif taken[user] >= config.ingest.feedback.max_rows_per_user:
            left_out["too many of one user"] += 1
        else:
            taken[user] += 1
            rows.append(_row(request, answer, how))
    if left_out:
        sys.stderr.write(f"feedback: {len(rows)} rows; left out: {', '.join(f'{count} {reason}' for reason, count in sorted(left_out.items()))}\n")
    return rows


def _judge(request: Logged, feedback: list[Feedback], min_score: float) -> tuple[str | None, str]:
    """(the right answer, how it is known), or (None, why there is none). A correction wins over a score."""
    if not request.messages:
        return None, "without texts"
    corrections = {said.answer.strip() for said in feedback if said.answer.strip()}
    if len(corrections) > 1:
        return None, "contradictory"
    if corrections:
        return corrections.pop(), "corrected"
    scores = [said.score for said in feedback if said.score is not None]
    if scores and min(scores) >= min_score and request.answer.strip():
        return request.answer, "approved"
    return None, "not approved"


def _row(request: Logged, answer: str, how: str) -> dict[str, Any]:
    messages = [{"role": role, "content": content} for role, content in request.messages]
    return {"messages": [*messages, {"role": "assistant", "content": answer}], "meta": {"kind": "feedback", "source_request": request.id, "how": how}}
