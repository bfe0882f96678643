"""How long an answer takes: a version in the gateway's engine, asked one question after the other.

Requests one at a time, with everything that the engine does for one; what a batch of users waits is benchmarks/engine.py's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ratchet.config.params import Config
from ratchet.data.examples import Example
from ratchet.evaluation.statistics import bootstrap_mean
from ratchet.models.loading import quiet
from ratchet.serving.bundle import Bundle
from ratchet.serving.engine import Ask, Ended
from ratchet.serving.local_engine import LocalEngine

WARM_UP, ASKED = 3, 40  # answers


def measure_speed(bundle: Bundle, rows: Sequence[Example], config: Config) -> dict[str, Any]:
    """{answers, milliseconds: {mean, low, high}, tokens, tokens_per_second}: an answer's, with the 95 % interval of the mean; its tokens in the mean. `rows`: more than WARM_UP."""
    with quiet():
        found = asyncio.run(_ask_all(bundle, rows[: WARM_UP + ASKED], config))[WARM_UP:]
    times, tokens = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
    interval = bootstrap_mean(times, alpha=0.025, resamples=2000, seed=0)
    return {
        "answers": len(found),
        "milliseconds": interval._asdict(),
        "tokens": float(tokens.mean()),
        "tokens_per_second": float(tokens.sum() / times.sum() * 1000),
    }


async def _ask_all(bundle: Bundle, rows: Sequence[Example], config: Config) -> list[tuple[float, int]]:
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
