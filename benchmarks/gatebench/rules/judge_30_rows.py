"""An LLM judge on 30 rows: promote when it prefers the candidate's answer more often than the champion's.

The judge is simulated: where one answer is right and the other wrong, it prefers the right one with a
probability of 85 %, which is how often GPT-4 agrees with people where neither calls a tie (Zheng et al. 2023,
MT-Bench, https://arxiv.org/abs/2306.05685). Of two different answers that are both right or both wrong it
prefers either by chance; equal answers are a tie. So it has no bias for places, lengths or its own style,
which real judges have.

Source for the number of rows: "20-50 simple tasks drawn from real failures" are called a good start in
https://www.anthropic.com/engineering/demystifying-evals-for-ai-agents
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pandas as pd

ROWS, AGREEMENT = 30, 0.85


def judge(table: pd.DataFrame) -> bool:
    sides = table.pivot(index="id", columns="model", values=["exact_match", "answer"])
    sides = sides.dropna(subset=[("exact_match", "candidate"), ("exact_match", "champion")])
    generator = np.random.default_rng(crc32(",".join(sides.index).encode()))
    asked = sides.iloc[generator.choice(len(sides), min(ROWS, len(sides)), replace=False)]
    better = np.sign((asked.exact_match.candidate - asked.exact_match.champion).to_numpy(dtype=float))
    agrees = np.where(generator.random(len(asked)) < AGREEMENT, 1.0, -1.0)
    either = generator.choice([-1.0, 1.0], len(asked))
    same = (asked.answer.candidate == asked.answer.champion).to_numpy()
    votes = np.where(better != 0, better * agrees, np.where(same, 0.0, either))
    return bool(votes.sum() > 0)
