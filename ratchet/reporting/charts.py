"""Compute where the marks of a chart are, in per cent of its width and height.

The page stretches the drawing and sets the words beside it in HTML, so a chart fits a phone and its words
keep their size. Nothing is drawn here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import NamedTuple

HOUR = 3600
WIDTHS = (1, 2, 4, 8, 24, 168)  # possible hours of a slot; the smallest that needs at most SLOTS is taken
SLOTS, FEWEST_SLOTS = 56, 24
SMALLEST_P = 1e-4


class Slots(NamedTuple):
    """Equal stretches of time; `start` and `width` in seconds."""

    start: int
    width: int
    number: int

    def place(self, at: float) -> int:
        return min(self.number - 1, max(0, int((at - self.start) // self.width)))


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


class Line(NamedTuple):
    points: list[tuple[float, float]]
    series: int


class Mark(NamedTuple):
    x: float
    y: float
    kind: str
    title: str


class Tick(NamedTuple):
    at: float
    label: str


class Interval(NamedTuple):
    """A mean with its bounds, on an axis that all intervals share; `wanted` is the bound to clear."""

    low: float
    mean: float
    high: float
    zero: float
    wanted: float | None


def make_slots(first: float, last: float) -> Slots:
    """Divide the time from the first to the last moment into slots.

    A short time still gets FEWEST_SLOTS slots (a day of hours), so that a single bar does not fill the chart.
    """
    hours = next((width for width in WIDTHS if (last - first) / HOUR / width <= SLOTS), WIDTHS[-1])
    width = hours * HOUR
    count = max(FEWEST_SLOTS, int(last // width - first // width) + 1)
    return Slots(int(last // width - count + 1) * width, width, count)


def stack(
    values: dict[tuple[int, int], float], slots: Slots, order: Sequence[int], top: float, unit: str
) -> list[Bar]:
    """Stack bars of `values`, which are keyed by (slot, series); the first of `order` is at the bottom."""
    bars, width = [], 100 / slots.number
    for slot in range(slots.number):
        below = 0.0
        for series in order:
            if value := values.get((slot, series), 0.0):
                height = 100 * value / top
                title = f"v{series}, {moment(slots.start + slot * slots.width)}: {value:,.0f} {unit}"
                bars.append(
                    Bar(slot * width + width * 0.1, 100 - below - height, width * 0.8, height, series, title)
                )
                below += height
    return bars


def lines(values: dict[tuple[int, int], float], slots: Slots) -> list[Line]:
    """Draw lines through values between 0 and 1, which are keyed by (slot, series).

    A line bridges slots without a value up to a quarter of the chart; a wider gap interrupts it.
    """
    by_series: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for (slot, series), value in sorted(values.items()):
        by_series[series].append((slot, value))
    return [
        Line([_center(slot, value, slots) for slot, value in part], series)
        for series, points in by_series.items()
        for part in _parts(points, slots.number / 4)
    ]


def _parts(points: list[tuple[int, float]], most: float) -> Iterable[list[tuple[int, float]]]:
    part = points[:1]
    for before, point in pairwise(points):
        if point[0] - before[0] > most:
            yield part
            part = []
        part.append(point)
    yield part


def _center(slot: int, value: float, slots: Slots) -> tuple[float, float]:
    return (100 * (slot + 0.5) / slots.number, 100 - 100 * value)


def nice_top(value: float) -> float:
    """Return the smallest of 1, 2, 3, 4, 5, 6, 8, 10, 20, … that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if value <= step * power), 10 * power)


def time_ticks(start: float, end: float) -> list[Tick]:
    """Return ticks at four moments, with the hour if the whole span is shorter than three days."""
    short = end - start < 72 * HOUR
    return [
        Tick(100 * part, moment(start + (end - start) * part, day=not short))
        for part in (0.125, 0.375, 0.625, 0.875)
    ]


def moment(at: float, *, day: bool = False) -> str:
    return f"{datetime.fromtimestamp(at, UTC):{'%-d %b' if day else '%-d %b %H:%M'}}"


def p_height(p: float) -> float:
    """Return the height at which a p-value is drawn, in per cent from the top, on a logarithmic axis.

    A p of 1 is at the bottom, one of 1e-4 or less at the top.
    """
    return 100 - 100 * min(1.0, math.log10(max(p, SMALLEST_P)) / math.log10(SMALLEST_P))


def intervals(found: Sequence[tuple[float, float, float, float | None]]) -> list[Interval]:
    """Place each (low, mean, high, wanted) on one common axis, in per cent, with zero in the middle.

    Bounds that are not finite end at the edge.
    """
    known = [abs(value) for entry in found for value in entry if value is not None and math.isfinite(value)]
    limit = max(known, default=1.0) * 1.1 or 1.0

    def place(value: float) -> float:
        return min(100.0, max(0.0, 50 + 50 * value / limit))

    return [
        Interval(place(low), place(mean), place(high), 50.0, None if wanted is None else place(wanted))
        for low, mean, high, wanted in found
    ]
