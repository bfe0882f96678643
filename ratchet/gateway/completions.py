"""POST /v1/chat/completions: a version is chosen, the engine answers, whole or as it comes, and how it ended
is written down.

What was refused before a version was chosen (no key, malformed, unknown model) is counted in the metrics
only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from ratchet.errors import ServiceError
from ratchet.gateway.auth import Key
from ratchet.gateway.limits import Gone, patience, read_body
from ratchet.gateway.routing import Choice
from ratchet.gateway.state import Parts
from ratchet.monitoring.request_records import Logged
from ratchet.serving.engine import Ended, Piece
from ratchet.serving.faults import CANCELLED, Fault, to_fault
from ratchet.serving.protocol import DONE, Answered, Chat, error_event, parse_chat

log = logging.getLogger("ratchet.gateway")
JSON, EVENTS = (b"content-type", b"application/json"), (b"content-type", b"text/event-stream; charset=utf-8")


@dataclass
class Exchange:
    """One request and what became of it.

    `at` is in seconds since 1970, `started` on the clock that latencies are measured with.
    """

    id: str
    user: str
    chat: Chat
    choice: Choice
    at: float
    started: float
    texts: list[str] = field(default_factory=list)
    first_ms: float = 0.0
    ended: Ended | None = None
    fault: Fault | None = None
    gone: bool = False

    @property
    def status(self) -> int:
        return CANCELLED if self.gone else self.fault.status if self.fault else 200

    def add(self, text: str) -> None:
        if not self.texts:
            self.first_ms = self.elapsed_ms()
        self.texts.append(text)

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1000

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self.id.encode()),
            (b"x-ratchet-version", b"%d" % self.choice.version),
            (b"x-ratchet-arm", self.choice.arm.encode()),
        ]

    def to_logged(self) -> Logged:
        ended, choice = self.ended or Ended("", 0, 0), self.choice
        return Logged(
            id=self.id,
            at=self.at,
            user=self.user,
            arm=choice.arm,
            version=choice.version,
            rollout=choice.rollout_id,
            step=choice.step,
            messages=tuple((message.role, message.content) for message in self.chat.messages),
            answer="".join(self.texts),
            finish="cancelled" if self.gone else "error" if self.fault else ended.finish,
            status=self.status,
            error=self.fault.message if self.fault else "",
            prompt_tokens=ended.prompt_tokens,
            answer_tokens=ended.answer_tokens,
            latency_ms=self.elapsed_ms(),
            first_ms=self.first_ms,
            queue_ms=ended.queue_ms,
            prompt_nll=ended.prompt_nll,
            answer_nll=ended.answer_nll,
        )


class Completions:
    """An ASGI app, so that the client's hanging up is seen while the engine works."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises Fault as long as no version is chosen."""
        parts, headers = self._parts, Headers(scope=scope)
        key = parts.admit(headers, "infer")
        raw = await read_body(receive, headers.get("content-length", ""), parts.config.gateway.max_body_bytes)
        exchange = self._open(parse_chat(raw, parts.config.gateway), headers, key)
        name = parts.config.project.name
        answered = Answered(
            exchange.id, int(exchange.at), exchange.chat.model, f"{name}@v{exchange.choice.version}"
        )
        reply = (
            Streamed(send, exchange, answered) if exchange.chat.stream else Whole(send, exchange, answered)
        )
        try:
            await self._answer(exchange, reply, receive)
        except Gone:
            exchange.gone = True
        except (
            asyncio.CancelledError
        ):  # from uvicorn, when the time to drain is up: the last word is still sent
            exchange.fault = Fault(
                503,
                "the gateway stops",
                remedy="send it again in some seconds",
                code="stopping",
                retry_after=5,
            )
        except Exception as error:  # noqa: BLE001  (it is logged, recorded and told to the client)
            exchange.fault = _note(error, exchange.id)
        finally:
            self._record(exchange)
        if not exchange.gone:
            await reply.end()

    def _open(self, chat: Chat, headers: Headers, key: Key) -> Exchange:
        """Choose the arm by the user's pseudonym, which is what the log has, so that routing and analysis
        agree.
        """
        id = self._parts.ids.make()
        user = self._parts.ids.pseudonym(chat.user or headers.get("x-session-id", ""))
        choice = self._parts.choose(chat.model, user or id, key)
        return Exchange(id, user, chat, choice, at=time.time(), started=time.perf_counter())

    async def _answer(self, exchange: Exchange, reply: Whole | Streamed, receive: Receive) -> None:
        parts, version = self._parts, exchange.choice.version
        pieces = parts.engine.answer(exchange.chat.ask(exchange.id, version))
        assert isinstance(pieces, AsyncGenerator)  # whose closing stops the work when the client hangs up
        with parts.slots.hold():
            async with (
                parts.fleet.hold(version),
                patience(receive, parts.config.gateway.timeout),
                aclosing(pieces),
            ):
                async for piece in pieces:
                    if isinstance(piece, Piece):
                        exchange.add(piece.text)
                        await reply.add(piece.text)
                    else:
                        exchange.ended = piece
        if exchange.ended is None:
            raise ServiceError("the engine's answer broke off", remedy="see the gateway's log")

    def _record(self, exchange: Exchange) -> None:
        logged = exchange.to_logged()
        self._parts.log.put(logged)
        self._parts.meters.ended(
            logged.status,
            logged.arm,
            logged.version,
            seconds=logged.latency_ms / 1000,
            first=logged.first_ms / 1000,
            prompt_tokens=logged.prompt_tokens,
            answer_tokens=logged.answer_tokens,
        )


class Whole:
    """One JSON body."""

    def __init__(self, send: Send, exchange: Exchange, answered: Answered) -> None:
        self._send, self._exchange, self._answered = send, exchange, answered

    async def add(self, text: str) -> None:
        pass

    async def end(self) -> None:
        exchange = self._exchange
        if exchange.fault:
            await send_fault(self._send, exchange.fault, exchange.headers())
        else:
            assert exchange.ended is not None
            await _send_whole(
                self._send,
                200,
                self._answered.whole("".join(exchange.texts), exchange.ended),
                exchange.headers(),
            )


class Streamed:
    """Server-sent events.

    The status is sent with the first text, so that what fails before it has a status of its own.
    """

    def __init__(self, send: Send, exchange: Exchange, answered: Answered) -> None:
        self._send, self._exchange, self._answered = send, exchange, answered
        self._begun = False

    async def add(self, text: str) -> None:
        await self._begin()
        await self._write(self._answered.chunk({"content": text}))

    async def end(self) -> None:
        exchange, answered = self._exchange, self._answered
        if exchange.fault and not self._begun:
            await send_fault(self._send, exchange.fault, exchange.headers())
            return
        await self._begin()
        if exchange.fault:
            await self._write(error_event(exchange.fault), more=False)
            return
        assert exchange.ended is not None
        usage = answered.usage_chunk(exchange.ended) if exchange.chat.include_usage else b""
        await self._write(answered.chunk({}, exchange.ended.finish) + usage + DONE, more=False)

    async def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        headers = [
            EVENTS,
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            *self._exchange.headers(),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._write(self._answered.chunk({"role": "assistant", "content": ""}))

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def send_fault(send: Send, fault: Fault, headers: list[tuple[bytes, bytes]]) -> None:
    await _send_whole(send, fault.status, fault.body(), [*headers, *fault.headers()])


async def _send_whole(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [JSON, (b"content-length", b"%d" % len(body)), *headers],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _note(error: Exception, id: str) -> Fault:
    """Turn an error into a fault and log it.

    A fault of ours or of the engine's is logged in one line, one that nobody foresaw with its traceback, the
    client's own not at all.
    """
    fault = to_fault(error)
    if fault.status == 500:
        log.error("%s failed", id, exc_info=error)
    elif fault.status > 500:
        log.warning(
            "%s: %d %r", id, fault.status, fault.message[:300]
        )  # quoted: what an upstream said may hold anything
    return fault
