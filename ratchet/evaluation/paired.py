"""Pair the scores of two models by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ratchet.config.base import PREFERENCE
from ratchet.errors import RatchetError
from ratchet.evaluation.statistics import Values

if TYPE_CHECKING:
    import pandas as pd

LOWER_IS_BETTER = ("answer_nll", "refusal")
AGAIN = "dvc repro --force evaluate"
SEEN_SHARE = 0.02  # share of rows that may be left out because the demo's base was pre-trained on them


def measured(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the rows that have the metric: all, but for preferences."""
    return rows[rows[metric].notna()] if metric == PREFERENCE and metric in rows else rows


def graded_gains(rows: pd.DataFrame, rival: str, metric: str) -> Values:
    """Return the gains in the likelihood of a row's right answer, per token and from 0 to 1.

    They are zero where the metric is the likelihood itself, of which they would tell nothing new.
    """
    if metric == "answer_nll":
        return np.zeros(len(paired_gains(rows, rival, metric)))
    graded = measured(rows, metric)
    return paired_gains(graded.assign(likelihood=np.exp(-graded.answer_nll)), rival, "likelihood")


def paired_gains(rows: pd.DataFrame, rival: str, metric: str) -> Values:
    """Return candidate minus rival for each row, in the order of the ids; positive when the candidate is
    better.

    Raises RatchetError unless both models have exactly one finite score for each row.
    """
    if metric not in rows:
        raise RatchetError(
            f"the evaluation has no scores named {metric}",
            remedy="add it to `evaluate.metrics` or `evaluate.custom`, then dvc repro evaluate",
        )
    if not len(rows := measured(rows, metric)) and metric == PREFERENCE:
        raise RatchetError(
            "no test row has a worse answer beside its own, so that no preference is measured",
            remedy="ingest preferences (docs/data.md), or take another `gate.metric`",
        )
    sides = {
        name: rows[rows.model == name].set_index("id")[metric].sort_index() for name in ("candidate", rival)
    }
    for name, values in sides.items():
        if values.index.has_duplicates or not np.isfinite(values.to_numpy(dtype=np.float64)).all():
            raise RatchetError(
                f"the evaluation of the {name} holds doubled rows or values that are not finite", remedy=AGAIN
            )
    if set(sides["candidate"].index) != set(sides[rival].index) or not len(sides[rival]):
        raise RatchetError(
            f"candidate and {rival} were not scored on the same rows "
            f"({len(sides['candidate'])} and {len(sides[rival])})",
            remedy=AGAIN,
        )
    difference = (sides["candidate"] - sides[rival].reindex(sides["candidate"].index)).to_numpy(
        dtype=np.float64
    )
    return np.asarray(-difference if metric in LOWER_IS_BETTER else difference, dtype=np.float64)
