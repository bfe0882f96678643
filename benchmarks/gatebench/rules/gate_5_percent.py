"""Ratchet's gate at 5 %: its own code with `gate.alpha` 5 % and no budget (`gate.alpha_budget: 1`).

This is the error that the paired t-test has. The guardrails are the default ones; `gate.resamples` is 1,000.
"""

from __future__ import annotations

import pandas as pd

from benchmarks.gatebench.own_gate import promotes
from ratchet.config.evaluation import GateConfig

CONFIG = GateConfig(alpha=0.05, alpha_budget=1.0, resamples=1000)


def judge(table: pd.DataFrame) -> bool:
    return promotes(table, CONFIG)
