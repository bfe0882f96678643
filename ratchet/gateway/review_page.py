"""The page `/review`: one row at a time, one key for each decision.

`GET` returns the page; `POST` takes a decision (`Word`) and returns the next row.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from ratchet.data.examples import data_uri
from ratchet.errors import ServiceError, UserError
from ratchet.gateway.limits import read_body
from ratchet.gateway.state import Parts
from ratchet.media.names import is_sound
from ratchet.media.pictures import shrink
from ratchet.media.store import MediaStore
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, DraftFigures, Item, split_answer, with_answer
from ratchet.serving.faults import Fault

PATH = "/review"
SIDE = 1024  # pixels of a picture on the page, at most


class Word(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page sends: a decision on a row, or a request for the next one.

    `draft`: the only draft to review, if the page's address names one; `item` and `of`: a row and its draft.
    """

    action: Literal["next", "accept", "reject", "edit", "undo"]
    draft: str | None = None
    item: str = ""
    of: str = ""
    answer: str = ""
    by: str = ""
    why: str = ""


def review_page(parts: Parts) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        parts.admit(request.headers, "admin")
        nonce = secrets.token_urlsafe(16)
        allowed = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self';"
            " img-src data:; media-src data:"
        )
        policy = f"{allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"content-security-policy": policy}
        return HTMLResponse(
            await run_in_threadpool(_render, parts.config.project.name, nonce), headers=headers
        )

    return page


def review_word(parts: Parts) -> Callable[[Request], Awaitable[Response]]:
    async def word(request: Request) -> Response:
        parts.admit(request.headers, "admin")
        raw = await read_body(
            request.receive, request.headers.get("content-length", ""), parts.config.gateway.max_body_bytes
        )
        try:
            said = msgspec.json.decode(raw, type=Word)
        except msgspec.DecodeError as error:
            raise Fault(400, f"the body is no word on a row: {error}", remedy="reload the page") from None
        try:
            found = await run_in_threadpool(_answer, parts.root, said)
        except ServiceError as error:
            raise Fault(503, str(error), code="review_is_down", retry_after=5) from None
        # json.dumps writes ASCII; UTF-8 cannot hold the lone surrogates that rows in quarantine may have.
        return Response(
            json.dumps(found), media_type="application/json", headers={"cache-control": "no-store"}
        )

    return word


def _render(project: str, nonce: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return pages.get_template("review.html").render(project=project, nonce=nonce)


def _answer(root: Path, said: Word) -> dict[str, Any]:
    """Return the row to show next, which after an undo is the row whose decision was taken back.

    Raises UserError, ServiceError.
    """
    queue = ReviewQueue(root)
    try:
        note, shown = (
            ("", None)
            if said.action == "next"
            else _undo(queue, said)
            if said.action == "undo"
            else (_decide(queue, said), None)
        )
        pending = queue.pending(said.draft, limit=1)
        item = shown or (pending[0] if pending else None)
        drafts = [] if item else [_describe(draft) for draft in queue.drafts()]
        return {
            "waiting": queue.waiting(said.draft),
            "item": _show(item, root) if item else None,
            "note": note,
            "kept": not note,
            "drafts": drafts,
        }
    finally:
        queue.close()


def _decide(queue: ReviewQueue, said: Word) -> str:
    """Record the decision, and return what prevents it, or nothing.

    The page shows undecided rows only, so a decided one was decided by somebody else in the meantime.
    """
    entry = queue.get(said.of, said.item)
    if entry is None:
        raise UserError(
            f"the draft {said.of[:80]!r} holds no row {said.item[:40]!r}", remedy="reload the page"
        )
    if entry.decision:
        return (
            f"{entry.decision.by} decided this row in the meantime ({entry.decision.verdict}); here is the"
            " next one"
        )
    messages = with_answer(entry.item, said.answer) if said.action == "edit" else ()
    queue.decide(Decision(said.item, said.of, said.action, messages, by=said.by, why=said.why))
    return ""


def _undo(queue: ReviewQueue, said: Word) -> tuple[str, Item | None]:
    entry = queue.get(said.of, said.item)
    if entry is None or entry.decision is None:
        return "that row is undecided already", entry.item if entry else None
    if entry.decision.by != said.by.strip():
        return f"{entry.decision.by} decided that row later; it stays so", None
    queue.undo(said.item, said.of, by=said.by)
    return "", entry.item


def _show(item: Item, root: Path) -> dict[str, Any]:
    before, answer = split_answer(item.messages)
    shown = any(turn.media for turn in before)
    pictures = MediaStore.read(root / "data/raw") if shown else MediaStore()
    meta = [
        item.draft,
        item.kind,
        item.id[:12],
        *(f"{key}: {value}" for key, value in item.meta.items() if value not in (None, "")),
    ]
    turns = [
        {"role": turn.role, "content": turn.content}
        | ({"pictures": [_picture(name, pictures) for name in turn.media]} if turn.media else {})
        for turn in before
    ]
    return {
        "id": item.id,
        "draft": item.draft,
        "turns": turns,
        "answer": answer,
        "earlier": item.earlier,
        "passage": item.passage,
        "doubts": list(item.doubts),
        "meta": " · ".join(meta),
    }


def _picture(name: str, pictures: MediaStore) -> str:
    """Return a medium as a data URI, which the page's policy allows; empty if its batch is not here."""
    if name not in pictures:
        return ""
    return (
        data_uri(name, pictures[name])
        if is_sound(name)
        else data_uri("shown.jpg", shrink(pictures[name], SIDE))
    )


def _describe(draft: DraftFigures) -> str:
    figures = (
        f"{draft.items} rows: {draft.accepted} accepted, {draft.edited} edited, "
        f"{draft.rejected} rejected, {draft.waiting} wait"
    )
    return f"{draft.name}, {figures}{', is a batch' if draft.taken else ''}"
