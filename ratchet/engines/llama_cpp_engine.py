"""Answer with llama.cpp, one server process per version: the engine `llama_cpp`, for machines without a GPU.

A version is merged, written as a GGUF file with 16-bit weights, and served on loopback
(`ratchet/engines/llama_cpp_server.py`). Prompts go there as token ids and answers come back as token ids, so
template, stop tokens, text, reasoning and calls are ours, as with the engine `local`, and no text of a user
can become a control token. Not covered: calls that a client enforces (`tool_choice`), prompts' NLL.

An answer is asked for in slices of a few tokens, each on the same slot, whose keys and values llama.cpp
keeps. Its own stream leaves out tokens that end within a character, so text with several tokens per character
would be lost.
"""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from ratchet.config.params import Config
from ratchet.engines.answering import Row
from ratchet.engines.grammars import BLANKS, OBJECT
from ratchet.errors import (
    BaseModelError,
    BusyError,
    ConfigError,
    MediaError,
    RatchetError,
    ServiceError,
    UserError,
)
from ratchet.files import sha256_file, whole_folder, write_json
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_chat
from ratchet.pipeline.integrity import MANIFEST, is_whole
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, Piece, Scored, require_same

SERVER = "ratchet.engines.llama_cpp_server"
FOLDER = "llama_cpp"
END_SECONDS = 5.0
# Tokens of the first slice, soon on the client's screen, and of the others: each slice costs a forward pass.
FIRST, SLICE = 4, 16

log = logging.getLogger("ratchet.gateway")


class Alternative(msgspec.Struct):
    """A token in llama.cpp's list of the likeliest; `logprob` is in nats."""

    id: int
    logprob: float = 0.0
    bytes: list[int] = []

    def scored(self, top: Sequence[Alternative] = ()) -> Scored:
        return Scored(bytes(self.bytes), self.logprob, tuple(other.scored() for other in top))


class Chosen(Alternative):
    top_logprobs: list[Alternative] = []


class Completion(msgspec.Struct):
    """What `/completion` answers; tokens within a character have no probabilities."""

    tokens: list[int] = []
    completion_probabilities: list[Chosen] = []


_decode = msgspec.json.Decoder(Completion)


class Served(NamedTuple):
    bundle: Bundle
    chat: ChatFormat
    process: subprocess.Popen[bytes]
    address: str
    slots: asyncio.Queue[int]  # those that are free


class LlamaCppEngine:
    """Serve one event loop. A GGUF file lies beside its version's adapter, or in `folder`."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        """Check that llama.cpp is here. Raises ConfigError."""
        if find_spec("xllamacpp") is None or find_spec("gguf") is None:
            raise ConfigError(
                "gateway.engine is llama_cpp, and llama.cpp is not installed",
                remedy="uv pip install xllamacpp gguf (the extra `llama-cpp`), or set gateway.engine: local",
            )
        self._config, self._folder = config.gateway, folder
        self._served: dict[int, Served] = {}
        self._pending = 0
        self._loading = asyncio.Lock()
        self._opened: aiohttp.ClientSession | None = None

    async def load(self, bundle: Bundle) -> None:
        """Write the version's GGUF file where it is not there yet, and start its server.

        Raises BaseModelError: the version does not fit, or llama.cpp cannot compute it; ServiceError: the
        server does not start.
        """
        async with self._loading:
            if known := self._served.get(bundle.version):
                require_same(known.bundle, bundle)
                return
            await asyncio.to_thread(check_adapter_fits, bundle)
            chat = await asyncio.to_thread(load_chat, bundle.adapter)
            file = await asyncio.to_thread(self._write, bundle)
            process, address = await asyncio.to_thread(self._start, file, bundle)
            slots: asyncio.Queue[int] = asyncio.Queue()
            for slot in range(self._config.max_batch):
                slots.put_nowait(slot)
            self._served[bundle.version] = Served(bundle, chat, process, address, slots)

    async def unload(self, version: int) -> None:
        if served := self._served.pop(version, None):
            await asyncio.to_thread(_stop, served.process)

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Yield pieces, then one Ended.

        Raises BusyError: `gateway.max_queue` wait already; UserError: the prompt does not fit, or the request
        asks for what this engine cannot hold; ServiceError: the version is not loaded, or its server failed.
        """
        if ask.media:
            raise MediaError(
                "the engine llama_cpp takes no pictures and no recordings",
                remedy="set gateway.engine: local, or leave them out",
            )
        if ask.must_call or (ask.form and ask.tools):
            raise UserError(
                "the engine llama_cpp cannot hold an answer to a tool's schema",
                remedy="send tool_choice: auto without a response_format, or set gateway.engine: local",
            )
        if self._pending >= self._config.max_batch + self._config.max_queue:
            raise BusyError(
                f"{self._pending} requests are under way or wait; "
                f"gateway.max_queue is {self._config.max_queue}",
                remedy="come again in a second",
            )
        heard: deque[Piece | Ended | RatchetError] = deque()
        self._pending += 1
        try:
            async for _ in self.compute(Row(ask, time.perf_counter(), heard.append)):
                while heard:
                    if isinstance(piece := heard.popleft(), RatchetError):
                        raise piece
                    yield piece
        finally:
            self._pending -= 1

    async def compute(self, row: Row) -> AsyncIterator[None]:
        """Compute an answer, whose pieces go to `row.tell`; yield after each slice. Raises ServiceError."""
        served = self._find(row.ask.version)
        slot = await served.slots.get()
        try:
            ended = not row.prepare(served.bundle, served.chat, served.bundle.max_length)
            while not ended:
                ended = _hear(row, await self._complete(row, slot))
                yield
            yield
        finally:
            served.slots.put_nowait(slot)

    def _find(self, version: int) -> Served:
        if version in self._served:
            return self._served[version]
        raise ServiceError(
            f"v{version} is not loaded", remedy="come again; the gateway's log says what is in its way"
        )

    async def _complete(self, row: Row, slot: int) -> Completion:
        """Ask for a slice of an answer, twice if the server died meanwhile. Raises ServiceError."""
        served, body = self._find(row.ask.version), _body(row, slot)
        try:
            return await self._ask(served, body)
        except ServiceError:
            if not await asyncio.to_thread(_has_died, served.process):
                raise
        async with self._loading:
            if self._find(row.ask.version).process is served.process:
                log.warning("llama.cpp died and is started again for v%d", row.ask.version)
                _stop(served.process)
                process, address = await asyncio.to_thread(
                    self._start, self._write(served.bundle), served.bundle
                )
                self._served[row.ask.version] = served._replace(process=process, address=address)
        return await self._ask(self._find(row.ask.version), body)

    async def close(self) -> None:
        for version in list(self._served):
            await self.unload(version)
        if self._opened:
            await self._opened.close()

    async def _ask(self, served: Served, body: dict[str, Any]) -> Completion:
        timeout = aiohttp.ClientTimeout(total=self._config.timeout)
        try:
            async with self._session().post(
                f"{served.address}/completion", json=body, timeout=timeout
            ) as response:
                raw = await response.read()
                if response.status != 200:
                    said = raw[:200].decode(errors="replace")
                    raise ServiceError(f"llama.cpp answered {response.status}: {said}", remedy="come again")
                found = _decode.decode(raw)
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            raise ServiceError(
                f"llama.cpp does not answer for v{served.bundle.version}: {error!r}", remedy="come again"
            ) from None
        if not found.tokens:
            raise ServiceError("llama.cpp gave no token", remedy="come again")
        return found

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._opened = aiohttp.ClientSession(connector=connector)
        return self._opened

    def _write(self, bundle: Bundle) -> Path:
        """Write the GGUF file once, in a process whose memory is free again afterwards.

        One whose bytes have changed since is written anew.
        """
        place = (self._folder or bundle.adapter.parent) / FOLDER
        file = place / "model.gguf"
        if not is_whole(place):
            with whole_folder(place) as filling:
                wanted = ("--base", bundle.base, "--adapter", bundle.adapter, "--gguf", filling / file.name)
                done = subprocess.run(
                    _command(*map(str, wanted)), capture_output=True, text=True, check=False
                )
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                    raise BaseModelError(
                        f"v{bundle.version} cannot be written for llama.cpp: {reason}",
                        remedy="set gateway.engine: local, which serves every version",
                    )
                write_json(filling / MANIFEST, {"files": {file.name: sha256_file(filling / file.name)}})
        return file

    def _start(self, file: Path, bundle: Bundle) -> tuple[subprocess.Popen[bytes], str]:
        wanted = ("--slots", self._config.max_batch, "--context", bundle.max_length)
        process = subprocess.Popen(
            _command("--gguf", str(file), *map(str, wanted)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout
        with process.stdout as lines:
            for line in lines:  # ends when the process does
                with suppress(ValueError, TypeError, KeyError):
                    return process, str(json.loads(line)["address"])
        _stop(process)
        raise ServiceError(
            f"llama.cpp ended with {process.returncode} and serves nothing",
            remedy=f"{' '.join(_command('--gguf', str(file)))} shows why",
        )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", SERVER, *arguments]


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _has_died(process: subprocess.Popen[bytes]) -> bool:
    """Give a process that breaks connections a second to end."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    return process.returncode is not None


def _body(row: Row, slot: int) -> dict[str, Any]:
    ask, length = row.ask, SLICE if row.answer else FIRST
    body: dict[str, Any] = {
        "prompt": [*row.prompt, *row.answer],
        "n_predict": min(row.room, length),
        "id_slot": slot,
        "temperature": row.temperature,
        "return_tokens": True,
        "n_probs": max(1, ask.top_logprobs or 0),
        "top_k": 0,
        "min_p": 0.0,
        "top_p": 1.0 if ask.top_p is None else ask.top_p,
    }
    if ask.seed is not None:  # each slice draws anew
        body["seed"] = (ask.seed + len(row.answer)) % 2**32
    if ask.form:  # its grammar holds from the first token on, so that there are no slices
        schema = json.loads(ask.form.schema) if ask.form.schema else OBJECT
        body["json_schema"] = {"x-guidance": {"whitespace_pattern": BLANKS}, **schema}
        body["n_predict"] = row.room
    return body


def _hear(row: Row, found: Completion) -> bool:
    """Pass the tokens of a slice on; return whether the answer ended."""
    told = deque(found.completion_probabilities)
    for token in found.tokens:
        chosen = told.popleft() if told and told[0].id == token else None
        score = None
        if (most := row.ask.top_logprobs) is not None and chosen:
            score = partial(chosen.scored, chosen.top_logprobs[:most])
        if row.take(token, chosen.logprob if chosen else None, score):
            return True
    return False
