"""Show what `ratchet compare` measured, as a table for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from ratchet.evaluation.statistics import Interval
from ratchet.promotion.verdict import Speed

if TYPE_CHECKING:
    from ratchet.training.schedule import Figures
    from ratchet.training.search_space import Changes

HEAD = (
    "method",
    "quality [95 %]",
    "validation loss",
    "training s",
    "peak MiB",
    "saved MiB",
    "ms an answer [95 %]",
    "tokens an answer",
)


class Failed(msgspec.Struct, frozen=True):
    """A method that could not be trained, scored or timed, with the reason."""

    method: str
    changes: Changes
    failed: str

    @property
    def cells(self) -> tuple[str, ...]:
        reason = f"failed: {self.failed}".replace("|", "/")
        return (self.method, reason, *("" for _ in HEAD[2:]))


class Measured(msgspec.Struct, frozen=True):
    """A method with its scores on `test_rows` and its costs; `changes` are its keys of params.yaml."""

    method: str
    changes: Changes
    quality: Interval
    test_rows: int
    validation_loss: float | None
    seconds: float
    peak_mib: float
    saved_mib: float
    latency: Speed
    figures: Figures
    failed: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.method,
            self.quality.text(".3f"),
            f"{self.validation_loss:.4f}",
            f"{self.seconds:.1f}",
            f"{self.peak_mib:,.0f}",
            f"{self.saved_mib:.2f}",
            Interval(**self.latency.milliseconds).text(".1f"),
            f"{self.latency.tokens:.1f}",
        )


class Comparison(msgspec.Struct, frozen=True):
    """Hold reports/compare/compare.json."""

    metric: str
    rows: int
    seed: int
    commit: str
    machine: str
    methods: list[Measured | Failed]


def markdown(found: Comparison) -> str:
    """Render the table as Markdown, with the rows, commit, machine, seed and settings behind it."""
    lines = [
        f"# Methods compared\n\n{found.rows} test rows, `{found.metric}`; commit {found.commit[:8]},"
        f" {found.machine}. One training each, seed {found.seed}.\n"
    ]
    rows = [HEAD, tuple("---" for _ in HEAD), *(row.cells for row in found.methods)]
    lines += ["\n".join(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += [f"- `{row.method}`: {_settings(row.changes)}" for row in found.methods]
    return "\n".join(lines) + "\n"


def text(found: Comparison) -> list[str]:
    rows = [HEAD, *(row.cells for row in found.methods)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _settings(changes: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}: {value}`" for key, value in changes.items())
