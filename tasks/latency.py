"""How long an answer takes: a version in the gateway's engine, asked one test question after the other.

    python -m tasks.latency --prepared data/prepared --base models/base --candidate models/candidate --out latency.json

No stage: for `ratchet compare`. Requests one at a time, with everything that the engine does for one; what a batch of users waits is
benchmarks/engine.py's.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np

from ratchet.config import Config
from ratchet.errors import DataError
from ratchet.examples import Example, read_examples
from ratchet.files import read_json, write_json
from ratchet.gateway.engine import Ask, Ended
from ratchet.gateway.local import LocalEngine
from ratchet.models import MANIFEST, quiet
from ratchet.serving import Bundle, Generation
from ratchet.stage import run_stage
from ratchet.statistics import bootstrap_mean

WARM_UP, ASKED = 3, 40  # answers


def measure(prepared: Path, base: Path, candidate: Path, config: Config) -> dict[str, Any]:
    """{answers, milliseconds: {mean, low, high}, tokens}: an answer's, with the 95 % interval of the mean, and its tokens in the mean. Raises DataError."""
    rows = [row for _, row in zip(range(WARM_UP + ASKED), read_examples(prepared / "test.jsonl"), strict=False)]
    if len(rows) <= WARM_UP:
        raise DataError(f"there are {len(rows)} test rows; wanted more than {WARM_UP} to measure answers by", remedy="raise `prepare.test_share`, or ingest more rows")
    context = int(read_json(base / MANIFEST)["context"])
    bundle = Bundle("compared", 1, candidate, base, context, Generation(config.evaluate.max_new_tokens))
    with quiet():
        found = asyncio.run(_ask_all(bundle, rows, config))[WARM_UP:]
    times = np.array([milliseconds for milliseconds, _ in found])
    interval = bootstrap_mean(times, alpha=0.025, resamples=2000, seed=0)
    return {"answers": len(found), "milliseconds": interval._asdict(), "tokens": float(np.mean([tokens for _, tokens in found]))}


async def _ask_all(bundle: Bundle, rows: list[Example], config: Config) -> list[tuple[float, int]]:
    engine = LocalEngine(config)
    try:
        await engine.load(bundle)
        return [await _ask(engine, str(number), row) for number, row in enumerate(rows)]
    finally:
        await engine.close()


async def _ask(engine: LocalEngine, name: str, row: Example) -> tuple[float, int]:
    """(milliseconds, tokens)"""
    began, tokens = time.perf_counter(), 0
    async for piece in engine.answer(Ask(name, 1, tuple(row.prompt))):
        if isinstance(piece, Ended):
            tokens = piece.answer_tokens
    return (time.perf_counter() - began) * 1000, tokens


def _main(config: Config, arguments: argparse.Namespace) -> None:
    write_json(arguments.out, measure(arguments.prepared, arguments.base, arguments.candidate, config))


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "candidate", "out"], _main)
