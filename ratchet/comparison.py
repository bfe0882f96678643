"""What `ratchet compare` found, as a table."""

from __future__ import annotations

from typing import Any

HEAD = ("method", "quality [95 %]", "validation loss", "training s", "peak MiB", "saved MiB", "ms an answer [95 %]", "tokens an answer")


def markdown(found: dict[str, Any]) -> str:
    """The table with what it rests on."""
    lines = [f"# Methods compared\n\n{found['rows']} test rows, `{found['metric']}`; commit {found['commit'][:8]}, {found['machine']}. One training each, seed {found['seed']}.\n"]
    lines += ["\n".join(f"| {' | '.join(row)} |" for row in table_rows(found)), ""]
    lines += [f"- `{row['method']}`: {_settings(row['changes'])}" for row in found["methods"]]
    return "\n".join(lines) + "\n"


def table_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """With its head, and Markdown's line under it."""
    return [HEAD, tuple("---" for _ in HEAD), *(_row(row) for row in found["methods"])]


def text(found: dict[str, Any]) -> list[str]:
    rows = [row for row in table_rows(found) if row[0] != "---"]
    widths = [max(len(row[column]) for row in rows if len(row) > column) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["failed"]:
        reason = f"failed: {row['failed']}".replace("|", "/")
        return (row["method"], reason, *("" for _ in HEAD[2:]))
    quality, latency = row["quality"], row["latency"]["milliseconds"]
    return (
        row["method"],
        f"{quality['mean']:.3f} [{quality['low']:.3f}, {quality['high']:.3f}]",
        f"{row['validation_loss']:.4f}",
        f"{row['seconds']:.1f}",
        f"{row['peak_mib']:,.0f}",
        f"{row['saved_mib']:.2f}",
        f"{latency['mean']:.1f} [{latency['low']:.1f}, {latency['high']:.1f}]",
        f"{row['latency']['tokens']:.1f}",
    )


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in changes.items())
