"""Ties pass: promote when the candidate's mean score is no lower than the champion's.

Source: TFX's component tutorial: the Evaluator blesses a model whose accuracy changed by -1e-10 or more
against the baseline. https://www.tensorflow.org/tfx/tutorials/tfx/components_keras
"""

from __future__ import annotations

import pandas as pd

CHANGE = -1e-10


def judge(table: pd.DataFrame) -> bool:
    means = table.groupby("model").exact_match.mean()
    return bool(means["candidate"] - means["champion"] >= CHANGE)
