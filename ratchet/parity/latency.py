"""Measure how long an answer takes: ask a version in the gateway's engine one question after the other.

Not covered: how long a batch of users waits (benchmarks/engine.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np

from ratchet.config.params import Config
from ratchet.data.examples import Example
from ratchet.engines.llama_cpp_engine import LlamaCppEngine
from ratchet.engines.local_engine import LocalEngine
from ratchet.evaluation.statistics import bootstrap_mean
from ratchet.models.loading import quiet
from ratchet.parity.paths import for_one
from ratchet.promotion.verdict import Speed
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended, Engine

WARM_UP, ASKED = 3, 40  # answers; the first ones pay for allocations and are left out


def measure_speed(
    bundle: Bundle,
    rows: Sequence[Example],
    config: Config,
    scratch: Path,
    media: Mapping[str, bytes] = MappingProxyType({}),
) -> Speed:
    """Measure the answers to the first rows; `rows` must be more than WARM_UP, whose answers do not count.

    `media` has the rows' pictures by name.
    """
    with quiet():
        found = asyncio.run(_ask_all(bundle, rows[: WARM_UP + ASKED], config, scratch, media))[WARM_UP:]
    times, tokens = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    interval = bootstrap_mean(times, alpha=0.025, resamples=2000, seed=0)
    per_second = float(tokens.sum() / times.sum() * 1000)
    return Speed(len(found), msgspec.structs.asdict(interval), float(tokens.mean()), per_second)


async def _ask_all(
    bundle: Bundle, rows: Sequence[Example], config: Config, scratch: Path, media: Mapping[str, bytes]
) -> list[tuple[float, int]]:
    if config.gateway.engine == "llama_cpp":
        bundle, config = for_one(bundle, rows, config)
        engine: Engine = LlamaCppEngine(config, scratch)
    else:  # another server holds no candidate yet
        engine = LocalEngine(config)
    try:
        await engine.load(bundle)
        asks = [Ask(str(number), 1, tuple(row.prompt), media=media) for number, row in enumerate(rows)]
        return [await _time(engine, ask) for ask in asks]
    finally:
        await engine.close()


async def _time(engine: Engine, ask: Ask) -> tuple[float, int]:
    """Return (milliseconds, tokens) of one answer."""
    began, tokens = time.perf_counter(), 0
    async for piece in engine.answer(ask):
        if isinstance(piece, Ended):
            tokens = piece.answer_tokens
    return (time.perf_counter() - began) * 1000, tokens
