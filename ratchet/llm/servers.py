"""Spread requests over several servers of one model: the least busy one answers, a failing one is left alone.

A server that fails gets a pause, which doubles up to a minute, and its requests go to the others at once. A
request that takes far longer than most is sent to a second server too, and the first answer counts. So one
slow or dead server delays nothing, as long as another one works.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from ratchet.config.synthesis import EndpointConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds
SAMPLES = 64  # finished requests, the newest, from which the usual time is taken
TIMES_USUAL, LEAST_PATIENCE = 3.0, 1.0  # times the median, and seconds, after which a second server is asked
LOOK_SECONDS = 0.1

Answer = TypeVar("Answer")


def urls_of(config: EndpointConfig) -> list[str]:
    """Return the base URLs of all servers."""
    return [config.url, *config.more_urls]


def width_of(config: EndpointConfig) -> int:
    """Return how many requests may be under way at all servers together."""
    return config.parallel * len(urls_of(config))


class Server:
    """One server: its connections, the requests under way, and until when it is left alone."""

    def __init__(self, url: str, config: EndpointConfig, headers: dict[str, str]) -> None:
        self.url = url.rstrip("/")
        self.under_way = 0
        self.paused_until = self._next_start = 0.0  # by the monotonic clock
        self._pause = FIRST_PAUSE
        self._spacing = 60.0 / config.requests_per_minute if config.requests_per_minute else 0.0
        local = urlsplit(url).hostname in LOOPBACK
        self.http = httpx.AsyncClient(
            timeout=httpx.Timeout(config.timeout, connect=min(10.0, config.timeout)),
            limits=httpx.Limits(
                max_connections=config.parallel,
                max_keepalive_connections=config.parallel,
                keepalive_expiry=3.0,  # seconds; uvicorn closes an idle connection after 5
            ),
            headers={"content-type": "application/json", **headers},
            trust_env=not local,  # a proxy from the environment cannot reach our loopback
        )

    @property
    def rests(self) -> bool:
        return time.monotonic() < self.paused_until

    def failed(self, retry_after: float | None) -> None:
        """Leave the server alone for a while, or for as long as it asked."""
        self.paused_until = time.monotonic() + (retry_after or self._pause)
        self._pause = min(LONGEST_PAUSE, 2 * self._pause)

    def worked(self) -> None:
        self._pause, self.paused_until = FIRST_PAUSE, 0.0

    def hold_back(self, seconds: float) -> None:
        """Start no request for so long."""
        self._next_start = max(self._next_start, time.monotonic() + seconds)

    async def pace(self) -> None:
        """Wait for this request's turn: `requests_per_minute` spaces the starts evenly."""
        now = time.monotonic()
        start = max(now, self._next_start)
        if self._spacing:
            self._next_start = start + self._spacing
        if start > now:
            await asyncio.sleep(start - now)


class Servers:
    """The servers of one model, with at most `parallel` requests under way at each."""

    def __init__(self, config: EndpointConfig, headers: dict[str, str]) -> None:
        self.all = [Server(url, config, headers) for url in urls_of(config)]
        self._parallel = config.parallel
        self._freed = asyncio.Condition()
        self._seconds: deque[float] = deque(maxlen=SAMPLES)

    async def close(self) -> None:
        for server in self.all:
            await server.http.aclose()

    def others(self, tried: Collection[Server]) -> list[Server]:
        """Return the servers that may take a request which failed at `tried`."""
        return [server for server in self.all if server not in tried and not server.rests]

    async def send(self, ask: Callable[[Server], Awaitable[Answer]], tried: Sequence[Server]) -> Answer:
        """Return the first answer of the least busy server, or of a second one where the first is slow.

        Raises what `ask` raises, when no server asked has an answer.
        """
        server = await self._take(tried)
        began, asked = time.monotonic(), [server]
        first = asyncio.ensure_future(self._run(ask, server))
        running = {first}
        try:
            while True:
                look = LOOK_SECONDS if len(self.all) > len(asked) == 1 else None
                done, running = await asyncio.wait(running, timeout=look, return_when=asyncio.FIRST_COMPLETED)
                good = [one for one in done if not one.exception()]
                if good and first in running:
                    server.failed(None)  # the second one overtook it
                if good or (done and not running):
                    return (good or list(done))[0].result()
                late = len(asked) == 1 and time.monotonic() - began > self._patience()
                if late and (second := self._free([*tried, *asked])):
                    second.under_way += 1
                    asked.append(second)
                    running.add(asyncio.ensure_future(self._run(ask, second)))
        finally:
            for one in running:
                one.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, ask: Callable[[Server], Awaitable[Answer]], server: Server) -> Answer:
        began = time.monotonic()
        try:
            answer = await ask(server)
            self._seconds.append(time.monotonic() - began)
            return answer
        finally:
            server.under_way -= 1
            async with self._freed:
                self._freed.notify_all()

    async def _take(self, tried: Sequence[Server]) -> Server:
        async with self._freed:
            while not (server := self._free(tried) or self._free(tried, resting=True)):
                await self._freed.wait()
            server.under_way += 1
            return server

    def _free(self, tried: Sequence[Server], *, resting: bool = False) -> Server | None:
        """Return the least busy server with room; a resting one only where none other is left to ask."""
        left = self.others(tried)
        if resting:
            left = [] if left else [server for server in self.all if server not in tried]
        room = [server for server in left if server.under_way < self._parallel]
        return min(
            room, key=lambda server: (server.paused_until if resting else 0, server.under_way), default=None
        )

    def _patience(self) -> float:
        """Return the seconds after which a request is slow, compared with the others."""
        if not self._seconds:
            return float("inf")
        return max(LEAST_PATIENCE, TIMES_USUAL * statistics.median(self._seconds))
