"""Drafts that people reviewed, as rows to learn from."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ratchet.config.data import ReviewConfig
from ratchet.data.examples import RawRow
from ratchet.errors import UserError
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Outcome


class Reviewed(NamedTuple):
    """The rows of reviewed drafts.

    `drafts` holds (name, hash of its rows); `batch` names the batch that holds the rows already, if any does.
    """

    rows: list[RawRow]
    label: str
    reviewers: tuple[str, ...]
    drafts: tuple[tuple[str, str], ...]
    batch: str = ""


def harvest(root: Path, settings: ReviewConfig, draft: str | None = None) -> Reviewed:
    """Return the rows of one draft, or of all drafts that are ready and in no batch yet.

    The reasons why other drafts are not ready are written to stderr. Raises UserError when `draft` is not
    ready, or when no draft is.
    """
    queue = ReviewQueue(root)
    try:
        batches = {found.name: found.batch for found in queue.drafts()}
        names = [draft] if draft is not None else [name for name, batch in batches.items() if not batch]
        outcomes, refusals = _settle(queue, names, settings.max_rejects)
    finally:
        queue.close()
    if draft is not None and refusals:
        raise refusals[0]
    for refusal in refusals:
        sys.stderr.write(f"review: not ready: {refusal}\n")
    if not outcomes:
        raise UserError(
            "no draft is ready to become a batch", remedy="`ratchet review status` shows what waits"
        )
    return _join(outcomes, batches.get(draft, "") if draft is not None else "")


def mark_taken(root: Path, drafts: tuple[tuple[str, str], ...], batch: str) -> None:
    queue = ReviewQueue(root)
    try:
        for name, content in drafts:
            queue.mark_taken(name, batch, content=content)
    finally:
        queue.close()


def _settle(
    queue: ReviewQueue, names: list[str], max_rejects: float
) -> tuple[list[Outcome], list[UserError]]:
    outcomes, refusals = [], []
    for name in names:
        try:
            outcome = queue.outcome(name, max_rejects=max_rejects)
            if not outcome.rows:
                raise UserError(
                    f"no row of the draft {name!r} was accepted", remedy="there is nothing to learn from it"
                )
            outcomes.append(outcome)
        except UserError as error:
            refusals.append(error)
    return outcomes, refusals


def _join(outcomes: list[Outcome], batch: str) -> Reviewed:
    rows = [row for outcome in outcomes for row in outcome.rows]
    left_out = sum((Counter(outcome.left_out) for outcome in outcomes), Counter[str]())
    if left_out:
        sys.stderr.write(
            f"review: {len(rows)} rows; left out: "
            + ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            + "\n"
        )
    reviewers = sorted({name for outcome in outcomes for name in outcome.reviewers})
    return Reviewed(
        rows,
        "-".join(outcome.draft for outcome in outcomes),
        tuple(reviewers),
        tuple((outcome.draft, outcome.content) for outcome in outcomes),
        batch,
    )
