"""Records of the review: items, decisions, figures of drafts, and the rules by which rows are accepted."""

from __future__ import annotations

import unicodedata
from collections import Counter
from datetime import UTC, datetime

import msgspec
import xxhash

from ratchet.data.batches import content_hash
from ratchet.data.examples import Message, Meta, RawRow, RowError, make_example, make_raw_row
from ratchet.data.text import ISOLATES, OVERRIDES
from ratchet.errors import UserError

VERDICTS = ("accept", "reject", "edit")
LONGEST_NAME = 80
UNDO = "undo"  # in the history only


class Item(msgspec.Struct, frozen=True):
    """A row that waits for a person's decision."""

    id: str  # ratchet.data.examples.example_id of the messages as drafted
    draft: str  # the set of rows with which it arrived, e.g. "faq-20261125T184500Z"
    kind: str  # "synthetic", "feedback" or "quarantine"
    messages: tuple[Message, ...]
    passage: str = ""  # source text that has to contain the answer
    meta: Meta = {}  # provenance: teacher, prompt_version, document, chunk ...
    doubts: tuple[str, ...] = ()  # reasons; an item with one is always reviewed
    earlier: str = ""  # the answer of an earlier row to the same prompt, if this one contradicts it


class Decision(msgspec.Struct, frozen=True):
    """One person's verdict on one row. `at` is UTC, ISO 8601; empty: now."""

    item: str
    draft: str
    verdict: str  # "accept", "reject", "edit"
    messages: tuple[Message, ...] = ()  # the edited conversation; empty unless the verdict is "edit"
    by: str = ""
    at: str = ""
    why: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """The rows of a draft that are learned from.

    `content` is the hash of the rows; it tells whether a draft that became a batch has changed since.
    """

    draft: str
    rows: list[RawRow]  # in the form `messages`, as a batch will hold them
    reviewers: list[str]
    left_out: dict[str, int]
    content: str


class DraftFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of rows of one draft; `batch` names the batch that it became, or is empty."""

    name: str
    kind: str
    items: int
    doubtful: int
    sampled: int
    waiting: int
    decided: int
    accepted: int
    rejected: int
    edited: int
    batch: str
    taken: bool


class Entry(msgspec.Struct, frozen=True):
    """An item in the queue, with its decision if there is one."""

    item: Item
    sampled: bool
    decision: Decision | None

    @property
    def waits(self) -> bool:
        return self.decision is None and (self.sampled or bool(self.item.doubts))


def split_answer(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str]:
    """Return the conversation before the answer, and the answer; "" for a row in quarantine without one."""
    if messages and messages[-1].role == "assistant":
        return messages[:-1], messages[-1].content
    return messages, ""


def with_answer(item: Item, answer: str) -> tuple[Message, ...]:
    """Return the item's conversation with another answer."""
    return (*split_answer(item.messages)[0], Message("assistant", answer))


def is_right(entry: Entry) -> bool | None:
    """Return whether people say that the item's answer is right; None where they said nothing of it.

    An accepted answer is right, a rejected or edited one wrong; an edit of the question alone says nothing.
    """
    if entry.decision is None:
        return None
    if entry.decision.verdict == "edit":
        edited, answer = split_answer(entry.decision.messages)[1], split_answer(entry.item.messages)[1]
        return None if edited == answer else False
    return entry.decision.verdict == "accept"


def check_decision(decision: Decision, entry: Entry | None) -> Decision:
    """Return the decision as it is stored: with its time, and with an edit normalised.

    An edit that changes nothing counts as an acceptance. Raises UserError: an unknown item or verdict, no
    `by`, or a row that is not a valid conversation.
    """
    if entry is None:
        raise UserError(
            f"the draft {decision.draft!r} holds no row {decision.item!r}",
            remedy="`ratchet review status` shows the drafts",
        )
    item = entry.item
    named = f"row {item.id[:12]} of {item.draft}"
    if decision.verdict not in VERDICTS:
        raise UserError(f"{named}: the verdict is {decision.verdict!r}; wanted: {', '.join(VERDICTS)}")
    why = decision.why.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    kept = msgspec.structs.replace(
        decision, by=check_name(decision.by), at=decision.at or now(), why=why, messages=()
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


def check_name(by: str) -> str:
    """Return the name without surrounding blanks.

    Raises UserError unless it is one short line of printable characters, because commits quote it.
    """
    by = by.strip()
    unprintable = any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in by)
    if not by or len(by) > LONGEST_NAME or unprintable or OVERRIDES.search(by) or ISOLATES.search(by):
        what = f"the name {by[:80]!r} cannot be kept" if by else "nobody is named as the one who decides"
        raise UserError(
            what, remedy=f"one line of at most {LONGEST_NAME} characters: --by NAME, or git config user.name"
        )
    return by


def collect_rows(entries: list[Entry]) -> tuple[list[RawRow], Counter[str]]:
    """Return the rows that are neither rejected nor invalid, and the number left out for each reason."""
    rows, left_out = list[RawRow](), Counter[str]()
    for entry in entries:
        verdict = entry.decision.verdict if entry.decision else "unseen"
        if verdict == "reject":
            left_out["rejected"] += 1
            continue
        messages = entry.decision.messages if entry.decision and verdict == "edit" else entry.item.messages
        try:
            example = make_example(messages, {})
        except RowError as error:  # drafted like this, and outside the sample
            left_out[error.reason] += 1
            continue
        review = {"accept": "accepted", "edit": "edited"}.get(verdict, verdict)
        meta = {"kind": entry.item.kind, **entry.item.meta, "draft": entry.item.draft, "review": review}
        meta |= {"drafted_as": entry.item.id} if verdict == "edit" else {}
        rows.append(make_raw_row(example.messages, meta))
    return rows, left_out


def hash_rows(rows: list[RawRow]) -> str:
    return content_hash(msgspec.json.encode(row) for row in rows)


def sample_order(id: str) -> int:
    """Hash an id otherwise than the split does: the sample must not coincide with the test split."""
    return xxhash.xxh3_64_intdigest(b"review:" + id.encode())


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
