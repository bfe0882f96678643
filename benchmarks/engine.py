"""Tokens a second of the engine `local` at 1 to 16 parallel clients, in one run; and how long a load of another version stops it.

    python -m benchmarks.engine [--tokens 48] [--asks 64]

The model has the demo's size; its weights are hardly trained, which does not change the time a token takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTION = "Which module documents this? Return the number of items that the container holds when it is called."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=48, help="answer tokens of each ask, at most")
    parser.add_argument("--asks", type=int, default=64, help="asks at each number of clients")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as scratch:
        bundles = make_bundles(Path(scratch))
        asyncio.run(measure(bundles, options.tokens, options.asks))


def make_bundles(scratch: Path) -> list[Any]:
    from ratchet.config import AdapterConfig, BaseConfig, Config, DemoBase
    from ratchet.files import read_json, write_json
    from ratchet.models import MANIFEST, add_adapter, load_base
    from ratchet.serving import Bundle, Generation
    from tasks.base import make_base

    make_base(scratch / "base", Config(base=BaseConfig(demo=DemoBase(steps=20))))
    bundles = []
    for version in (1, 2, 3):
        folder = scratch / f"v{version}"
        add_adapter(load_base(scratch / "base"), AdapterConfig(), seed=version).save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        for path in (scratch / "base").glob("*token*"):
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_bytes((scratch / "base/chat_template.jinja").read_bytes())
        write_json(folder / MANIFEST, {"base": {key: read_json(scratch / "base" / MANIFEST)[key] for key in ("model", "revision")}})
        bundles.append(Bundle("bench", version, folder, scratch / "base", "lora", 256, Generation(32)))
    return bundles


async def measure(bundles: list[Any], tokens: int, asks: int) -> None:
    from ratchet.config import Config
    from ratchet.gateway.local import LocalEngine

    engine = LocalEngine(Config())
    for bundle in bundles[:2]:
        await engine.load(bundle)
    await run(engine, 4, 16, tokens, versions=[1])  # warm-up
    alone = (await run(engine, 1, asks // 4, tokens, versions=[1]))[0]
    print("| parallel clients | versions | tokens a second | against one client | p50 ms a token |\n|---|---|---|---|---|")
    for clients in (1, 2, 4, 8, 16):
        for versions in ([1], [1, 2]) if clients > 1 else ([1],):
            speed, gap = await run(engine, clients, max(asks // 4, clients * 4) if clients == 1 else asks, tokens, versions=versions)
            print(f"| {clients} | {len(versions)} | {speed:.0f} | {speed / alone:.2f} | {gap:.1f} |")
    await measure_swap(engine, bundles[2], tokens)
    await engine.close()


async def run(engine: Any, clients: int, asks: int, tokens: int, *, versions: list[int]) -> tuple[float, float]:
    """(tokens a second, median milliseconds between two tokens of one answer)."""
    from ratchet.examples import Message
    from ratchet.gateway.engine import Ask, Ended

    slots, gaps = asyncio.Semaphore(clients), list[float]()

    async def one(number: int) -> int:
        async with slots:
            count, began = 0, time.perf_counter()
            async for piece in engine.answer(
                Ask(f"r{number}", versions[number % len(versions)], (Message("user", f"{QUESTION} {number}"),), max_tokens=tokens, temperature=1.0, seed=number)
            ):
                if isinstance(piece, Ended):
                    count = piece.answer_tokens
            gaps.append((time.perf_counter() - began) * 1000 / max(1, count))
            return count

    started = time.perf_counter()
    made = sum(await asyncio.gather(*(one(number) for number in range(asks))))
    return made / (time.perf_counter() - started), statistics.median(gaps)


async def measure_swap(engine: Any, bundle: Any, tokens: int) -> None:
    load = asyncio.create_task(run(engine, 8, 64, tokens, versions=[1]))
    await asyncio.sleep(0.3)
    started = time.perf_counter()
    await engine.load(bundle)
    print(f"\nloading another version under 8 clients took {(time.perf_counter() - started) * 1000:.0f} ms; requests waited that long at most, none failed")
    await load


if __name__ == "__main__":
    main()
