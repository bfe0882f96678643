"""Stored scores: compare with the mean that the champion had on its own, earlier test rows.

Source: Microsoft's MLOpsPython: a new model is registered when the metric of its own run is better than the
one stored with the run of the production model, whatever rows each of them was tested on.
https://github.com/microsoft/MLOpsPython/blob/master/diabetes_regression/evaluate/evaluate_model.py
"""

from __future__ import annotations

import pandas as pd


def judge(table: pd.DataFrame) -> bool:
    means = table.groupby("model").exact_match.mean()
    return bool(means["candidate"] > means["champion_earlier"])
