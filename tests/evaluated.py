"""Evaluate as the stage does, and return the JSON that it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tasks.evaluate
from ratchet.evaluation.report import read_metrics
from ratchet.files import read_json


def evaluate(
    prepared: Path, base: Path, incumbent: Path, candidate: Path, out: Path, *more: Any, **named: Any
) -> Any:
    found = tasks.evaluate.evaluate(prepared, base, incumbent, candidate, out, *more, **named)
    assert read_metrics(out) == found  # nothing is lost on the way through the file
    return read_json(out / "metrics.json")
