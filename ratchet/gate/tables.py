"""Read the evaluation's tables for the gate; refuse partial tables and those of another candidate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN, SEEN_SHARE
from ratchet.evaluation.report import Metrics


def read_scores(evaluation: Path, evaluated: Metrics, adapter: str) -> pd.DataFrame:
    """Read the evaluation's table of scores.

    Raises RatchetError when there is no table, when it is another candidate's, or when it lacks rows of all
    models alike.
    """
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
    """Read the table of an audit. Raises RatchetError unless it exists and has `wanted` rows of the
    candidate.
    """
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


def check_rows(scores: pd.DataFrame, prepared: Mapping[str, Collection[str]], *, too_long: int = 0) -> None:
    """Check that every prepared row (ids of `golden` and `test`) was asked.

    Two kinds of test rows may be missing, but no golden row: the few that the demo's base has read, and those
    that are `too_long`, whose share `tokenize` has limited.

    Raises RatchetError when other rows are missing.
    """
    asked = set(scores[scores.model == "candidate"].id)
    read = SEEN_SHARE * sum(map(len, prepared.values()))
    for name, most in (("golden", 0.0), ("test", read + too_long)):
        if (missing := sum(id not in asked for id in prepared[name])) > most:
            raise RatchetError(
                f"the evaluation lacks {missing} of {len(prepared[name])} {name} rows", remedy=AGAIN
            )


def check_range(scores: pd.DataFrame, config: GateConfig) -> None:
    """Check that scores are within 0 to 1. Raises RatchetError for a score outside."""
    named = {config.metric, *(rule.metric for rule in config.guardrails)} & set(scores)
    for metric in named - {"answer_nll"}:
        odd = scores[(scores[metric] < 0) | (scores[metric] > 1)]
        if len(odd):
            raise RatchetError(f"{metric} of {odd.id.iloc[0]} is outside 0 to 1", remedy=AGAIN)
