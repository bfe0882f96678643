"""Define the monitor's verdicts, and read the file that keeps them, one line each.

All readers use this module. It imports no numpy, so that `ratchet status` can read the last verdict quickly.
"""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

VERDICTS = Path(".ratchet/monitor/verdicts.jsonl")
REPORTS = Path(".ratchet/monitor/reports")  # Evidently's, in a folder each


class Column(msgspec.Struct, frozen=True):
    """One measured column: `value` in the window, `reference`, both in the column's unit, and its own
    uncorrected `p`.

    None stands for a number that is not finite, which JSON cannot express.
    """

    name: str
    family: str = ""
    value: float | None = None
    reference: float | None = None
    p: float | None = None
    direction: str = ""  # the change that means drift: "higher", "lower", "other"
    weight: float = 0.0  # the family's share of the error


class Picture(msgspec.Struct, frozen=True):
    """A picture of a request: its name in the log, and how it looks, in words."""

    name: str
    looks: str = ""


class Topic(msgspec.Struct, frozen=True):
    """A topic of the traffic: its words, its shares of window and reference, and examples."""

    name: str
    terms: list[str] = []
    share: float = 0.0
    reference_share: float = 0.0
    examples: list[str] = []
    pictures: list[Picture] = []  # of its requests


class Quality(msgspec.Struct, frozen=True):
    """The share of right answers, estimated from a judge and from people (ratchet/monitoring/quality.py).

    `right` is the share since the day on which a fall is likeliest to have begun, `before` that of the days
    before; both are None until enough people have answered. `most_change` is the largest difference between
    them that the rate leaves possible, at every look.
    """

    alarm: bool = False
    right: float | None = None
    before: float | None = None
    since: str = ""  # that day, ISO 8601 in UTC
    most_change: float | None = None
    requests: int = 0  # judged since the champion took over
    answers: int = 0  # of people
    waiting: int = 0  # questions that nobody has answered yet
    unscored: int = 0  # requests of this run for which the judge gave no score

    def describe(self) -> str:
        """Return the estimate in a line."""
        people = f"{self.answers} answers of people, {self.waiting} wait in the review queue"
        if self.right is None or self.before is None:
            now = (
                "not known yet" if self.right is None else f"right {self.right:.1%}, with nothing to compare"
            )
            return f"quality: {now} ({people}; {self.requests} requests)"
        fell = f"; it fell by at least {-(self.most_change or 0):.1%}" if self.alarm else ""
        return (
            f"quality: right {self.right:.1%} since {self.since}, before {self.before:.1%}{fell} ({people})"
        )


class Verdict(msgspec.Struct, frozen=True):
    """The verdict on a window.

    `p` covers all columns together; it is None where the window has fewer than `needed` distinct prompts.
    """

    verdict: str = (
        ""  # "drift" (p is at most the false-alarm rate, or the quality fell), "no drift", "too few"
    )
    p: float | None = None
    rows: int = 0
    distinct: int = 0
    needed: int = 0
    columns: list[Column] = []
    topics: list[Topic] = []
    missing: list[str] = []  # families without a reference, with the reason
    moved: list[str] = []  # families that differ, the clearest first, corrected for each other
    pictures: list[Picture] = []  # if those differ: the ones that are the farthest from the training's
    quality: Quality | None = None  # None: it is not watched (monitor.quality)


class Decision(msgspec.Struct, frozen=True):
    """Whether drift is worth a retraining, with the reasons for it and against it."""

    retrain: bool = False
    for_: list[str] = msgspec.field(name="for", default_factory=list)
    against: list[str] = []


class Recorded(Verdict, frozen=True, kw_only=True):
    """A verdict as its line in the file keeps it.

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

    Unreadable lines are skipped, because the last one may be half written.
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
    """Drop nulls and numbers that are not finite, so that lines of older versions get the defaults."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if not _is_nothing(part)}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def seconds_of(at: object) -> float:
    """Return a time as seconds since 1970, from seconds or from an ISO 8601 text.

    A text without a time zone is UTC. Raises ValueError.
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
