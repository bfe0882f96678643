"""Serve POST /v1/chat/completions and /v1/responses: choose a version, send the engine's answer, whole or as
a stream, and log the exchange.

Of several choices (`n`) only the first is logged, so that one request counts once for the monitor and for
feedback. Requests that are refused before a version is chosen (no key, malformed, unknown model) are counted
in the metrics only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from ratchet.config.serving import GatewayConfig
from ratchet.errors import MediaError, ServiceError
from ratchet.gateway.auth import Key
from ratchet.gateway.identity import CHAT, RESPONSE
from ratchet.gateway.limits import Gone, patience, read_body
from ratchet.gateway.response_encoder import ResponseEncoder
from ratchet.gateway.responses import parse_response
from ratchet.gateway.routing import Choice
from ratchet.gateway.state import Parts
from ratchet.monitoring.pictures import with_features
from ratchet.monitoring.request_records import Logged
from ratchet.serving.engine import Ask, Ended, Engine, Piece
from ratchet.serving.faults import CANCELLED, Fault, to_fault
from ratchet.serving.protocol import Answer, Chat, ChatEncoder, Encoder, count_tokens, parse_chat

log = logging.getLogger("ratchet.gateway")
JSON, EVENTS = (b"content-type", b"application/json"), (b"content-type", b"text/event-stream; charset=utf-8")


class Form(NamedTuple):
    """One of the protocols: how its ids begin, its parser, and its encoder."""

    head: str
    parse: Callable[[bytes, GatewayConfig], Chat]
    encoder: Callable[[str, int, str, Any], Encoder]


FORMS = {
    "/v1/chat/completions": Form(CHAT, parse_chat, ChatEncoder),
    "/v1/responses": Form(RESPONSE, parse_response, ResponseEncoder),
}


@dataclass
class Exchange:
    """One request and its outcome.

    `at` is in seconds since 1970; `started` is on time.perf_counter, from which latencies are measured.
    """

    id: str
    user: str
    chat: Chat
    choice: Choice
    at: float
    started: float
    answers: list[Answer] = field(default_factory=list)
    first_ms: float = 0.0
    fault: Fault | None = None
    gone: bool = False

    @property
    def status(self) -> int:
        return CANCELLED if self.gone else self.fault.status if self.fault else 200

    def add(self, index: int, piece: Piece) -> None:
        if (piece.text or piece.calls or piece.reasoning) and not self.first_ms:
            self.first_ms = self.elapsed_ms()
        self.answers[index].add(piece)

    def elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1000

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-request-id", self.id.encode()),
            (b"x-ratchet-version", b"%d" % self.choice.version),
            (b"x-ratchet-arm", self.choice.arm.encode()),
        ]

    def to_logged(self) -> Logged:
        first, choice = self.answers[0], self.choice
        ended = first.ended or Ended("", 0, 0)
        return Logged(
            id=self.id,
            at=self.at,
            user=self.user,
            arm=choice.arm,
            version=choice.version,
            rollout=choice.rollout_id,
            step=choice.step,
            messages=self.chat.logged(),
            answer=first.said,
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
            pictures=with_features(self.chat.looks, ended.features),
        )


class Completions:
    """The endpoint of a protocol, as an ASGI app, to notice a client's hang-up while the engine works."""

    def __init__(self, parts: Parts, path: str) -> None:
        """Serve the protocol of `path`, one of FORMS."""
        self._parts, self._form = parts, FORMS[path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises Fault only before a version is chosen."""
        parts, headers = self._parts, Headers(scope=scope)
        key = parts.admit(headers, "infer")
        raw = await read_body(receive, headers.get("content-length", ""), parts.config.gateway.max_body_bytes)
        if b"image_url" in raw or b"input_audio" in raw:  # decoding pictures takes up to a second
            chat = await asyncio.to_thread(self._form.parse, raw, parts.config.gateway)
        else:
            chat = self._form.parse(raw, parts.config.gateway)
        exchange = self._open(chat, headers, key)
        fingerprint = f"{parts.config.project.name}@v{exchange.choice.version}"
        encoder = self._form.encoder(exchange.id, int(exchange.at), fingerprint, exchange.chat)
        reply = Streamed(send, exchange, encoder) if exchange.chat.stream else Whole(send, exchange, encoder)
        try:
            await self._answer(exchange, reply, receive)
        except Gone:
            exchange.gone = True
        except (
            asyncio.CancelledError
        ):  # from uvicorn, when its time to drain is over; the error is still sent
            exchange.fault = Fault(
                503,
                "the gateway stops",
                remedy="send it again in some seconds",
                code="stopping",
                retry_after=5,
            )
        except MediaError as error:
            exchange.fault = exchange.chat.fault_of(error)
        except Exception as error:  # noqa: BLE001  (it is logged, recorded and told to the client)
            exchange.fault = _note(error, exchange.id)
        finally:
            self._record(exchange)
        if not exchange.gone:
            await reply.end()

    def _open(self, chat: Chat, headers: Headers, key: Key) -> Exchange:
        """Choose the arm by the user's pseudonym, as the log has it, so that routing and analysis agree."""
        id = self._parts.ids.make(self._form.head)
        user = self._parts.ids.pseudonym(chat.user or headers.get("x-session-id", ""))
        choice = self._parts.choose(chat.model, user or id, key)
        answers = [Answer() for _ in range(chat.num_choices)]
        return Exchange(id, user, chat, choice, time.time(), time.perf_counter(), answers)

    async def _answer(self, exchange: Exchange, reply: Whole | Streamed, receive: Receive) -> None:
        parts, version = self._parts, exchange.choice.version
        chat = exchange.chat
        pieces = _answer_all(
            parts.engine, [chat.ask(exchange.id, version, choice) for choice in range(chat.num_choices)]
        )
        with parts.slots.hold(chat.num_choices):
            async with (
                parts.fleet.hold(version),
                patience(receive, parts.config.gateway.timeout),
                aclosing(pieces),
            ):
                async for index, piece in pieces:
                    if isinstance(piece, Piece):
                        exchange.add(index, piece)
                        await reply.add(index, piece)
                    else:
                        exchange.answers[index].ended = piece
        if not all(answer.ended for answer in exchange.answers):
            raise ServiceError("the engine's answer broke off", remedy="see the gateway's log")

    def _record(self, exchange: Exchange) -> None:
        logged = exchange.to_logged()
        self._parts.log.put(logged)
        if exchange.chat.media:
            asyncio.get_running_loop().run_in_executor(
                None, self._parts.log.keep_pictures, exchange.chat.media
            )
        self._parts.meters.ended(
            logged.status,
            logged.arm,
            logged.version,
            seconds=logged.latency_ms / 1000,
            first=logged.first_ms / 1000,
            prompt_tokens=logged.prompt_tokens,
            answer_tokens=count_tokens(exchange.answers)[1],
        )


async def _answer_all(engine: Engine, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Piece | Ended], None]:
    """Yield the pieces and ends of all choices as they arrive, each with its choice's number.

    Closing the generator, as when the client hangs up, stops the work.
    """
    if len(asks) == 1:
        pieces = engine.answer(asks[0])
        assert isinstance(pieces, AsyncGenerator)
        async with aclosing(pieces):
            async for piece in pieces:
                yield 0, piece
        return
    heard: asyncio.Queue[tuple[int, Piece | Ended | Exception]] = asyncio.Queue()
    tasks = [asyncio.create_task(_hear(engine, ask, index, heard)) for index, ask in enumerate(asks)]
    try:
        left = len(asks)
        while left:
            index, said = await heard.get()
            if isinstance(said, Exception):
                raise said
            left -= isinstance(said, Ended)
            yield index, said
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _hear(
    engine: Engine, ask: Ask, index: int, heard: asyncio.Queue[tuple[int, Piece | Ended | Exception]]
) -> None:
    pieces = engine.answer(ask)
    assert isinstance(pieces, AsyncGenerator)
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                heard.put_nowait((index, piece))
    except Exception as error:  # noqa: BLE001  (it is raised again where the choices are read)
        heard.put_nowait((index, error))


class Whole:
    """A reply in one JSON body."""

    def __init__(self, send: Send, exchange: Exchange, encoder: Encoder) -> None:
        self._send, self._exchange, self._encoder = send, exchange, encoder

    async def add(self, index: int, piece: Piece) -> None:
        pass

    async def end(self) -> None:
        exchange = self._exchange
        if exchange.fault:
            await send_fault(self._send, exchange.fault, exchange.headers())
        else:
            body = self._encoder.whole(exchange.answers)
            await _send_whole(self._send, 200, body, exchange.headers())


class Streamed:
    """A reply as server-sent events.

    The status is sent with the first piece, so that a failure before it gets its own status.
    """

    def __init__(self, send: Send, exchange: Exchange, encoder: Encoder) -> None:
        self._send, self._exchange, self._encoder = send, exchange, encoder
        self._begun = False

    async def add(self, index: int, piece: Piece) -> None:
        await self._begin()
        await self._write(self._encoder.piece(index, piece))

    async def end(self) -> None:
        exchange = self._exchange
        if exchange.fault and not self._begun:
            await send_fault(self._send, exchange.fault, exchange.headers())
            return
        await self._begin()
        if exchange.fault:
            await self._write(self._encoder.fail(exchange.fault), more=False)
            return
        await self._write(self._encoder.end(exchange.answers), more=False)

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
        await self._write(self._encoder.begin())

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
    """Turn an error into a fault, and log it.

    An unforeseen error is logged with its traceback, a fault of the gateway or the engine in one line, and a
    fault of the client not at all.
    """
    fault = to_fault(error)
    if fault.status == 500:
        log.error("%s failed", id, exc_info=error)
    elif fault.status > 500:
        log.warning(
            "%s: %d %r", id, fault.status, fault.message[:300]
        )  # quoted, since the text of an upstream may hold anything
    return fault
