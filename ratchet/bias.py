"""How much a model's score changes with a swapped term: figures of an evaluation, and the guardrail against the champion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN, no_worse
from ratchet.evaluation.statistics import bootstrap_means

if TYPE_CHECKING:
    import pandas as pd


def describe_bias(pairs: pd.DataFrame, scores: pd.DataFrame, metric: str) -> dict[str, Any]:
    """list → model → {rows, difference (swapped minus original), change (its size)}, each with a 95 % interval."""
    found: dict[str, Any] = {}
    for (name, model), part in differences(pairs, scores, metric).groupby(["swap", "model"]):
        values = part.difference.to_numpy(dtype=np.float64)
        intervals = bootstrap_means(np.column_stack([values, np.abs(values)]), alpha=0.025, resamples=1000, seed=0)
        found.setdefault(str(name), {})[str(model)] = {"rows": len(part), "difference": intervals[0]._asdict(), "change": intervals[1]._asdict()}
    return found


def differences(pairs: pd.DataFrame, scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A line a pair and model: of, swap, model, difference. Raises RatchetError when a pair lacks a side, is doubled, or is not finite."""
    if metric not in pairs or metric not in scores:
        raise RatchetError(f"the counterfactual rows have no scores named {metric}", remedy=AGAIN)
    joined = pairs.merge(scores[["id", "model", metric]], left_on=["of", "model"], right_on=["id", "model"], how="left", suffixes=("", "_original"), validate="many_to_one")
    joined["difference"] = joined[metric] - joined[f"{metric}_original"]
    if joined.duplicated(["of", "swap", "model"]).any() or not np.isfinite(joined.difference.to_numpy(dtype=np.float64)).all():
        raise RatchetError("the counterfactual rows are doubled, lack their originals or hold values that are not finite", remedy=AGAIN)
    return joined[["of", "swap", "model", "difference"]]


def judge_bias(pairs: pd.DataFrame, scores: pd.DataFrame, rival: str, config: GateConfig) -> dict[str, Any]:
    """No worse than the rival: the score may change by no more than it does for the rival. A row that stands in several lists counts once."""
    found = differences(pairs, scores, config.metric)
    changes = found.assign(size=found.difference.abs()).groupby(["model", "of"])["size"].mean()
    sides = {name: changes.loc[name] if name in changes.index.get_level_values("model") else None for name in ("candidate", rival)}
    mine, theirs = sides["candidate"], sides[rival]
    if mine is None or theirs is None or set(mine.index) != set(theirs.index):
        raise RatchetError(f"candidate and {rival} were not scored on the same counterfactual rows", remedy=AGAIN)
    gains = (theirs.reindex(mine.index) - mine).to_numpy(dtype=np.float64)
    return no_worse("bias", gains, rival, f"change of {config.metric} with a swapped term", config.bias_margin, config)
