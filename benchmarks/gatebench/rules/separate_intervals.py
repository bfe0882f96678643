"""Separate intervals: promote when the candidate's 95 % interval lies wholly over the champion's.

Source: lm-evaluation-harness prints a standard error with each score of each model; a reader takes a
difference as real when mean ± 1.96 standard errors do not overlap. The rows are not paired (Miller, arXiv
2411.00640, says why they should be). https://github.com/EleutherAI/lm-evaluation-harness
"""

from __future__ import annotations

import pandas as pd

Z = 1.96


def judge(table: pd.DataFrame) -> bool:
    scores = table.groupby("model").exact_match
    mean, error = scores.mean(), scores.sem()
    return bool(mean["candidate"] - Z * error["candidate"] > mean["champion"] + Z * error["champion"])
