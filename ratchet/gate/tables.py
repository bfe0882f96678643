"""Read the evaluation's tables for the gate; refuse partial ones and those of another candidate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN, SEEN_SHARE
from ratchet.evaluation.report import Metrics


def read_scores(evaluation: Path, evaluated: Metrics, adapter: str) -> pd.DataFrame:
    """Raises RatchetError: no table, another candidate's, or one that lacks rows of all models alike."""
    if evaluated.candidate != adapter:
        raise RatchetError(
            f"the evaluation is of the adapter {str(evaluated.candidate)[:12]}, "
            f"the candidate's is {adapter[:12]}",
            remedy=AGAIN,
        )
    scores = read_table(evaluation / "scores.parquet")
    if (rows := scores[scores.model == "candidate"].id.nunique()) != evaluated.rows:
        raise RatchetError(
            f"the table of scores holds {rows} rows of the candidate, the evaluation says {evaluated.rows}",
            remedy=AGAIN,
        )
    return scores


def read_part(evaluation: Path, file: str, wanted: int, word: str) -> pd.DataFrame:
    """Raises RatchetError: no table, or not `wanted` rows of the candidate."""
    rows = read_table(evaluation / f"{file}.parquet")
    if (found := int((rows.model == "candidate").sum())) != wanted:
        raise RatchetError(
            f"the table of {word} rows holds {found} of the candidate, the evaluation says {wanted}",
            remedy=AGAIN,
        )
    return rows


def read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise RatchetError(f"{path} cannot be read: {' '.join(str(error).split())}", remedy=AGAIN) from None


def check_rows(scores: pd.DataFrame, prepared: Mapping[str, Collection[str]]) -> None:
    """Raises RatchetError when prepared rows (ids of `golden` and `test`) were not asked.

    The evaluation leaves out the few test rows that the demo's base has read, and no golden one.
    """
    asked = set(scores[scores.model == "candidate"].id)
    for name, most in (("golden", 0.0), ("test", SEEN_SHARE * sum(map(len, prepared.values())))):
        if (missing := sum(id not in asked for id in prepared[name])) > most:
            raise RatchetError(
                f"the evaluation lacks {missing} of {len(prepared[name])} {name} rows", remedy=AGAIN
            )


def check_range(scores: pd.DataFrame, config: GateConfig) -> None:
    """Raises RatchetError: a share outside 0 to 1 is no score."""
    named = {config.metric, *(rule.metric for rule in config.guardrails)} & set(scores)
    for metric in named - {"answer_nll"}:
        odd = scores[(scores[metric] < 0) | (scores[metric] > 1)]
        if len(odd):
            raise RatchetError(f"{metric} of {odd.id.iloc[0]} is outside 0 to 1", remedy=AGAIN)
