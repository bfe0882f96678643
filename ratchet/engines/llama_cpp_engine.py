"""Answer with llama.cpp, one server process per version: the engine `llama_cpp`, for machines without a GPU.

A version is merged, written as a GGUF file with 16-bit weights, and served on loopback
(`ratchet/engines/llama_cpp_server.py`). Prompts go there as token ids and answers come back as token ids, so
template, stop tokens, text, reasoning and calls are ours, as with the engine `local`, and no text of a user
can become a control token. Not covered: calls that a client enforces (`tool_choice`), prompts' NLL.
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
from ratchet.errors import BaseModelError, BusyError, ConfigError, RatchetError, ServiceError, UserError
from ratchet.files import whole_folder
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_chat
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, Piece, Scored, require_same

SERVER = "ratchet.engines.llama_cpp_server"
FOLDER = "llama_cpp"
END_SECONDS = 5.0
MOST_LINE_BYTES = 2**22  # of a stream: a token with its alternatives is a few kilobytes

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


class Chunk(msgspec.Struct):
    """One event of `/completion`; `stop_type` of the last one says why it ended."""

    tokens: list[int] = []
    completion_probabilities: list[Chosen] = []
    stop: bool = False
    stop_type: str = ""


_decode = msgspec.json.Decoder(Chunk)


class Served(NamedTuple):
    bundle: Bundle
    chat: ChatFormat
    process: subprocess.Popen[bytes]
    address: str
    slots: asyncio.Semaphore


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
            slots = asyncio.Semaphore(self._config.max_batch)
            self._served[bundle.version] = Served(bundle, chat, process, address, slots)

    async def unload(self, version: int) -> None:
        if served := self._served.pop(version, None):
            await asyncio.to_thread(_stop, served.process)

    async def answer(self, ask: Ask) -> AsyncIterator[Piece | Ended]:
        """Yield pieces, then one Ended.

        Raises BusyError: `gateway.max_queue` wait already; UserError: the prompt does not fit, or the request
        asks for what this engine cannot hold; ServiceError: the version is not loaded, or its server failed.
        """
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
        """Compute an answer, whose pieces go to `row.tell`; yield after each of the server's chunks.

        Raises ServiceError.
        """
        served = self._served.get(row.ask.version)
        if served is None:
            raise ServiceError(
                f"v{row.ask.version} is not loaded",
                remedy="come again; the gateway's log says what is in its way",
            )
        async with served.slots:
            if not row.prepare(served.bundle, served.chat, served.bundle.max_length):
                yield
                return
            async for chunk in self._complete(served, row):
                ended = _hear(row, served.chat.stop_id, chunk)
                yield
                if ended:
                    return
        raise ServiceError("llama.cpp broke an answer off", remedy="see the gateway's log")

    async def close(self) -> None:
        for version in list(self._served):
            await self.unload(version)
        if self._opened:
            await self._opened.close()

    async def _complete(self, served: Served, row: Row) -> AsyncIterator[Chunk]:
        """Stream the answer's tokens. Raises ServiceError."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=self._config.timeout)
        try:
            async with self._session().post(
                f"{served.address}/completion", json=_body(row), timeout=timeout
            ) as response:
                if response.status != 200:
                    text = (await response.text())[:200]
                    raise ServiceError(f"llama.cpp answered {response.status}: {text}", remedy="see its log")
                async for line in response.content:
                    if line.startswith(b"data: "):
                        yield _decode.decode(line[6:])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, msgspec.DecodeError) as error:
            state = served.process.poll()
            died = f"; its process ended with {state}" if state is not None else ""
            raise ServiceError(
                f"llama.cpp does not answer for v{served.bundle.version}{died}: {error!r}",
                remedy="see the gateway's log; restarting the gateway starts it again",
            ) from None

    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            self._opened = aiohttp.ClientSession(connector=connector, read_bufsize=MOST_LINE_BYTES)
        return self._opened

    def _write(self, bundle: Bundle) -> Path:
        """Write the GGUF file once, in a process whose memory is free again afterwards."""
        place = (self._folder or bundle.adapter.parent) / FOLDER
        file = place / "model.gguf"
        if not file.exists():
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


def _body(row: Row) -> dict[str, Any]:
    ask = row.ask
    body: dict[str, Any] = {
        "prompt": row.prompt,
        "n_predict": row.room,
        "temperature": row.temperature,
        "stream": True,
        "return_tokens": True,
        "n_probs": max(1, ask.top_logprobs or 0),
        "top_k": 0,
        "min_p": 0.0,
        "top_p": 1.0 if ask.top_p is None else ask.top_p,
    }
    if ask.seed is not None:
        body["seed"] = ask.seed % 2**32
    if ask.form:
        schema = json.loads(ask.form.schema) if ask.form.schema else OBJECT
        body["json_schema"] = {"x-guidance": {"whitespace_pattern": BLANKS}, **schema}
    return body


def _hear(row: Row, stop_id: int, chunk: Chunk) -> bool:
    """Pass the tokens of a chunk on; return whether the answer ended. Raises ServiceError: it broke off."""
    told = {chosen.id: chosen for chosen in chunk.completion_probabilities}
    for token in chunk.tokens:
        chosen = told.get(token) or Chosen(token)
        score = None
        if (most := row.ask.top_logprobs) is not None:
            score = partial(chosen.scored, chosen.top_logprobs[:most])
        if row.take(token, chosen.logprob, score):
            return True
    if chunk.stop and chunk.stop_type == "eos":  # the end token itself is not streamed
        return row.take(stop_id, 0.0)
    return False
