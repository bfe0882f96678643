"""Ask the project's own gate (`tasks.gate.judge`) about a table of GateBench."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from benchmarks.gate import Bench
from ratchet.config.evaluation import GateConfig

MODELS = ("candidate", "champion", "base")


def promotes(table: pd.DataFrame, config: GateConfig) -> bool:
    """Return whether the verdict is `promote`; where the gate refuses to give one, nothing is promoted."""
    seen = tuple(sorted(table.batch[table.seen & (table.batch != "golden")].unique()))
    scores = table[table.model.isin(MODELS)].drop(columns="seen")
    return _bench(seen).verdict(scores, config) == "promote"


@cache
def _folder() -> TemporaryDirectory[str]:
    """Make the process's folder, which lasts as long as the process."""
    return TemporaryDirectory(prefix="ratchet-gatebench-")


@cache
def _bench(seen: tuple[str, ...]) -> Bench:
    return Bench(Path(_folder().name) / str(len(seen)), list(seen))
