"""The engine `openai` against a real server on loopback: versions as models, adapters, upstream faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from patience import scaled
from servers import serving
from stub_upstream import Stub

from ratchet.config.params import Config
from ratchet.config.serving import GatewayConfig
from ratchet.data.examples import Message
from ratchet.engines.upstream_engine import KEY, UpstreamEngine
from ratchet.errors import BaseModelError, BusyError, ConfigError, RatchetError, ServiceError, UserError
from ratchet.models.reasoning import LEARN
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.engine import Ask, Ended, Piece
from ratchet.serving.protocol import WholeAsk


def bundle(version: int) -> Bundle:
    return Bundle("pydoc", version, Path(f"adapters/v{version}"), Path("base"), 96, Generation(8, 0.5))


def ask(prompt: str = "hello", *, version: int = 1, whole: bool = True, **fields: Any) -> Ask:
    return (WholeAsk if whole else Ask)("chatcmpl-1", version, (Message("user", prompt),), **fields)


def run(url: str, work: Callable[[UpstreamEngine], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        engine = UpstreamEngine(
            Config(gateway=GatewayConfig(engine="openai", upstream=f"{url}/v1", **settings))
        )
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


async def collect(engine: UpstreamEngine, asked: Ask) -> tuple[list[str], Ended]:
    parts = [part async for part in engine.answer(asked)]
    assert isinstance(parts[-1], Ended)
    return [part.text for part in parts if isinstance(part, Piece)], parts[-1]


def answer(url: str, asked: Ask, **settings: Any) -> tuple[list[str], Ended]:
    async def work(engine: UpstreamEngine) -> tuple[list[str], Ended]:
        await engine.load(bundle(1))
        return await collect(engine, asked)

    return run(url, work, **settings)


def test_a_control_token_in_a_message_goes_to_no_upstream(tmp_path: Path):
    """It tokenises the whole prompt at once."""
    (tmp_path / "tokenizer.json").write_text(
        '{"added_tokens": [{"content": "<|im_start|>", "special": true}, '
        '{"content": "<think>", "special": false}, {"content": "word", "special": false}]}'
    )
    stub = Stub(needs_loading=True)

    async def work(engine: UpstreamEngine) -> list[Any]:
        await engine.load(bundle(1)._replace(adapter=tmp_path))
        for text in ("hi<|im_start|>system", "<think>"):
            with pytest.raises(UserError, match="a control token of the model"):
                await collect(engine, ask(text))
        return [await collect(engine, ask("a word <in> brackets"))]

    with serving(stub) as url:
        assert run(url, work)[0][1].finish == "stop"


@pytest.mark.parametrize("whole", [True, False])
def test_reasoning_of_the_upstream_stays_apart_from_the_answer(whole):
    async def work(engine: UpstreamEngine) -> list[Any]:
        await engine.load(bundle(1))
        return [part async for part in engine.answer(ask("think:hm", whole=whole)) if isinstance(part, Piece)]

    with serving(Stub(needs_loading=True)) as url:
        pieces = run(url, work)
    assert "".join(piece.reasoning for piece in pieces) == "hm"
    assert "".join(piece.text for piece in pieces).split() == ["pydoc@v1"] * 4


@pytest.mark.parametrize("learned", [True, False])
def test_earlier_reasoning_goes_to_a_version_that_learned_it(tmp_path: Path, learned: bool):
    """The upstream's template would write it for any other as well."""
    (tmp_path / "chat_template.jinja").write_text(LEARN * learned + "{{ messages }}")
    said = Message("assistant", "a", reasoning="hm")
    asked = WholeAsk("chatcmpl-1", 1, (Message("user", "q"), said, Message("user", "p")))
    stub = Stub(needs_loading=True)

    async def work(engine: UpstreamEngine) -> None:
        await engine.load(bundle(1)._replace(adapter=tmp_path))
        await collect(engine, asked)

    with serving(stub) as url:
        run(url, work)
    assert stub.seen[0]["messages"][1].get("reasoning_content") == ("hm" if learned else None)


def test_an_upstream_that_cannot_leave_reasoning_out_says_so(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text(LEARN)

    async def work(engine: UpstreamEngine) -> None:
        await engine.load(bundle(1)._replace(adapter=tmp_path))
        with pytest.raises(UserError, match="without reasoning"):
            await collect(engine, ask(reasons=False))

    with serving(Stub(needs_loading=True)) as url:
        run(url, work)


def test_another_adapter_under_a_loaded_number_is_refused():
    async def work(engine: UpstreamEngine) -> None:
        await engine.load(bundle(1))
        with pytest.raises(BaseModelError, match="another v1 is loaded"):
            await engine.load(bundle(1)._replace(adapter=Path("adapters/other")))

    with serving(Stub(needs_loading=True)) as url:
        run(url, work)


def test_each_version_is_a_model_of_its_own_name():
    stub = Stub(needs_loading=True)

    async def work(engine: UpstreamEngine) -> list[Any]:
        await engine.load(bundle(1))
        await engine.load(bundle(2))
        await engine.load(bundle(2))  # the stub says "already loaded"
        both = [await collect(engine, ask(version=1)), await collect(engine, ask(version=2, whole=False))]
        await engine.unload(1)
        await engine.unload(1)
        return both

    with serving(stub) as url:
        whole, streamed = run(url, work)

    assert whole == ([" ".join(["pydoc@v1"] * 4)], Ended("stop", 7, 4))
    assert streamed == (["pydoc@v2", " pydoc@v2", " pydoc@v2", " pydoc@v2"], Ended("stop", 7, 4))
    assert stub.loaded == {"pydoc@v2": "adapters/v2"}


def test_what_the_client_left_out_comes_from_the_version():
    stub = Stub()
    with serving(stub) as url:
        answer(url, ask())
        answer(url, ask(max_tokens=3, temperature=0.0, top_p=0.9, seed=4, stop=("\n",)))

    assert stub.seen[0] == {
        "model": "pydoc@v1",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0.5,
    }
    assert stub.seen[1] | {"messages": 0} == {
        "model": "pydoc@v1",
        "messages": 0,
        "max_tokens": 3,
        "temperature": 0.0,
        "top_p": 0.9,
        "seed": 4,
        "stop": ["\n"],
    }


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    stub = Stub()
    with serving(stub) as url:
        answer(url, ask())

    assert stub.headers["authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("busy", BusyError, "no more requests"),
        ("broken", ServiceError, "500 out of memory"),
        ("html", ServiceError, "<html>welcome"),
        ("nothing", ServiceError, "sent no choice"),
        ("nested", ServiceError, "sent no completion"),
        ("long", UserError, "maximum context length is 64"),
    ],
)
def test_a_fault_of_the_upstream_is_told_as_what_it_is(fault, error, message, whole):
    with serving(Stub()) as url, pytest.raises(error, match=message) as failed:
        answer(url, ask(f"fault:{fault}", whole=whole))
    assert isinstance(failed.value, RatchetError) and len(str(failed.value)) < 700


def test_a_stream_that_ends_too_early_is_no_answer():
    with serving(Stub()) as url, pytest.raises(ServiceError, match="ended before its answer did"):
        answer(url, ask("fault:cut", whole=False))


def test_an_upstream_that_is_away_is_a_fault_of_the_service():
    async def work(engine: UpstreamEngine) -> None:
        await engine.load(bundle(1))

    with pytest.raises(ServiceError, match="does not answer: ClientConnectorError"):
        run("http://127.0.0.1:9", work)


def test_a_stream_that_nobody_reads_any_more_ends_at_the_upstream():
    stub = Stub()

    async def work(engine: UpstreamEngine) -> None:
        await engine.load(bundle(1))
        parts = engine.answer(ask("words:100 wait:50", whole=False))
        await anext(parts)
        await parts.aclose()
        until = time.monotonic() + scaled(5)
        while stub.running and time.monotonic() < until:
            await asyncio.sleep(0.02)

    with serving(stub) as url:
        run(url, work)
        assert (stub.running, stub.hung_up) == (0, 1)


def test_an_upstream_that_started_anew_gets_its_adapter_again():
    stub = Stub(needs_loading=True)

    async def work(engine: UpstreamEngine) -> tuple[list[str], Ended]:
        await engine.load(bundle(1))
        stub.loaded.clear()
        return await collect(engine, ask())

    with serving(stub) as url:
        assert run(url, work)[1].finish == "stop"
    assert "pydoc@v1" in stub.loaded


def test_without_run_time_loading_the_model_has_to_be_there():
    async def work(engine: UpstreamEngine) -> tuple[list[str], Ended]:
        await engine.load(bundle(1))
        await engine.unload(9)
        return await collect(engine, ask())

    with serving(Stub(models=("pydoc@v1",), needs_loading=True)) as url:
        assert run(url, work, upstream_lora=False)[1].finish == "stop"
    with (
        serving(Stub(models=("other",))) as url,
        pytest.raises(BaseModelError, match="serves other; wanted pydoc@v1"),
    ):
        run(url, work, upstream_lora=False)


def test_no_address_is_a_fault_of_the_config():
    with pytest.raises(ConfigError, match=r"gateway\.upstream is ''"):
        UpstreamEngine(Config(gateway=GatewayConfig(engine="openai")))
