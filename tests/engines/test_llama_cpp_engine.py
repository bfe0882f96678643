"""The engine `llama_cpp` says what the engine `local` says, and its servers end with their versions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from patience import scaled

from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, read_examples
from ratchet.engines.answering import Row
from ratchet.engines.llama_cpp_engine import LlamaCppEngine
from ratchet.engines.local_engine import LocalEngine
from ratchet.errors import BaseModelError, BusyError, ConfigError, ServiceError, UserError
from ratchet.models.loading import load_chat
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Engine, Piece

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (uv pip install xllamacpp)")

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


class Said(NamedTuple):
    text: str
    pieces: list[Piece]
    ended: Ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the GGUF file, which is written once."""
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture
def bundle(candidate: Path, tiny_base: Path) -> Bundle:
    return Bundle("tiny", 1, candidate, tiny_base, 256, Generation(12))


@pytest.fixture(scope="module")
def rows(prepared: Path) -> list[Example]:
    return list(read_examples(prepared / "test.jsonl"))[:10]


async def hear(engine: Engine, ask: Ask) -> Said:
    pieces: list[Piece] = []
    ended = None
    async for piece in engine.answer(ask):
        if isinstance(piece, Ended):
            ended = piece
        else:
            pieces.append(piece)
    assert ended is not None
    return Said("".join(piece.text for piece in pieces), pieces, ended)


def with_engine(engine: Engine, bundle: Bundle, work: Callable[[Engine], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        try:
            await engine.load(bundle)
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def answers(engine: Engine, bundle: Bundle, asks: Sequence[Ask]) -> list[Said]:
    async def work(engine: Engine) -> list[Said]:
        return [*await asyncio.gather(*(hear(engine, ask) for ask in asks))]

    found: list[Said] = with_engine(engine, bundle, work)
    return found


def test_it_gives_the_answers_of_the_engine_local(bundle: Bundle, folder: Path, rows: list[Example]) -> None:
    asks = [Ask(row.id, 1, tuple(row.prompt), top_logprobs=2) for row in rows]
    asks.append(Ask("stop", 1, tuple(rows[0].prompt), stop=("e", "a")))
    ours, theirs = (
        answers(engine, bundle, asks) for engine in (LocalEngine(Config()), LlamaCppEngine(Config(), folder))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert other.text == one.text
        for name in ("finish", "prompt_tokens", "answer_tokens"):
            assert getattr(other.ended, name) == getattr(one.ended, name), name
        assert other.ended.answer_nll == pytest.approx(one.ended.answer_nll, abs=0.1)
        assert other.ended.prompt_nll is None
        scored = [[token for piece in said.pieces for token in piece.tokens] for said in (one, other)]
        assert [token.token for token in scored[0]] == [token.token for token in scored[1]]
        for left, right in zip(*scored, strict=True):
            assert right.logprob == pytest.approx(left.logprob, abs=0.05)
            assert len(right.top) == 2


def test_a_seed_repeats_a_drawn_answer(bundle: Bundle, folder: Path) -> None:
    asked = (Message("user", "which module is this?"),)
    asks = [Ask("drawn", 1, asked, temperature=1.0, seed=seed) for seed in (7, 7, *range(8, 14))]
    first, again, *others = answers(LlamaCppEngine(Config(), folder), bundle, asks)
    assert first.text == again.text
    assert {other.text for other in others} - {first.text}


def test_no_token_of_an_answer_is_lost_within_a_character(bundle: Bundle, folder: Path) -> None:
    """At this temperature most tokens are single bytes, of which llama.cpp's own stream loses some."""
    asked = (Message("user", "which module is this?"),)
    asks = [Ask("a", 1, asked, temperature=9.0, seed=seed, max_tokens=50) for seed in range(6)]

    async def work(engine: Engine) -> list[Row]:
        assert isinstance(engine, LlamaCppEngine)
        rows = [Row(ask, time.perf_counter(), lambda said: None) for ask in asks]
        for row in rows:
            async for _ in engine.compute(row):
                pass
        return rows

    for row in with_engine(LlamaCppEngine(Config(), folder), bundle, work):
        stops = load_chat(bundle.adapter).stop_ids
        assert len(row.answer) == 50 or row.answer[-1] in stops
        assert len(row.answer) > 4, "more than one slice"


async def refused(engine: Engine, ask: Ask) -> Exception:
    with pytest.raises((UserError, ServiceError, BusyError)) as raised:
        await hear(engine, ask)
    return raised.value


def test_what_it_cannot_do_is_refused_with_a_remedy(bundle: Bundle, folder: Path) -> None:
    asked = (Message("user", "hi"),)
    asks = {
        "a tool's schema": Ask("a", 1, asked, tools=(TOOL,), must_call=("find",)),
        "takes 256 with the answer": Ask("b", 1, (Message("user", "long " * 400),)),
        "v2 is not loaded": Ask("c", 2, asked),
    }

    async def work(engine: Engine) -> dict[str, str]:
        return {wanted: str(await refused(engine, ask)) for wanted, ask in asks.items()}

    for wanted, said in with_engine(LlamaCppEngine(Config(), folder), bundle, work).items():
        assert wanted in said


def test_a_full_queue_is_told(bundle: Bundle, folder: Path) -> None:
    config = Config.model_validate({"gateway": {"max_batch": 1, "max_queue": 1}})
    ask = Ask("a", 1, (Message("user", "hi"),))

    async def work(engine: Engine) -> list[Any]:
        return [*await asyncio.gather(*(hear(engine, ask) for _ in range(4)), return_exceptions=True)]

    found = with_engine(LlamaCppEngine(config, folder), bundle, work)
    assert sorted(type(one).__name__ for one in found) == ["BusyError", "BusyError", "Said", "Said"]


def servers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "llama_cpp_server" in " ".join(child.cmdline())
    ]


def test_a_server_that_dies_starts_again_and_an_unloaded_one_ends(bundle: Bundle, folder: Path) -> None:
    ask = Ask("a", 1, (Message("user", "hi"),))

    async def work(engine: Engine) -> None:
        (server,) = servers()
        before = await hear(engine, ask)
        os.kill(server.pid, signal.SIGKILL)
        while servers():
            await asyncio.sleep(0.05)
        assert (await hear(engine, ask)).text == before.text
        await engine.unload(1)
        assert servers() == []

    with_engine(LlamaCppEngine(Config(), folder), bundle, work)


OWNER = """
import asyncio, sys
from pathlib import Path
from ratchet.config.params import Config
from ratchet.engines.llama_cpp_engine import LlamaCppEngine
from ratchet.serving.bundle import Bundle, Generation
async def main():
    engine = LlamaCppEngine(Config(), Path(sys.argv[1]))
    await engine.load(Bundle("tiny", 1, Path(sys.argv[2]), Path(sys.argv[3]), 256, Generation(8)))
    print("loaded", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


def test_a_server_does_not_outlive_a_killed_gateway(bundle: Bundle, folder: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(folder), str(bundle.adapter), str(bundle.base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout and owner.stdout.readline() == "loaded\n"
        (server,) = servers()
        os.kill(owner.pid, signal.SIGKILL)
    until = time.monotonic() + scaled(20)
    while server.is_running() and time.monotonic() < until:
        time.sleep(0.05)
    assert not server.is_running()


def test_a_version_that_cannot_be_written_is_refused_and_leaves_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in its place writes half a file and ends with a reason."""
    code = "import sys; open(sys.argv[-1], 'w').write('half'); sys.exit('no GGUF: of this family none')"
    monkeypatch.setattr(
        "ratchet.engines.llama_cpp_engine._command",
        lambda *arguments: [sys.executable, "-c", code, *arguments],
    )
    with pytest.raises(BaseModelError, match="no GGUF: of this family none"):
        answers(LlamaCppEngine(Config(), tmp_path), bundle, [])
    assert not list(tmp_path.rglob("*.gguf"))


def test_without_llama_cpp_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet.engines.llama_cpp_engine.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed") as raised:
        LlamaCppEngine(Config())
    assert "xllamacpp" in raised.value.remedy
