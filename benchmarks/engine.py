"""Measure the tokens per second of the engine `local` with 1 to 16 parallel clients, of one version and of
two mixed, and how long loading another version pauses it.

    python -m benchmarks.engine [--tokens 32] [--asks 32] [--passes 3]

All figures are of one run, and medians of the passes: compare the ratios. The model has the demo's size; its
weights are hardly trained, which does not change the time that a token takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

QUESTION = (
    "Which module documents this? Return the number of items that the container holds when it is called."
)
PACKAGES = ["asyncio", "email", "http", "importlib", "json", "logging", "unittest", "xml"]
SETTINGS = [(1, (1,)), *((clients, versions) for clients in (2, 4, 8, 16) for versions in ((1,), (1, 2)))]
LOADS = 5


class Figures(NamedTuple):
    tokens_per_second: float
    gaps_ms: list[float]  # between two pieces of one answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32, help="answer tokens of each ask, at most")
    parser.add_argument("--asks", type=int, default=32, help="asks at each number of clients")
    parser.add_argument("--passes", type=int, default=3, help="times that everything is measured")
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the gateway's own service has it
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as scratch:
        asyncio.run(measure(make_bundles(Path(scratch)), options.tokens, options.asks, options.passes))


def make_bundles(scratch: Path) -> list[Any]:
    from ratchet.config.params import Config
    from ratchet.config.training import AdapterConfig, BaseConfig, DemoBase
    from ratchet.files import read_json, write_json
    from ratchet.models.adapters import add_adapter
    from ratchet.models.loading import MANIFEST, load_base
    from ratchet.serving.bundle import Bundle, Generation
    from tasks.base import make_base

    base = scratch / "base"
    make_base(base, Config(base=BaseConfig(demo=DemoBase(packages=PACKAGES, steps=5))))
    bundles = []
    for version in (1, 2, 3):
        folder = scratch / f"v{version}"
        add_adapter(load_base(base), AdapterConfig(), seed=version).save_pretrained(
            folder, safe_serialization=True, save_embedding_layers=False
        )
        for path in [*base.glob("*token*"), base / "chat_template.jinja"]:
            shutil.copy(path, folder)
        write_json(
            folder / MANIFEST,
            {"base": {key: read_json(base / MANIFEST)[key] for key in ("model", "revision")}},
        )
        bundles.append(Bundle("bench", version, folder, base, 256, Generation(32)))
    return bundles


async def measure(bundles: list[Any], tokens: int, asks: int, passes: int) -> None:
    from ratchet.config.params import Config
    from ratchet.engines.local_engine import LocalEngine

    engine = LocalEngine(Config())
    for bundle in bundles[:2]:
        await engine.load(bundle)
    await run(engine, 4, 16, tokens, versions=(1, 2))  # warm-up
    seen = [
        [
            await run(engine, clients, asks if clients > 1 else asks // 4, tokens, versions=versions)
            for clients, versions in SETTINGS
        ]
        for _ in range(passes)
    ]
    print(
        "| parallel clients | versions | tokens a second | against one client | p50 ms between two pieces"
        " |\n|---|---|---|---|---|"
    )
    for index, (clients, versions) in enumerate(SETTINGS):
        speed = statistics.median(one[index].tokens_per_second for one in seen)
        ratio = statistics.median(one[index].tokens_per_second / one[0].tokens_per_second for one in seen)
        gap = statistics.median(gap for one in seen for gap in one[index].gaps_ms)
        print(f"| {clients} | {len(versions)} | {speed:.0f} | {ratio:.2f} | {gap:.1f} |")
    await measure_loading(engine, bundles[2], tokens, asks)
    await engine.close()


async def run(engine: Any, clients: int, asks: int, tokens: int, *, versions: Sequence[int]) -> Figures:
    from ratchet.data.examples import Message
    from ratchet.serving.engine import Ask, Ended

    slots, gaps = asyncio.Semaphore(clients), list[float]()

    async def one(number: int) -> int:
        async with slots:
            times, count = list[float](), 0
            messages = (Message("user", f"{QUESTION} {number}"),)
            async for piece in engine.answer(
                Ask(
                    f"r{number}",
                    versions[number % len(versions)],
                    messages,
                    max_tokens=tokens,
                    temperature=1.0,
                    seed=number,
                )
            ):
                times.append(time.perf_counter())
                count = piece.answer_tokens if isinstance(piece, Ended) else 0
            gaps.extend((after - before) * 1000 for before, after in pairwise(times))
            return count

    started = time.perf_counter()
    made = sum(await asyncio.gather(*(one(number) for number in range(asks))))
    return Figures(made / (time.perf_counter() - started), gaps)


async def measure_loading(engine: Any, bundle: Any, tokens: int, asks: int) -> None:
    """Measure the longest pause that one of eight clients sees, with and without loading another version."""
    quiet = await run(engine, 8, asks * 2, tokens, versions=(1,))
    under_way, took = asyncio.create_task(run(engine, 8, asks * 2, tokens, versions=(1,))), list[float]()
    for _ in range(LOADS):
        if under_way.done():
            break
        started = time.perf_counter()
        await engine.load(bundle)
        took.append((time.perf_counter() - started) * 1000)
        await engine.unload(bundle.version)
    loaded = await under_way
    print(
        f"\nlongest pause between two pieces, 8 clients: {max(quiet.gaps_ms):.0f} ms;"
        f" {max(loaded.gaps_ms):.0f} ms with {len(took)} loads of {statistics.median(took):.0f} ms each"
    )


if __name__ == "__main__":
    main()
