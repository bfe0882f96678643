"""Limits of the gateway: bytes of a body, requests at once and per minute, seconds of an answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.types import Receive

from ratchet.serving.faults import Fault

BODY_SECONDS = 10.0  # a client that needs longer only holds the connection open


class Gone(Exception):
    """The client hung up, so no answer is sent."""


async def read_body(receive: Receive, declared: str, most: int) -> bytes:
    """Read a body of at most `most` bytes; `declared` is the header `content-length`.

    Raises Fault (413, 408) and Gone.
    """
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(declared, most)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise _too_large(f"{size} or more", most, hangs_up=True)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise Fault(
            408,
            f"the body did not come within {BODY_SECONDS:.0f} s; {size} bytes did",
            remedy="send it at once",
            hangs_up=True,
        ) from None


def _too_large(size: str, most: int, *, hangs_up: bool = False) -> Fault:
    """Return the fault for a body that is too large; `hangs_up` closes the connection.

    If the client declared the size, the connection stays open and the body is discarded, since a client whose
    connection is cut while it sends may never see the answer.
    """
    return Fault(
        413,
        f"the body has {size} bytes, wanted at most {most}",
        remedy="send fewer or shorter messages, pictures or recordings (gateway.max_body_bytes)",
        code="body_too_large",
        hangs_up=hangs_up,
    )


class Rate:
    """A limit of `per_minute` requests for each name; 0 is no limit.

    Each name has a token bucket that fills steadily and holds a minute's worth, so such a burst is accepted.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # name → (requests left, at which time)

    def take(self, name: str) -> None:
        """Count a request. Raises Fault(429) with the seconds until the next one is accepted."""
        if not self._per_minute:
            return
        now, a_second = self._clock(), self._per_minute / 60
        left, since = self._buckets.get(name, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * a_second)
        if left < 1:
            wait = math.ceil((1 - left) / a_second)
            raise Fault(
                429,
                f"over {self._per_minute} requests in a minute",
                remedy=f"come again in {wait} s (gateway.requests_per_minute)",
                code="rate_limit",
                retry_after=wait,
            )
        self._buckets[name] = (left - 1, now)


class Slots:
    """A limit of `most` answers under way at once, including those that wait."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.held = 0

    @contextmanager
    def hold(self, count: int = 1) -> Iterator[None]:
        """Hold slots until the block ends. Raises Fault(429) when fewer are free."""
        if self.held + count > self._most:
            raise Fault(
                429,
                f"{self.held} requests are under way, the most that are taken",
                remedy="come again in a second (gateway.max_queue)",
                code="busy",
                retry_after=1,
            )
        self.held += count
        try:
            yield
        finally:
            self.held -= count


@asynccontextmanager
async def patience(receive: Receive, seconds: float) -> AsyncIterator[None]:
    """End the block after `seconds` (raises Fault(504)) or when the client hangs up (raises Gone)."""
    watch: asyncio.Task[None] | None = None
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            watch = asyncio.create_task(_await_hangup(receive, deadline))
            try:
                yield
            finally:
                watch.cancel()
    except TimeoutError:
        if not deadline.expired():
            raise
        if watch is not None and watch.done() and not watch.cancelled():
            raise Gone from None
        raise Fault(
            504,
            f"the answer took over {seconds:g} s",
            remedy="ask for fewer tokens, or come again when less goes on (gateway.timeout)",
            code="timeout",
        ) from None


async def _await_hangup(receive: Receive, deadline: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    deadline.reschedule(asyncio.get_running_loop().time())
