"""Prepare what the page's template needs: charts in per cent, and sentences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ratchet.media.names import in_words
from ratchet.monitoring.request_records import Traffic
from ratchet.monitoring.verdicts import Column, Recorded, seconds_of
from ratchet.promotion.rollout import Measure
from ratchet.promotion.verdict import Check, Result
from ratchet.reporting.charts import (
    Bar,
    Interval,
    Line,
    Mark,
    Tick,
    intervals,
    lines,
    make_slots,
    moment,
    nice_top,
    p_height,
    stack,
    time_ticks,
)
from ratchet.reporting.heatmap import heat

if TYPE_CHECKING:
    from jinja2 import Environment

    from ratchet.reporting.dashboard import Page

COLOURS = 6
LABELS = {
    "feedback": "feedback score",
    "errors": "failed requests",
    "empty": "empty answers",
    "latency": "latency",
}


def render(page: Page) -> str:
    traffic, rollout = page.traffic.found or [], page.rollout.found
    versions = sorted({row.version for row in traffic})
    return (
        environment()
        .get_template("page.html")
        .render(
            page._asdict(),
            colours={version: place % COLOURS for place, version in enumerate(versions)},
            usage=usage_view(traffic, page.at) if traffic else None,
            drift=drift_view(page.verdicts.found, page.false_alarm_rate) if page.verdicts.found else None,
            measures=measure_views(rollout.last.measures, page.margins) if rollout else [],
            heat=heat(page.table.found) if page.table.found else None,
            kept=[(entry, draw_checks(entry.checks)) for entry in page.forgetting.found or []],
        )
    )


def environment() -> Environment:
    """Make the environment of the page templates; it escapes all text that is inserted."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "when": when,
        "iso": iso,
        "signed": signed,
        "figure": figure,
        "percent": percent,
        "said": said,
        "word_of": word_of,
        "label_of": label_of,
    }
    return pages


# --- traffic and feedback -----------------------------------------------------------------------------------


class Total(NamedTuple):
    """A version's traffic; `errors` is a share of its requests."""

    version: int
    requests: int
    errors: float
    latency_ms: float | None
    feedback: float | None
    feedbacks: int


class Usage(NamedTuple):
    bars: list[Bar]
    lines: list[Line]
    marks: list[Mark]
    top: float
    ticks: list[Tick]
    slot: str
    totals: list[Total]


def usage_view(traffic: list[Traffic], now: float) -> Usage:
    """Draw requests and feedback as two charts on one time axis, with a line of totals per version."""
    slots = make_slots(min(row.hour for row in traffic), now)
    requests, scores = defaultdict[tuple[int, int], float](float), defaultdict[tuple[int, int], float](float)
    feedbacks = defaultdict[tuple[int, int], int](int)
    for row in traffic:
        key = (slots.place(row.hour), row.version)
        requests[key] += row.requests
        if row.feedback is not None:
            scores[key] += row.feedback * row.feedbacks
            feedbacks[key] += row.feedbacks
    order = sorted({row.version for row in traffic})
    heights = [sum(requests[slot, version] for version in order) for slot in range(slots.number)]
    top = nice_top(max(heights))
    means = {key: scores[key] / count for key, count in feedbacks.items()}
    each = {3600: "an hour", 86_400: "a day", 604_800: "a week"}
    return Usage(
        bars=stack(requests, slots, order, top, "requests"),
        lines=lines(means, slots),
        marks=[
            Mark(
                100 * (slot + 0.5) / slots.number,
                100 - 100 * mean,
                str(version),
                f"v{version}, {moment(slots.start + slot * slots.width)}: {mean:.2f}",
            )
            for (slot, version), mean in means.items()
        ],
        top=top,
        ticks=time_ticks(slots.start, slots.start + slots.width * slots.number),
        slot=each.get(slots.width, f"{slots.width // 3600} hours"),
        totals=[
            _total(version, [row for row in traffic if row.version == version]) for version in reversed(order)
        ],
    )


def _total(version: int, rows: list[Traffic]) -> Total:
    requests = sum(row.requests for row in rows)
    return Total(
        version,
        requests,
        sum(row.errors for row in rows) / requests,
        _mean([(row.latency_ms, row.requests - row.errors) for row in rows if row.latency_ms is not None]),
        _mean([(row.feedback, row.feedbacks) for row in rows if row.feedback is not None]),
        sum(row.feedbacks for row in rows),
    )


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / weight if weight else None


# --- drift --------------------------------------------------------------------------------------------------


class Drift(NamedTuple):
    newest: Recorded
    columns: list[Column]  # of the newest verdict, the strongest first
    marks: list[Mark]
    threshold: float
    heights: list[Tick]
    ticks: list[Tick]
    alarms: int
    told: int
    earlier: list[Recorded]


def drift_view(verdicts: list[Recorded], rate: float) -> Drift:
    told = [verdict for verdict in verdicts if verdict.p is not None]
    first, last = verdicts[0].seconds, verdicts[-1].seconds
    span = max(last - first, 3600.0)

    def mark(verdict: Recorded) -> Mark:
        p, kind = verdict.p, verdict.verdict.replace(" ", "-")
        words = f"{verdict.verdict}, {moment(verdict.seconds)}, {verdict.rows} requests" + (
            f", p = {p:.4f}" if p is not None else ""
        )
        return Mark(97 - 94 * (last - verdict.seconds) / span, 98 if p is None else p_height(p), kind, words)

    newest = verdicts[-1]
    columns = [column for column in newest.columns if column.p is not None]
    return Drift(
        newest,
        columns=sorted(columns, key=lambda column: column.p or 0.0),
        marks=[mark(verdict) for verdict in verdicts],
        threshold=p_height(rate),
        heights=[Tick(p_height(p), f"{p:g}") for p in (1.0, 0.1, 0.01, 0.001, 0.0001)],
        ticks=time_ticks(last - span, last),
        alarms=sum(verdict.verdict == "drift" for verdict in told),
        told=len(told),
        earlier=verdicts[-2:-9:-1],
    )


# --- intervals ----------------------------------------------------------------------------------------------


class MeasureView(NamedTuple):
    """A measure of a rollout: `figures` are mean, low and high in its `unit`, `users` those of each arm."""

    label: str
    unit: str
    figures: list[float]
    interval: Interval
    result: Result
    word: str
    users: tuple[int, int]


def measure_views(measures: dict[str, Measure], margins: dict[str, float]) -> list[MeasureView]:
    """Show each measure as challenger minus champion, beside the margin that it has to clear.

    Latency is compared as a logarithm and shown as a share of the champion's latency.
    """
    found = []
    for name, label in LABELS.items():
        measure, gains = measures.get(name, Measure()), name == "feedback"
        bounds = measure.gain if gains else measure.pass_  # the bounds that decide on a promotion
        if bounds is None:
            continue
        low, mean, high = (
            math.expm1(min(value, 50.0)) if name == "latency" else value
            for value in (bounds.low, bounds.mean, bounds.high)
        )
        margin = margins[name]
        clear, lost = (low > margin, high < 0) if gains else (high <= margin, low > margin)
        result: Result = "pass" if clear else "fail" if lost else "unclear"
        better = "better" if gains else "no worse"
        found.append(
            MeasureView(
                label,
                "" if gains else " %",
                [value * (1 if gains else 100) for value in (mean, low, high)],
                intervals([(low, mean, high, margin)])[0],
                result,
                {"pass": better, "fail": "worse", "unclear": "open"}[result],
                (bounds.champion, bounds.challenger),
            )
        )
    return found


def draw_checks(checks: Sequence[Check]) -> list[tuple[Check, Interval | None]]:
    """Pair each check with its interval; gains of the same metric share an axis.

    A check without figures has no interval.
    """
    drawn: dict[int, Interval] = {}
    places = defaultdict[str, list[int]](list)
    for place, check in enumerate(checks):
        if check.gain:
            places["money" if check.name == "worth" else check.metric].append(place)
    for metric in places.values():
        found = []
        for place in metric:
            mean, low, high = checks[place].gain or (0.0, 0.0, 0.0)
            wanted = checks[place].wanted
            found.append((low, mean, high, wanted if isinstance(wanted, float) else None))
        drawn |= zip(metric, intervals(found), strict=True)
    return [(check, drawn.get(place)) for place, check in enumerate(checks)]


def word_of(check: Check) -> str:
    kept, lost = ("cured", "not cured") if check.name.startswith("region") else ("kept", "lost")
    return {"pass": kept, "fail": lost}.get(check.result, "unclear")


def label_of(check: str) -> str:
    kind, _, name = check.partition(":")
    return {
        "past": f"batch {name}" if name else "all earlier batches",
        "golden": "golden rows",
        "region": f"drifted topic {name}",
    }.get(kind, check)


# --- words --------------------------------------------------------------------------------------------------


def when(at: object) -> str:
    """Format a time as UTC, to the minute; return a value that is no time unchanged."""
    try:
        return f"{datetime.fromtimestamp(seconds_of(at), UTC):%-d %b %Y, %H:%M}"
    except ValueError:
        return str(at)


def iso(at: object) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds_of(at), UTC):%Y-%m-%dT%H:%M:%SZ}"
    except ValueError:
        return ""


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def figure(value: float | None) -> str:
    """Format a number with three significant digits; from a thousand on, as a whole number."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def said(text: str, most: int = 220) -> str:
    """Put a person's text on one line, and cut it to at most `most` characters."""
    words = " ".join(in_words(str(text)).split())
    return words if len(words) <= most else words[: most - 1] + "…"
