"""What the page's template is given: charts in per cent, and what is said in words."""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.monitoring.verdicts import Recorded, seconds_of
from ratchet.reporting.charts import (
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

COLOURS = 6
MEASURES = {
    "feedback": "gain",
    "errors": "pass",
    "empty": "pass",
    "latency": "pass",
}  # measure → the bounds that let a challenger through
LABELS = {
    "feedback": "feedback score",
    "errors": "failed requests",
    "empty": "empty answers",
    "latency": "latency",
}


def render(found: dict[str, Any]) -> str:
    return environment().get_template("page.html").render(found, **views(found))


def environment() -> Environment:
    """All text that comes in is escaped."""
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
    }
    return pages


def views(found: dict[str, Any]) -> dict[str, Any]:
    traffic, rollout = found["traffic"]["found"] or [], found["rollout"]["found"]
    versions = sorted({row["version"] for row in traffic})
    return {
        "colours": {version: place % COLOURS for place, version in enumerate(versions)},
        "usage": usage_view(traffic, found["at"]) if traffic else None,
        "drift": (
            drift_view(found["verdicts"]["found"], found["false_alarm_rate"])
            if found["verdicts"]["found"]
            else None
        ),
        "measures": (
            measure_views((rollout["last"] or {}).get("measures") or {}, found["margins"]) if rollout else []
        ),
        "heat": heat(found["table"]["found"]) if found["table"]["found"] else None,
        "kept": [
            entry | {"rows": check_views(entry["checks"])} for entry in found["forgetting"]["found"] or []
        ],
    }


# --- traffic and feedback -----------------------------------------------------------------------------------


def usage_view(traffic: list[dict[str, Any]], now: float) -> dict[str, Any]:
    """Both charts on one axis of time, and a line of totals a version."""
    slots = make_slots(min(row["hour"] for row in traffic), now)
    requests, scores = defaultdict[tuple[int, int], float](float), defaultdict[tuple[int, int], float](float)
    feedbacks = defaultdict[tuple[int, int], int](int)
    for row in traffic:
        key = (slots.place(row["hour"]), row["version"])
        requests[key] += row["requests"]
        if row["feedbacks"]:
            scores[key] += row["feedback"] * row["feedbacks"]
            feedbacks[key] += row["feedbacks"]
    order = sorted({row["version"] for row in traffic})
    heights = [sum(requests[slot, version] for version in order) for slot in range(slots.number)]
    top = nice_top(max(heights))
    means = {key: scores[key] / count for key, count in feedbacks.items()}
    return {
        "bars": stack(requests, slots, order, top, "requests"),
        "lines": lines(means, slots),
        "marks": [
            Mark(
                100 * (slot + 0.5) / slots.number,
                100 - 100 * mean,
                str(version),
                f"v{version}, {moment(slots.start + slot * slots.width)}: {mean:.2f}",
            )
            for (slot, version), mean in means.items()
        ],
        "top": top,
        "ticks": time_ticks(slots.start, slots.start + slots.width * slots.number),
        "slot": (
            {3600: "an hour", 86_400: "a day", 604_800: "a week"}.get(
                slots.width, f"{slots.width // 3600} hours"
            )
        ),
        "totals": [
            _total(version, [row for row in traffic if row["version"] == version])
            for version in reversed(order)
        ],
    }


def _total(version: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    requests, feedbacks = sum(row["requests"] for row in rows), sum(row["feedbacks"] for row in rows)
    return {
        "version": version,
        "requests": requests,
        "errors": sum(row["errors"] for row in rows) / requests,
        "latency_ms": _mean(
            [
                (row["latency_ms"], row["requests"] - row["errors"])
                for row in rows
                if row["latency_ms"] is not None
            ]
        ),
        "feedback": _mean([(row["feedback"], row["feedbacks"]) for row in rows if row["feedbacks"]]),
        "feedbacks": feedbacks,
    }


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / weight if weight else None


# --- drift --------------------------------------------------------------------------------------------------


def drift_view(verdicts: list[Recorded], rate: float) -> dict[str, Any]:
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
    return {
        "newest": newest,
        "columns": sorted(
            (column for column in newest.columns if column.p is not None),
            key=lambda column: column.p or 0.0,
        ),
        "marks": [mark(verdict) for verdict in verdicts],
        "threshold": p_height(rate),
        "heights": [Tick(p_height(p), f"{p:g}") for p in (1.0, 0.1, 0.01, 0.001, 0.0001)],
        "ticks": time_ticks(last - span, last),
        "alarms": sum(verdict.verdict == "drift" for verdict in told),
        "told": len(told),
        "earlier": verdicts[-2:-9:-1],
    }


# --- intervals ----------------------------------------------------------------------------------------------


def measure_views(measures: dict[str, Any], margins: dict[str, float]) -> list[dict[str, Any]]:
    """Challenger minus champion, and what it has to clear; latency, which is compared as a logarithm, as a
    share of the champion's.
    """
    found = []
    for name, kind in MEASURES.items():
        bounds = (measures.get(name) or {}).get(kind)
        if not bounds:
            continue
        low, mean, high = (
            math.expm1(min(bounds[key], 50.0)) if name == "latency" else bounds[key]
            for key in ("low", "mean", "high")
        )
        margin = margins[name]
        clear, lost = (low > margin, high < 0) if name == "feedback" else (high <= margin, low > margin)
        found.append(
            {
                "label": LABELS[name],
                "unit": "" if name == "feedback" else " %",
                "figures": [value * (1 if name == "feedback" else 100) for value in (mean, low, high)],
                "interval": intervals([(low, mean, high, margin)])[0],
                "result": "pass" if clear else "fail" if lost else "unclear",
                "word": (
                    ("better" if name == "feedback" else "no worse") if clear else "worse" if lost else "open"
                ),
                "users": (bounds["champion"], bounds["challenger"]),
            }
        )
    return found


def check_views(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidate minus the model before it, all on one axis; checks without figures have no interval."""
    whole = [check for check in checks if None not in (check["low"], check["mean"], check["high"])]
    drawn = dict(
        zip(
            (check["name"] for check in whole),
            intervals([(check["low"], check["mean"], check["high"], check["wanted"]) for check in whole]),
            strict=True,
        )
    )
    return [
        check
        | {
            "label": label_of(check["name"]),
            "word": word_of(check),
            "interval": drawn.get(check["name"]),
        }
        for check in checks
    ]


def word_of(check: dict[str, Any]) -> str:
    kept, lost = ("cured", "not cured") if check["name"].startswith("region") else ("kept", "lost")
    return {"pass": kept, "fail": lost}.get(check["result"], "unclear")


def label_of(check: str) -> str:
    kind, _, name = check.partition(":")
    return {
        "past": f"batch {name}" if name else "all earlier batches",
        "golden": "golden rows",
        "region": f"drifted topic {name}",
    }.get(kind, check)


# --- words --------------------------------------------------------------------------------------------------


def when(at: Any) -> str:
    """UTC, to the minute; a time that is none as it was written."""
    try:
        return f"{datetime.fromtimestamp(seconds_of(at), UTC):%-d %b %Y, %H:%M}"
    except ValueError:
        return str(at)


def iso(at: Any) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds_of(at), UTC):%Y-%m-%dT%H:%M:%SZ}"
    except ValueError:
        return ""


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def figure(value: float | None) -> str:
    """Three significant digits; whole numbers from a thousand on."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def said(text: str, most: int = 220) -> str:
    """A person's text on one line, cut."""
    words = " ".join(str(text).split())
    return words if len(words) <= most else words[: most - 1] + "…"
