"""Ratchet's gate: its own code (`tasks.gate.judge`) at the default settings, on the first look.

Only `gate.resamples` is 1,000 in place of 4,000, for time. Rules are in docs/gate.md.
"""

from __future__ import annotations

import pandas as pd

from benchmarks.gatebench.own_gate import promotes
from ratchet.config.evaluation import GateConfig

CONFIG = GateConfig(resamples=1000)


def judge(table: pd.DataFrame) -> bool:
    return promotes(table, CONFIG)
