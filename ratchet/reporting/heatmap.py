"""Draw the retention table for both pages, with a shade for each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ratchet.evaluation.paired import LOWER_IS_BETTER
from ratchet.reporting.retention import Cell, Retention

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHADES = 5


class Shaded(NamedTuple):
    """A cell with a shade from 0 to SHADES - 1; a better score is darker."""

    cell: Cell
    shade: int


class Heat(NamedTuple):
    """The table as its template draws it: versions with one cell per slice, None where it was not asked."""

    metric: str
    slices: list[tuple[str, str, int]]  # name, short name, rows
    rows: list[tuple[str, list[Shaded | None]]]
    faults: list[str]


def heat(table: Retention) -> Heat:
    means = [cell.mean for row in table.versions for cell in row.cells.values() if cell]
    low, high = min(means, default=0.0), max(means, default=1.0)
    turned = table.metric in LOWER_IS_BETTER

    def shaded(cell: Cell | None) -> Shaded | None:
        if cell is None:
            return None
        part = (cell.mean - low) / (high - low) if high > low else 0.0
        return Shaded(cell, min(SHADES - 1, int((1 - part if turned else part) * SHADES)))

    return Heat(
        table.metric,
        [(name, short(name), table.rows[name]) for name in table.slices],
        [(row.name, [shaded(row.cells.get(name)) for name in table.slices]) for row in table.versions],
        table.faults,
    )


def short(name: str) -> str:
    """Shorten the name of a batch if it is long; this removes the hash at its end."""
    return name if len(name) <= 28 else f"{name[:25]}…"


def draw(table: Retention) -> Figure:
    """Draw versions by slices in matplotlib, with figures in the cells; cells never asked are grey."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    slices, versions, turned = table.slices, table.versions, table.metric in LOWER_IS_BETTER
    means = np.array(
        [[cell.mean if (cell := row.cells[name]) else np.nan for name in slices] for row in versions],
        dtype=float,
    ).reshape(len(versions), len(slices))
    figure = Figure(
        figsize=(max(5.0, 1.7 * len(slices) + 2), max(2.5, 0.55 * len(versions) + 1.8)), layout="constrained"
    )
    axes = figure.subplots()
    if not versions or not slices:
        axes.set_axis_off()
        axes.set_title("nothing was evaluated yet")
        return figure
    colours = colormaps["viridis_r" if turned else "viridis"].with_extremes(bad="lightgrey")
    low, high = (float(np.nanmin(means)), float(np.nanmax(means))) if np.isfinite(means).any() else (0.0, 1.0)
    image = axes.imshow(
        np.ma.masked_invalid(means),
        cmap=colours,
        vmin=low,
        vmax=high if high > low else low + 1e-6,
        aspect="auto",
    )
    for y, row in enumerate(versions):
        for x, name in enumerate(slices):
            cell = row.cells[name]
            dark = cell is not None and (cell.mean - low) / ((high - low) or 1) < 0.5
            text = cell.text(".2f").replace(" ", "\n", 1) if cell else "not asked"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark != turned and cell else "black",
            )
    axes.set_xticks(
        range(len(slices)),
        [f"{short(name)}\n{table.rows[name]} rows" for name in slices],
        fontsize=7,
        rotation=20,
        ha="right",
    )
    axes.set_yticks(range(len(versions)), [row.name for row in versions], fontsize=8)
    axes.set_title(
        f"{table.metric.replace('_', ' ')}: every version on the test rows of every batch", fontsize=9
    )
    figure.colorbar(image, ax=axes)
    return figure
