"""The trainings that ran on this machine, a line each in `.ratchet/retrains.jsonl`: what drift's budget and cool-down are counted from."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from ratchet.files import write_bytes

FILE = Path(".ratchet/retrains.jsonl")


class Retraining(msgspec.Struct, frozen=True):
    """`at` in seconds since 1970, `seconds` of the optimisation alone."""

    at: float
    reason: str
    seconds: float
    run_key: str
    verdict: str


def remember(root: Path, *, reason: str, seconds: float, run_key: str, verdict: str) -> None:
    """Under the lock `retrain`."""
    done = [*read_retrains(root), Retraining(time.time(), reason, seconds, run_key, verdict)]
    write_bytes(root / FILE, (msgspec.json.encode(entry) + b"\n" for entry in done))


def read_retrains(root: Path, *, since: float = 0.0) -> list[Retraining]:
    """The oldest first."""
    path = root / FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [entry for entry in (msgspec.json.decode(line, type=Retraining) for line in lines if line) if entry.at >= since]
