"""Record the project's trainings, one line each in the document `.ratchet/retrains.jsonl`.

Drift's budget and cool-down are computed from them.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from ratchet.errors import CheckoutError
from ratchet.pipeline.checkout import locked
from ratchet.storage.documents import read_document, write_document, written_at

FILE, ASKED = Path(".ratchet/retrains.jsonl"), Path(".ratchet/drift-asked")
BEGIN_SECONDS = 900  # a requested retraining begins within this time, pulling its rows included


class Retraining(msgspec.Struct, frozen=True):
    """One training; `at` is in seconds since 1970, `seconds` is the time of the optimisation alone.

    For a retraining that failed (verdict `failed`, no run key) `seconds` is the time of all its stages.
    """

    at: float
    reason: str
    seconds: float
    run_key: str
    verdict: str


def remember(root: Path, *, reason: str, seconds: float, run_key: str, verdict: str) -> None:
    """Add a training to the record; the caller holds the lock `retrain`."""
    done = [*read_retrains(root), Retraining(time.time(), reason, seconds, run_key, verdict)]
    write_document(root, FILE, b"".join(msgspec.json.encode(entry) + b"\n" for entry in done))


def read_retrains(root: Path, *, since: float = 0.0) -> list[Retraining]:
    """Read the retrainings, the oldest first."""
    lines = (read_document(root, FILE) or b"").split(b"\n")
    return [
        entry
        for entry in (msgspec.json.decode(line, type=Retraining) for line in lines if line)
        if entry.at >= since
    ]


def note_asked(root: Path) -> None:
    """Record that drift requests a retraining now: the cool-down begins here.

    It begins now, however long the retraining takes and whether or not it trains.
    """
    write_document(root, ASKED, b"")


def is_under_way(root: Path) -> bool:
    """Tell whether a retraining runs, or drift has just requested one that has not begun.

    A second retraining for the same drift would learn from the same rows.
    """
    try:
        with locked(root, "retrain", wait=False):
            pass
    except CheckoutError:
        return True
    asked = written_at(root, ASKED) or 0.0
    return time.time() - asked < BEGIN_SECONDS and not any(entry.at > asked for entry in read_retrains(root))


def last_start(root: Path) -> float | None:
    """Return when the last training ended or drift last requested one, in seconds since 1970; None: never."""
    asked = written_at(root, ASKED)
    times = [entry.at for entry in read_retrains(root)] + ([] if asked is None else [asked])
    return max(times, default=None)
