"""The forgetting ledger as both pages draw it: a table whose cells have a shade."""

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
        {"name": row["name"], "cells": [cell and {**cell, "shade": shade(cell["mean"])} for cell in (row["cells"].get(name) for name in ledger["slices"])]}
        for row in ledger["versions"]
    ]
    return {
        "metric": ledger["metric"],
        "slices": [{"name": name, "short": short(name), "rows": ledger["rows"][name]} for name in ledger["slices"]],
        "rows": rows,
        "faults": ledger["faults"],
    }


def short(name: str) -> str:
    """A batch's name without the hash at its end."""
    return name if len(name) <= 28 else f"{name[:25]}…"


def in_figures(cell: dict[str, Any] | None) -> str:
    return f"{cell['mean']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" if cell else "not asked"
