"""Turn the counts into tables and into the text of docs/gatebench.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.gatebench.judging import Rule
from benchmarks.gatebench.measure import Cell, left_out
from benchmarks.gatebench.pairs import EQUAL, GAIN, LOSS, SPOILT
from ratchet.evaluation.statistics import Interval, wilson
from ratchet.files import write_text

PAGE, FIGURE = "gatebench.md", "images/gatebench.svg"
BEGIN, END = "<!-- gatebench: begin -->", "<!-- gatebench: end -->"
GLANCE = (200, 1200)  # test rows of the first table; the last one is by effect at the second


class Found(NamedTuple):
    """What a run found: the models' accuracies, all cells, and the seconds that it took.

    `cpu_seconds` are those of all processes, which other work on the machine changes less.
    """

    rules: list[Rule]
    accuracies: dict[str, float]
    rows: int  # held out
    cells: list[Cell]
    seconds: float
    cpu_seconds: float
    made: bool  # whether the seconds hold the making of the models

    @property
    def sizes(self) -> list[int]:
        return sorted({cell.rows for cell in self.cells})

    def points(self, kind: str) -> list[float]:
        return sorted({cell.points for cell in self.cells if cell.kind == kind})

    def pick(self, rule: str, kind: str, rows: int | None = None, points: float | None = None) -> list[Cell]:
        return [
            cell
            for cell in self.cells
            if cell.rule == rule
            and cell.kind == kind
            and rows in (None, cell.rows)
            and points in (None, cell.points)
        ]


def promoted(cells: Sequence[Cell]) -> Interval | None:
    """Return the share of promoted pairs with its 95 % interval, None without pairs."""
    pairs, count = sum(cell.pairs for cell in cells), sum(cell.promoted for cell in cells)
    return wilson(np.repeat([1.0, 0.0], [count, pairs - count]), alpha=0.025) if pairs else None


def missed(cells: Sequence[Cell]) -> Interval | None:
    """Return the share of pairs that were not promoted."""
    found = promoted(cells)
    return found and Interval(1 - found.mean, 1 - found.high, 1 - found.low)


def percent(found: Interval | None) -> str:
    if found is None:
        return ""
    share = 100 * found.mean
    return f"{share:.1f} %" if 0 < share < 10 or 90 < share < 100 else f"{share:.0f} %"


def tables(found: Found) -> Iterator[str]:
    """Yield the tables, each with its heading; the first has the rest at a glance."""
    yield _at_a_glance(found)
    by_size: list[tuple[str, str, Callable[[Sequence[Cell]], Interval | None]]] = [
        ("Wrong promotions: equal candidates that were promoted", EQUAL, promoted),
        ("Wrong promotions: worse candidates that were promoted", LOSS, promoted),
        ("Wrong promotions: spoilt candidates that were promoted", SPOILT, promoted),
        ("Missed gains: better candidates that were not promoted", GAIN, missed),
    ]
    for title, kind, share in by_size:
        if not found.points(kind):
            continue
        header = ["test rows", *(f"{rows:,}" for rows in found.sizes)]
        body = [
            [rule.title, *(percent(share(found.pick(rule.name, kind, rows))) for rows in found.sizes)]
            for rule in found.rules
        ]
        yield f"**{title}** ({_counted(found, kind)})\n\n{_table(header, body)}"
    yield _by_effect(found)


def _at_a_glance(found: Found) -> str:
    sizes = sorted({_nearest(found, rows) for rows in GLANCE})
    columns = [
        ("equal promoted", EQUAL, promoted),
        ("worse promoted", LOSS, promoted),
        ("gains missed", GAIN, missed),
    ]
    shown = [(rows, *column) for rows in sizes for column in columns]
    header = [
        "rule",
        *(f"{rows:,} rows: {words}" for rows, words, _, _ in shown),
        "all sizes: spoilt promoted",
    ]
    body = [
        [
            rule.title,
            *(percent(share(found.pick(rule.name, kind, rows))) for rows, _, kind, share in shown),
            percent(promoted(found.pick(rule.name, SPOILT))),
        ]
        for rule in found.rules
    ]
    return f"**At a glance**\n\n{_table(header, body)}"


def _nearest(found: Found, rows: int) -> int:
    """Return the largest measured size up to `rows`, or else the smallest."""
    return max((size for size in found.sizes if size <= rows), default=found.sizes[0])


def _counted(found: Found, kind: str) -> str:
    cells = found.pick(found.rules[0].name, kind, found.sizes[0])
    points = ", ".join(f"{points:g}" for points in found.points(kind))
    effects = f", {points} points in equal parts" if kind in (LOSS, GAIN) else ""
    return f"{sum(cell.pairs for cell in cells):,} pairs a cell{effects}"


def _by_effect(found: Found) -> str:
    rows = _nearest(found, GLANCE[-1])
    columns = [(LOSS, points) for points in reversed(found.points(LOSS))]
    columns += [(EQUAL, 0.0), *((GAIN, points) for points in found.points(GAIN))]
    signs = {LOSS: "−", EQUAL: "", GAIN: "+"}
    header = ["effect in points", *(f"{signs[kind]}{points:g}" for kind, points in columns)]
    body = [
        [
            rule.title,
            *(percent(promoted(found.pick(rule.name, kind, rows, points))) for kind, points in columns),
        ]
        for rule in found.rules
    ]
    return f"**Promoted, by effect, on {rows:,} test rows**\n\n{_table(header, body)}"


def _table(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def described(found: Found) -> str:
    """Describe the models and the run in a paragraph."""
    twins = [mean for name, mean in found.accuracies.items() if name.startswith("twin-")]
    spoilt = [mean for name, mean in found.accuracies.items() if name.startswith("spoilt-")]
    verdicts = sum(cell.pairs for cell in found.cells if cell.rule == found.rules[0].name)
    seconds = f"{found.seconds:,.0f} s, {found.cpu_seconds:,.0f} s of CPU"
    seconds += "" if found.made else ", without the making of the models"
    text = (
        f"{found.rows:,} rows held out. Right on them: base {found.accuracies['base']:.3f}, {len(twins)}"
        f" twins {min(twins):.3f} to {max(twins):.3f}, weaker model {found.accuracies['weaker']:.3f},"
        f" {len(spoilt)} spoilt ones {min(spoilt):.3f} to {max(spoilt):.3f}. Each rule judged"
        f" {verdicts:,} pairs; {seconds}."
    )
    if missing := "; ".join(left_out(found.cells)):
        text += f" Left out, because the models lie too close together: {missing}."
    return text


def faults(found: Found) -> Iterator[str]:
    """Yield a line for each rule that failed."""
    for rule in found.rules:
        broken = [cell for cell in found.cells if cell.rule == rule.name and cell.faults]
        if broken:
            first, pairs = broken[0], sum(cell.pairs for cell in found.cells if cell.rule == rule.name)
            yield (
                f"{rule.name}: {sum(cell.faults for cell in broken):,} of {pairs:,} verdicts failed and count"
                f" as not promoted; the first, on a pair of kind {first.kind} with {first.rows:,} rows:"
                f" {first.fault}"
            )


def write_page(folder: Path, found: Found, figure: str) -> None:
    """Write the figure, and put the tables between the marks of the page."""
    before, after = split_page(folder)
    alt = "Small charts, one a rule: shares of wrong promotions and of missed gains by the test rows"
    parts = [described(found), f"![{alt}]({FIGURE})", *faults(found), *tables(found)]
    write_text(folder / FIGURE, figure)
    write_text(folder / PAGE, before + "\n\n".join([BEGIN, *parts, END]) + after)


def split_page(folder: Path) -> tuple[str, str]:
    """Return what stands before and after the marks. Raises SystemExit where they are missing."""
    page = folder / PAGE
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} does not hold the marks {BEGIN} and {END}: nothing is measured")
    return before, after
