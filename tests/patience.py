"""Scale every wait of the tests by how busy the machine is.

A wait ends as soon as what it waits for has come, so a long one costs nothing when all is well. Tests assert
what happened and in which order, never how long it took: ten busy neighbours must not turn a test red.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def patience() -> float:
    """Return the factor for all waits, at least 1: `RATCHET_TEST_PATIENCE`, or twice the processes a core."""
    named = os.environ.get("RATCHET_TEST_PATIENCE")
    if named:
        return max(1.0, float(named))
    return max(1.0, 2 * max(os.getloadavg()[0], _running()) / (os.cpu_count() or 1))


def scaled(seconds: float) -> float:
    return seconds * patience()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when the block took longer than scaled `seconds`: for what waits for no server."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < scaled(seconds), f"it waited longer than {seconds} s on a quiet machine"


def _running() -> int:
    """Return how many processes run or wait for a core now: a minute's average comes too late."""
    try:
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
    except OSError:  # not Linux
        return 0
