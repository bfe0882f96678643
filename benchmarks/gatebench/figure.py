"""Draw the curves of every rule: wrong promotions and missed gains by the number of test rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from math import ceil
from typing import TYPE_CHECKING

from benchmarks.gatebench.measure import Cell
from benchmarks.gatebench.pairs import EQUAL, GAIN, LOSS
from benchmarks.gatebench.tables import Found, missed, promoted
from ratchet.evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
Share = Callable[[Sequence[Cell]], Interval | None]
CURVES: tuple[tuple[str, str, Share, str, str], ...] = (
    ("equal candidates promoted", EQUAL, promoted, "#c62828", "-"),
    ("worse candidates promoted", LOSS, promoted, "#c62828", ":"),
    ("better candidates missed", GAIN, missed, "#1565c0", "-"),
)


def draw(found: Found) -> str:
    """Return an SVG with one small chart a rule; the same figures give the same text."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = ceil(len(found.rules) / COLUMNS)
    with rc_context({"svg.hashsalt": "gatebench", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 2.3 * rows + 0.6), layout="constrained")
        charts = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        for chart, rule in zip(charts, found.rules, strict=False):
            chart.set_title(rule.title, fontsize=9)
            _draw_rule(chart, found, rule.name)
        for chart in charts[len(found.rules) :]:
            chart.set_axis_off()
        figure.supxlabel("test rows (logarithmic)", fontsize=9)
        figure.supylabel("share of pairs, %", fontsize=9)
        handles, labels = charts[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(CURVES), frameon=False)
        out = StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _draw_rule(chart: Axes, found: Found, rule: str) -> None:
    for label, kind, share, colour, style in CURVES:
        points = [(rows, share(found.pick(rule, kind, rows))) for rows in found.sizes]
        known = [(rows, interval) for rows, interval in points if interval]
        sizes = [rows for rows, _ in known]
        chart.plot(
            sizes,
            [100 * interval.mean for _, interval in known],
            color=colour,
            linestyle=style,
            marker=".",
            label=label,
        )
        chart.fill_between(
            sizes,
            [100 * interval.low for _, interval in known],
            [100 * interval.high for _, interval in known],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    chart.axhline(5, color="#888888", linewidth=0.6)
    chart.set_xscale("log")
    chart.set_xticks(found.sizes, [str(rows) for rows in found.sizes], minor=False, rotation=45, fontsize=7)
    chart.set_xticks([], minor=True)
    chart.set_ylim(-3, 103)
