"""Draw the gate's checks as a forest plot: the gain in each, with its interval and the bound to clear.

It is a PNG in git beside the verdict. In a comment, GitHub shows an image of a repository to those who may
read the repository; it shows none that stands in the comment's own text (`data:`). The image holds figures
and the names of checks, no row.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ratchet.promotion.verdict import Check, Verdict
from ratchet.reporting.dashboard_view import label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOREST = "reports/gate.png"
COLOURS = {"pass": "#1a7f37", "fail": "#cf222e", "unclear": "#9a6700"}
MOST_CHECKS, LONGEST = 24, 40


def draw_forest(verdict: Verdict) -> bytes:
    """Return the plot as PNG; the same verdict gives the same bytes."""
    from matplotlib.figure import Figure

    checks = [check for check in [*verdict.checks, *verdict.regions] if check.gain and check.name != "worth"]
    checks = checks[:MOST_CHECKS]
    metrics = list(dict.fromkeys(check.metric for check in checks))
    figure = Figure(figsize=(8, 0.8 + 0.32 * len(checks) + 0.7 * len(metrics)), dpi=110, layout="constrained")
    panels = [[check for check in checks if check.metric == metric] for metric in metrics]
    if panels:
        axes = figure.subplots(
            len(panels), 1, squeeze=False, height_ratios=[1 + len(part) for part in panels]
        )
        for (place,), part in zip(axes, panels, strict=True):
            _draw_panel(place, part)
    rival = verdict.rival.told
    figure.suptitle(f"{verdict.verdict}: gain over {rival}; | is the bound to clear", fontsize=10)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_panel(axes: Axes, checks: Sequence[Check]) -> None:
    """Draw the checks of one metric, which share an axis, from the top down."""
    for place, check in enumerate(checks):
        mean, low, high = check.gain or (0.0, 0.0, 0.0)
        colour = COLOURS[check.result]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], "s", color=colour, markersize=5)
        if isinstance(check.wanted, float):
            axes.plot([check.wanted], [place], "|", color="black", markersize=13)
    axes.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylim(len(checks) - 0.5, -0.5)
    axes.set_yticks(range(len(checks)))
    # Names come from data: no formula may begin in one, and no letter may be missing in the font.
    axes.set_yticklabels([_plain(check) for check in checks], fontsize=8, parse_math=False)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(_ascii(checks[0].metric.replace("_", " ")), fontsize=8, parse_math=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _plain(check: Check) -> str:
    name = _ascii(label_of(check.name))
    return f"{name if len(name) <= LONGEST else name[: LONGEST - 3] + '...'} ({check.rows})"


def _ascii(text: str) -> str:
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable.encode("ascii", "replace").decode()
