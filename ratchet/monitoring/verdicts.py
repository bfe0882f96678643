"""Verdicts of the monitor: what one holds, and the file that keeps them, a line each.

Everyone reads them here.

No numpy is imported: `ratchet status` reads the last verdict.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

VERDICTS = Path(".ratchet/monitor/verdicts.jsonl")


class Column(msgspec.Struct, frozen=True):
    """One measured column: the window's `value` and the `reference` in its own unit, and its own `p`, not
    corrected.

    None stands for a number that is not finite: JSON has none.
    """

    name: str
    family: str = ""
    value: float | None = None
    reference: float | None = None
    p: float | None = None
    direction: str = ""  # what speaks of drift: "higher", "lower", "other"
    weight: float = 0.0  # the family's share of the error


class Topic(msgspec.Struct, frozen=True):
    """A topic of the traffic, told by its words, with its shares of the window and of the reference, and
    examples.
    """

    name: str
    terms: list[str] = []
    share: float = 0.0
    reference_share: float = 0.0
    examples: list[str] = []


class Verdict(msgspec.Struct, frozen=True):
    """Judge a window: `p` is of all columns together, None where the window has under `needed` distinct
    prompts.
    """

    verdict: str = ""  # "drift" where p is at most the false-alarm rate, "no drift", "too few"
    p: float | None = None
    rows: int = 0
    distinct: int = 0
    needed: int = 0
    columns: list[Column] = []
    topics: list[Topic] = []
    missing: list[str] = []  # families without a reference, with the reason
    moved: list[str] = []  # families that differ, the clearest first; all corrected for each other


class Decision(msgspec.Struct, frozen=True):
    """Whether drift is worth a retraining, with the reasons for it and against it."""

    retrain: bool = False
    for_: list[str] = msgspec.field(name="for", default_factory=list)
    against: list[str] = []


class Recorded(Verdict, frozen=True, kw_only=True):
    """A verdict as its line keeps it.

    `at` is ISO 8601 in UTC, or seconds since 1970; `report` is a folder.
    """

    at: str | float
    version: int | None = None
    decision: Decision = Decision()
    report: str | None = None

    @property
    def seconds(self) -> float:
        return seconds_of(self.at)


def read_verdicts(root: Path, most: int | None = None) -> list[Recorded]:
    """Read the newest `most` lines, the newest last.

    Unreadable ones are left out: the last may be half written.
    """
    path = root / VERDICTS
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.splitlines()[-most if most else None :]
    return sorted(filter(None, map(_read, lines)), key=lambda verdict: verdict.seconds)


def last_verdict(root: Path) -> Recorded | None:
    return next(reversed(read_verdicts(root)), None)


def _read(line: str) -> Recorded | None:
    try:
        found = msgspec.convert(_without_nulls(json.loads(line)), Recorded)
        seconds_of(found.at)
    except (ValueError, RecursionError):
        return None
    return found


def _without_nulls(value: Any) -> Any:
    """Drop nulls and numbers that are not finite, so that older lines get the defaults."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if not _is_nothing(part)}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def seconds_of(at: object) -> float:
    """Seconds since 1970, of seconds or an ISO 8601 text, which is UTC where it names no zone.

    Raises ValueError.
    """
    try:
        found = (
            datetime.fromtimestamp(at, UTC)
            if isinstance(at, int | float)
            else datetime.fromisoformat(str(at))
        )
    except (OverflowError, OSError):
        raise ValueError(f"{at} is no moment") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
