"""Better by 2 points: promote when the candidate's mean score is higher by a threshold.

Source: MLflow's MetricThreshold(min_absolute_change=…) for `validate_evaluation_results`: the score has to be
at least the baseline's plus the threshold. The 2 points are our choice.
https://mlflow.org/docs/latest/api_reference/_modules/mlflow/models/evaluation/validation.html
"""

from __future__ import annotations

import pandas as pd

LEAST_CHANGE = 0.02


def judge(table: pd.DataFrame) -> bool:
    means = table.groupby("model").exact_match.mean()
    return bool(means["candidate"] >= means["champion"] + LEAST_CHANGE)
