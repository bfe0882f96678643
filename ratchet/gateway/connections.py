"""Hold connections on a short leash: time limits that uvicorn lacks, and room for health checks.

uvicorn waits without end for a request's headers and for a client that does not read its answer. A client
that opens thousands of connections and sends half a header would keep everybody else out.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any
from weakref import WeakKeyDictionary

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from ratchet.gateway.state import PROBES

HEADER_SECONDS = 10.0  # from a connection's start, or a later request's first byte, to the end of its headers
READ_SECONDS = 60.0  # in which a client has to read on, once its buffers are full
MOST_REQUESTS = 2048  # under way at once; twice as many connections stay open
OTHER_FILES = 256  # descriptors for the log, models and upstreams
WANTED_FILES = 65_536


def most_requests() -> int:
    """Raise the limit of open files where the system allows it; return how many requests fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        soft = min(WANTED_FILES, hard) if hard != resource.RLIM_INFINITY else WANTED_FILES
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(16, min(MOST_REQUESTS, (soft - OTHER_FILES) // 2))


class Connection(HttpToolsProtocol):
    """uvicorn's connection with these limits.

    - Headers have to be complete within `header_seconds`; a body has its own limit (`limits.read_body`).
    - A client that stops reading is cut off after `read_seconds`.
    - Over 2 · `most` connections, the one that has been without a request the longest is closed.
    - With `most` requests under way others get 503, except health checks, which are always answered.
    """

    most = MOST_REQUESTS
    header_seconds = HEADER_SECONDS
    read_seconds = READ_SECONDS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Of this server, the connections without a request, the longest first.
        self._idle = _IDLE.setdefault(self.server_state, {})
        self._in_headers = False
        self._header_timer: asyncio.TimerHandle | None = None
        self._read_timer: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way: none has come, or its headers are not complete."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle[self] = None
        self._await_headers()
        if len(self.connections) > 2 * self.most:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.pop(self, None)
        self._end_header_timer()
        self._end_read_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_idle and not self.transport.is_closing():
            self._await_headers()

    def on_message_begin(self) -> None:
        self._in_headers = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._idle.pop(self, None)
        self._end_header_timer()
        is_full = len(self.tasks) >= self.most and self.url.partition(b"?")[0].decode("latin-1") not in PROBES
        self.limit_concurrency = 0 if is_full else None  # uvicorn answers 503 where it is reached
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.is_idle and not self.transport.is_closing():
            self._idle[self] = None
            if self._in_headers:
                self._await_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self._read_timer or self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_read_timer()
        super().resume_writing()

    def _await_headers(self) -> None:
        self._header_timer = self._header_timer or self.loop.call_later(
            self.header_seconds, self.transport.abort
        )

    def _end_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


_IDLE: WeakKeyDictionary[ServerState, dict[Connection, None]] = WeakKeyDictionary()
