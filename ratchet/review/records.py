"""What a review holds: items, people's decisions, and what becomes of a row."""

from __future__ import annotations

import unicodedata
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from ratchet.data.batches import content_hash
from ratchet.data.examples import Message, Meta, RowError, make_example
from ratchet.errors import UserError

if TYPE_CHECKING:
    pass

VERDICTS = ("accept", "reject", "edit")
LONGEST_NAME = 80
BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they turn the text that follows round
UNDO = "undo"  # in the history only


class Item(msgspec.Struct, frozen=True):
    """A row that waits for a person's word."""

    id: str  # ratchet.examples.example_id(messages) as drafted
    draft: str  # the set of rows that it came with, e.g. "faq-20261125T184500Z"
    kind: str  # "synthetic", "feedback" or "quarantine"
    messages: tuple[Message, ...]
    passage: str = ""  # source text that the answer has to be found in
    meta: Meta = {}  # provenance: teacher, prompt_version, document, chunk ...
    doubts: tuple[str, ...] = ()  # reasons; who has any is always looked at


class Decision(msgspec.Struct, frozen=True):
    """What one person said of one row. `at` is UTC, ISO 8601; empty: now."""

    item: str
    draft: str
    verdict: str  # "accept", "reject", "edit"
    messages: tuple[Message, ...] = ()  # after an edit
    by: str = ""
    at: str = ""
    why: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What goes in of a draft. `content` is the hash of the rows, by which a draft that was taken is known again."""

    draft: str
    rows: list[dict[str, Any]]
    reviewers: list[str]
    left_out: dict[str, int]
    content: str


class Entry(msgspec.Struct, frozen=True):
    """An item as the queue holds it."""

    item: Item
    sampled: bool
    decision: Decision | None

    @property
    def waits(self) -> bool:
        return self.decision is None and (self.sampled or bool(self.item.doubts))


def split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """(the conversation before the answer, the answer). Rows in quarantine may have none."""
    return (
        (messages[:-1], messages[-1].content)
        if messages and messages[-1].role == "assistant"
        else (messages, "")
    )


def with_answer(item: Item, answer: str) -> tuple[Message, ...]:
    return (*split_answer(item.messages)[0], Message("assistant", answer))


def _check(decision: Decision, entry: Entry | None) -> Decision:
    """As it is kept: with its time, an edit normalised; an edit that changes nothing is an acceptance. Raises UserError."""
    if entry is None:
        raise UserError(
            f"the draft {decision.draft!r} holds no row {decision.item!r}",
            remedy="`ratchet review status` shows the drafts",
        )
    item = entry.item
    named = f"row {item.id[:12]} of {item.draft}"
    if decision.verdict not in VERDICTS:
        raise UserError(f"{named}: the verdict is {decision.verdict!r}; wanted: {', '.join(VERDICTS)}")
    why = decision.why.encode("utf-8", "replace").decode()
    kept = msgspec.structs.replace(
        decision, by=_check_name(decision.by), at=decision.at or _now(), why=why, messages=()
    )
    if decision.verdict == "reject":
        return kept
    try:
        example = make_example(decision.messages if decision.verdict == "edit" else item.messages, {})
    except RowError as error:
        what = "the edit is" if decision.verdict == "edit" else "as drafted it is"
        raise UserError(
            f"{named}: {what} no valid conversation: {error}", remedy="edit or reject it"
        ) from None
    if decision.verdict == "accept" or example.id == item.id:
        return msgspec.structs.replace(kept, verdict="accept")
    return msgspec.structs.replace(kept, messages=example.messages)


def _check_name(by: str) -> str:
    """It stands in commits, so one line. Raises UserError."""
    by = by.strip()
    if (
        not by
        or len(by) > LONGEST_NAME
        or any(char in BIDI or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in by)
    ):
        what = f"the name {by[:80]!r} cannot be kept" if by else "nobody is named as the one who decides"
        raise UserError(
            what, remedy=f"one line of at most {LONGEST_NAME} characters: --by NAME, or git config user.name"
        )
    return by


def _collect(entries: list[Entry]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows that are neither rejected nor unfit, and how many were left out, by reason."""
    rows, left_out = [], Counter[str]()
    for entry in entries:
        verdict = entry.decision.verdict if entry.decision else "unseen"
        if verdict == "reject":
            left_out["rejected"] += 1
            continue
        messages = entry.decision.messages if entry.decision and verdict == "edit" else entry.item.messages
        try:
            example = make_example(messages, {})
        except RowError as error:  # drafted so, and nobody looked at it
            left_out[error.reason] += 1
            continue
        review = {"accept": "accepted", "edit": "edited"}.get(verdict, verdict)
        meta = {"kind": entry.item.kind, **entry.item.meta, "draft": entry.item.draft, "review": review}
        meta |= {"drafted_as": entry.item.id} if verdict == "edit" else {}
        rows.append(
            {
                "messages": [{"role": turn.role, "content": turn.content} for turn in example.messages],
                "meta": meta,
            }
        )
    return rows, left_out


def _content(rows: list[dict[str, Any]]) -> str:
    return content_hash(msgspec.json.encode(row) for row in rows)


def _order(id: str) -> int:
    """Apart from the order that splits rows: the sample must not be the test split."""
    return xxhash.xxh3_64_intdigest(b"review:" + id.encode())


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
