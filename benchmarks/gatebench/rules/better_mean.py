"""Better mean: promote when the candidate's mean score is higher than the champion's on the same rows.

Source: Google Cloud, "MLOps: Continuous delivery and automation pipelines in machine learning", automated
model validation: the new model has to perform better than the current one before it is promoted.
https://cloud.google.com/architecture/mlops-continuous-delivery-and-automation-pipelines-in-machine-learning
"""

from __future__ import annotations

import pandas as pd


def judge(table: pd.DataFrame) -> bool:
    means = table.groupby("model").exact_match.mean()
    return bool(means["candidate"] > means["champion"])
