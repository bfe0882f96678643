"""Answer with models in this process: the engine `local`, with one base in memory and an adapter per version.

Requests of all versions are decoded together if their methods allow it. One thread owns the models. It works
in rounds: run the waiting prompts, then add one token to every row under way. Rows join and leave between
rounds (continuous batching, Yu et al. 2022, OSDI); a row keeps the adapter that it began with. Versions are
loaded and unloaded between two rounds, so that none changes during a request. Slow work (checking files,
loading another base) is done in other threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from ratchet.config.params import Config
from ratchet.engines.answering import Row
from ratchet.engines.decoding import Decoder
from ratchet.engines.loaded_model import LoadedModel, batch_place, model_place
from ratchet.engines.vocabulary import Vocabulary
from ratchet.errors import BusyError, RatchetError, ServiceError
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_chat
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, Piece, require_same

CLOSE_SECONDS = 10  # that `close` waits for the thread
log = logging.getLogger("ratchet.gateway")


class LocalEngine:
    """The engine `local`, for one event loop; its thread starts with the first version."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: list[Row] = []  # the thread's own
        self._models: dict[str, LoadedModel] = {}  # by model_place
        self._decoders: dict[str, Decoder] = {}  # by batch_place
        self._served: dict[int, Bundle] = {}
        self._vocabularies: dict[int, Vocabulary] = {}  # by version
        self._pending = 0
        self._loading = asyncio.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def load(self, bundle: Bundle) -> None:
        """Load a version beside the others.

        Raises BaseModelError: it does not fit its base, is broken, or a different version has its number.
        """
        async with self._loading:
            if bundle.version in self._served:
                require_same(self._served[bundle.version], bundle)
                return
            chat, made = await asyncio.to_thread(self._read, bundle)
            await self._do(partial(self._add, bundle, chat, made))

    async def unload(self, version: int) -> None:
        async with self._loading:
            await self._do(partial(self._remove, version))

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Yield pieces, then one Ended.

        Raises BusyError: `gateway.max_queue` wait already; UserError: the prompt does not fit, or its form
        is not supported; ServiceError: the version is not loaded, or decoding failed.
        """
        self._require_open()
        if ask.version not in self._served:
            raise ServiceError(
                f"v{ask.version} is not loaded",
                remedy="come again; the gateway's log says what is in its way",
            )
        if self._pending >= self._config.gateway.max_batch + self._config.gateway.max_queue:
            raise BusyError(
                f"{self._pending} requests are under way or wait; "
                f"gateway.max_queue is {self._config.gateway.max_queue}",
                remedy="come again in a second",
            )
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | Ended | RatchetError]()
        row = Row(ask, time.perf_counter(), partial(_pass_on, loop, pieces))
        await self._equip(row)
        self._pending += 1
        self._inbox.put(lambda: self._waiting.append(row))  # each round replaces `_waiting`
        try:
            while not isinstance(piece := await pieces.get(), Ended):
                if isinstance(piece, RatchetError):
                    raise piece
                yield piece
            yield piece
        finally:
            row.cancelled = True  # the thread drops the row in its next round
            self._pending -= 1

    async def close(self) -> None:
        """Stop the thread; requests under way end with an error."""
        self._closed = True
        if self._thread:
            self._inbox.put(None)
            await asyncio.to_thread(self._thread.join, CLOSE_SECONDS)

    async def _equip(self, row: Row) -> None:
        """Make what the row's form or scores need, outside the models' thread: it takes up to a second."""
        vocabulary = self._vocabularies[row.ask.version]
        if row.ask.form is not None or row.ask.must_call:
            row.constraint = await asyncio.to_thread(vocabulary.constrain, row.ask)
        if row.ask.top_logprobs is not None:
            await asyncio.to_thread(vocabulary.prepare)
            row.vocabulary = vocabulary

    def _require_open(self) -> None:
        if self._closed:
            raise ServiceError("the gateway stops", remedy="come again when it has started anew")

    def _read(self, bundle: Bundle) -> tuple[ChatFormat, LoadedModel | None]:
        """Check a version and load its tokenizer, and a model unless one in memory fits.

        It runs in its own thread, while requests are answered.
        """
        check_adapter_fits(bundle)
        chat = load_chat(bundle.adapter)
        return chat, None if model_place(bundle) in self._models else LoadedModel(bundle)

    async def _do(self, work: Callable[[], None]) -> None:
        """Run `work` in the models' thread, between two rounds."""
        self._require_open()
        done: Future[None] = Future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
            self._thread.start()
        self._inbox.put(partial(_settle, done, work))
        await asyncio.wrap_future(done)

    # --- in the thread ---

    def _work(self) -> None:
        _leave_a_core()
        while self._take_in():
            self._round()
        stopping = ServiceError("the gateway stops", remedy="come again when it has started anew")
        self._refuse(self._waiting, stopping)
        for decoder in self._decoders.values():
            decoder.fail_all(stopping, [])

    def _take_in(self) -> bool:
        """Do the work queued since the last round; if there is nothing to decode, wait for more.

        Return False when the engine closes.
        """
        while True:
            busy = bool(self._waiting) or any(decoder.size for decoder in self._decoders.values())
            try:
                work = self._inbox.get(block=not busy)
            except queue.Empty:
                return True
            if work is None:
                return False
            work()

    def _round(self) -> None:
        self._waiting = [row for row in self._waiting if not row.cancelled]
        self._refuse(
            [row for row in self._waiting if row.ask.version not in self._served],
            ServiceError("the version was unloaded", remedy="come again"),
        )
        for decoder in list(self._decoders.values()):
            room = self._config.gateway.max_batch - sum(one.size for one in self._decoders.values())
            joining = [row for row in self._waiting if row.ask.version in decoder.versions][:room]
            self._waiting = [row for row in self._waiting if row not in joining]
            try:
                decoder.round(joining)
            except Exception as error:  # a bug of ours; no client may wait forever
                log.exception("a round failed")
                decoder.fail_all(
                    ServiceError(
                        f"the engine failed: {error!r}", remedy="the gateway's log has the traceback"
                    ),
                    joining,
                )

    def _refuse(self, rows: list[Row], error: RatchetError) -> None:
        self._waiting = [row for row in self._waiting if row not in rows]
        for row in rows:
            row.tell(error)

    def _add(self, bundle: Bundle, chat: ChatFormat, made: LoadedModel | None) -> None:
        model = made or self._models[model_place(bundle)]
        decoder = self._decoders.get(batch_place(bundle)) or Decoder(
            model,
            measure_prompts=self._config.gateway.prompt_nll,
            keep_features=self._config.request_log.keeps_features,
        )
        decoder.add(bundle, chat)
        self._models[model_place(bundle)], self._decoders[batch_place(bundle)] = model, decoder
        self._vocabularies[bundle.version] = Vocabulary(chat, model.vocab_size)
        self._served[bundle.version] = bundle

    def _remove(self, version: int) -> None:
        """Unload a version, and its model if no other version uses it."""
        bundle = self._served.pop(version, None)
        if bundle is None:
            return
        self._vocabularies.pop(version, None)
        place, decoder = model_place(bundle), self._decoders[batch_place(bundle)]
        decoder.remove(version)
        if not decoder.versions:
            del self._decoders[batch_place(bundle)]
        if not self._models[place].versions:
            del self._models[place]


def _leave_a_core() -> None:
    """Leave a CPU core to the event loop and to other processes."""
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))


def _settle(done: Future[None], work: Callable[[], None]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        work()
        done.set_result(None)
    except BaseException as error:  # noqa: BLE001  (it is raised again where it was asked for)
        done.set_exception(error)


def _pass_on(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Any], piece: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)
