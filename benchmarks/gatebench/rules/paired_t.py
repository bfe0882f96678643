"""Paired t-test: promote when the mean difference by row is over 0 with a one-sided p of at most 5 %.

Source: Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in Natural Language
Processing", https://aclanthology.org/P18-1128/; scipy.stats.ttest_rel.
"""

from __future__ import annotations

import pandas as pd
from scipy.stats import ttest_1samp

ALPHA = 0.05


def judge(table: pd.DataFrame) -> bool:
    scores = table.pivot(index="id", columns="model", values="exact_match")
    gains = (scores["candidate"] - scores["champion"]).dropna().to_numpy()
    if not gains.std():
        return bool(gains.mean() > 0)  # the test is not defined where all rows differ by the same
    return bool(ttest_1samp(gains, 0.0, alternative="greater").pvalue <= ALPHA)
