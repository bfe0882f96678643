"""The engine `local`: one base in memory, an adapter a version, requests of all versions decoded together.

One thread owns the models. It works in rounds: take in what waits (one forward pass over their prompts), then one token for
everybody under way. Rows join and leave between rounds (continuous batching, Yu et al. 2022, OSDI); a row keeps the adapter that
it began with. Between two rounds the thread loads and unloads versions, so nothing is swapped under a request.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from ratchet.config import Config
from ratchet.errors import BusyError, RatchetError, ServiceError
from ratchet.gateway.decoding import Decoder, Row
from ratchet.gateway.engine import Ask, Ended, Piece
from ratchet.serving import Bundle

IDLE_SECONDS = 0.5


class LocalEngine:
    """Used from one event loop; the thread starts with the first version."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[Row] = []  # the thread's own
        self._decoders: dict[str, Decoder] = {}  # base folder → its model with all adapters on it
        self._home: dict[int, str] = {}  # version → base folder
        self._pending = 0
        self._thread: threading.Thread | None = None

    async def load(self, bundle: Bundle) -> None:
        await self._do(lambda: self._load(bundle))

    async def unload(self, version: int) -> None:
        await self._do(lambda: self._unload(version))

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Raises BusyError: `gateway.max_queue` wait already; UserError: the prompt does not fit; ServiceError: the version is not loaded."""
        if ask.version not in self._home:
            raise ServiceError(f"v{ask.version} is not loaded", remedy="come again; the gateway's log says what is in its way")
        if self._pending >= self._config.gateway.max_batch + self._config.gateway.max_queue:
            raise BusyError(f"{self._pending} requests are under way or wait; gateway.max_queue is {self._config.gateway.max_queue}", remedy="come again in a second")
        row, loop, pieces = Row(ask, time.perf_counter()), asyncio.get_running_loop(), asyncio.Queue[Piece | Ended | RatchetError]()
        row.tell = lambda piece: _pass_on(loop, pieces, piece)
        self._pending += 1
        self._inbox.put(lambda: self._waiting.append(row))
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, RatchetError):
                    raise piece
                yield piece
                if isinstance(piece, Ended):
                    return
        finally:
            row.cancelled = True  # the thread lets go of it at its next round
            self._pending -= 1

    async def close(self) -> None:
        if self._thread and self._thread.is_alive():
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join, 10)

    async def _do(self, work: Callable[[], None]) -> None:
        """Run it in the thread, between two rounds."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                work()
                done.set_result(None)
            except BaseException as error:  # noqa: BLE001  (it is raised again where it was asked for)
                done.set_exception(error)

        self._start()
        self._inbox.put(run)
        await asyncio.wrap_future(done)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self._thread.start()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._take_in():
            for decoder in list(self._decoders.values()):
                waiting = [row for row in self._waiting if self._decoders.get(self._home.get(row.ask.version, "")) is decoder]
                room = self._config.gateway.max_batch - sum(one.size for one in self._decoders.values())
                joining = waiting[: max(0, room)]
                self._waiting = [row for row in self._waiting if row not in joining]
                decoder.round(joining)
            self._refuse_homeless()

    def _take_in(self) -> bool:
        """All that was asked for since the last round; waits while there is nothing to decode. False at the end."""
        busy = bool(self._waiting) or any(decoder.size for decoder in self._decoders.values())
        while True:
            try:
                work = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()
            busy = True

    def _refuse_homeless(self) -> None:
        for row in [row for row in self._waiting if row.ask.version not in self._home]:
            self._waiting.remove(row)
            row.tell(ServiceError(f"v{row.ask.version} was unloaded", remedy="come again: another version is in charge now"))

    def _load(self, bundle: Bundle) -> None:
        if bundle.version in self._home:
            return
        key = f"{bundle.base} {bundle.method}"
        decoder = self._decoders.get(key) or Decoder(bundle.base, bundle.method, measure_prompts=self._config.gateway.prompt_nll)
        decoder.add(bundle)
        self._decoders[key] = decoder
        self._home[bundle.version] = key

    def _unload(self, version: int) -> None:
        key = self._home.pop(version, None)
        if key is None:
            return
        self._decoders[key].remove(version)
        if not self._decoders[key].versions:
            del self._decoders[key]


def _pass_on(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Any], piece: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)
