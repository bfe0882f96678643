"""Draw the retention table for both pages: each cell has a shade."""

from __future__ import annotations

from typing import Any

SHADES = 5
LOWER_IS_BETTER = ("answer_nll", "refusal")


def heat(ledger: dict[str, Any]) -> dict[str, Any]:
    """Cells with a shade from 0 to SHADES - 1: the better, the darker."""
    means = [cell["mean"] for row in ledger["versions"] for cell in row["cells"].values() if cell]
    low, high = min(means, default=0.0), max(means, default=1.0)
    turned = ledger["metric"] in LOWER_IS_BETTER

    def shade(mean: float) -> int:
        part = (mean - low) / (high - low) if high > low else 0.0
        return min(SHADES - 1, int((1 - part if turned else part) * SHADES))

    rows = [
        {
            "name": row["name"],
            "cells": [
                cell and {**cell, "shade": shade(cell["mean"])}
                for cell in (row["cells"].get(name) for name in ledger["slices"])
            ],
        }
        for row in ledger["versions"]
    ]
    return {
        "metric": ledger["metric"],
        "slices": [
            {"name": name, "short": short(name), "rows": ledger["rows"][name]} for name in ledger["slices"]
        ],
        "rows": rows,
        "faults": ledger["faults"],
    }


def short(name: str) -> str:
    """A batch's name without the hash at its end."""
    return name if len(name) <= 28 else f"{name[:25]}…"


def in_figures(cell: dict[str, Any] | None) -> str:
    return f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" if cell else "not asked"


def draw(ledger: dict[str, Any]) -> Any:
    """Draw versions by slices in matplotlib, each cell with its figures; what was never asked stays grey."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    slices, versions = ledger["slices"], ledger["versions"]
    means = np.array(
        [[(row["cells"][name] or {}).get("mean", np.nan) for name in slices] for row in versions], dtype=float
    ).reshape(len(versions), len(slices))
    figure = Figure(
        figsize=(max(5.0, 1.7 * len(slices) + 2), max(2.5, 0.55 * len(versions) + 1.8)), layout="constrained"
    )
    axes = figure.subplots()
    if not versions or not slices:
        axes.set_axis_off()
        axes.set_title("nothing was evaluated yet")
        return figure
    colours = colormaps["viridis_r" if ledger["metric"] in LOWER_IS_BETTER else "viridis"].with_extremes(
        bad="lightgrey"
    )
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
            cell = row["cells"][name]
            dark = cell is not None and (cell["mean"] - low) / ((high - low) or 1) < 0.5
            text = f"{cell['mean']:.2f}\n[{cell['low']:.2f}, {cell['high']:.2f}]" if cell else "not asked"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark != (ledger["metric"] in LOWER_IS_BETTER) and cell else "black",
            )
    axes.set_xticks(
        range(len(slices)),
        [f"{short(name)}\n{ledger['rows'][name]} rows" for name in slices],
        fontsize=7,
        rotation=20,
        ha="right",
    )
    axes.set_yticks(range(len(versions)), [row["name"] for row in versions], fontsize=8)
    axes.set_title(
        f"{ledger['metric'].replace('_', ' ')}: every version on the test rows of every batch", fontsize=9
    )
    figure.colorbar(image, ax=axes)
    return figure
