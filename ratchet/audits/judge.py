"""Scores that a judge model gives the answers of candidate and rival to the same test rows.

The scores may be guardrails of the gate once people agree with the judge (judge_agreement.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from msgspec import UNSET

from ratchet.audits.judge_client import (
    Ask,
    ask_all,
    ask_correctness,
    ask_groundedness,
    ask_preference,
    prompt_version,
)
from ratchet.config.evaluation import AnswerJudge
from ratchet.errors import DataError
from ratchet.evaluation.audit_tables import JUDGE
from ratchet.evaluation.report import Agreement, Judged, Models
from ratchet.evaluation.statistics import bootstrap_mean
from ratchet.files import read_json

if TYPE_CHECKING:
    import pandas as pd

    from ratchet.data.examples import Example

AGREEMENT = (  # in the folder of the project's own metrics, written by `ratchet gate judge`
    "judge_agreement.json"
)


class Measured(msgspec.Struct, frozen=True):
    """The result of `ratchet gate judge` for one judge; `prompts` maps a metric to its prompt's version."""

    protocol: str = ""
    model: str = ""
    prompts: dict[str, str] = {}
    agreement: dict[str, Agreement] = {}
    failures: dict[str, int] = {}  # number of answers without a score, by reason; not kept in the file


def judge_answers(
    table: pd.DataFrame,
    rows: Sequence[Example],
    rival: str,
    config: AnswerJudge,
    home: Path,
    *,
    say: Callable[[str], None],
) -> tuple[pd.DataFrame, Judged]:
    """Return the table of scores (one line per row and model, one column per metric), and its figures.

    `table` holds the answers of candidate and rival to all `rows`. Raises as `ask_all` does.
    """
    import pandas as pd

    chosen = sorted((row for row in rows if row.meta["batch"] != "golden"), key=lambda row: row.id)[
        : config.rows
    ]
    answers = {model: dict(zip(part.id, part.answer, strict=True)) for model, part in table.groupby("model")}
    lines: dict[tuple[str, str], dict[str, str | float]] = {
        (row.id, model): {"id": row.id, "model": model} for row in chosen for model in ("candidate", rival)
    }
    given: dict[tuple[str, str, str], list[float]] = {}
    asks: list[Ask] = []
    places: list[tuple[str, str, str, bool]] = []  # metric, row, model, whether the score is the rival's
    for row in chosen:
        mine, theirs = answers["candidate"][row.id], answers[rival][row.id]
        if "preference" in config.metrics and mine == theirs:
            given["preference", row.id, "candidate"] = [0.5, 0.5]  # equal answers need no judge
        elif "preference" in config.metrics:
            asks += ask_preference(row.question, mine, theirs, row.answer)
            places += [("preference", row.id, "candidate", False), ("preference", row.id, "candidate", True)]
        for model, answer in (("candidate", mine), (rival, theirs)):
            if "correctness" in config.metrics:
                asks.append(ask_correctness(row.question, answer, row.answer))
                places.append(("correctness", row.id, model, False))
            if "groundedness" in config.metrics and (passage := row.meta.get(config.passage)):
                asks.append(ask_groundedness(row.question, answer, str(passage)))
                places.append(("groundedness", row.id, model, False))
    replies = ask_all(asks, config, home)
    scored = sum(score is not None for score in replies.scores)
    failed = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in sorted(replies.failures.items()))
    missing = f"; without a score: {failed} (evaluate.judge.url is {config.url})" if failed else ""
    say(f"evaluate: {config.model} scored {scored} of {len(asks)} answers{missing}")
    for (metric, id, model, turned), score in zip(places, replies.scores, strict=True):
        value = math.nan if score is None else 1 - score if turned else score
        given.setdefault((metric, id, model), []).append(value)
    for (metric, id, model), values in given.items():
        lines[id, model][f"{JUDGE}{metric}"] = float(np.mean(values))
        if metric == "preference":
            lines[id, rival][f"{JUDGE}{metric}"] = 1 - float(np.mean(values))
    judged = pd.DataFrame(
        list(lines.values()), columns=["id", "model", *(f"{JUDGE}{metric}" for metric in config.metrics)]
    )
    compared = {id for metric, id, _, _ in places if metric == "preference"}
    figures = msgspec.structs.replace(
        _describe(judged, given, compared, rival, config), failures=replies.failures
    )
    if unasked := [metric for metric, count in figures.asked.items() if not count]:
        say(
            f"evaluate: no row was asked about {', '.join(unasked)}; groundedness needs a passage in"
            f" `meta.{config.passage}`"
        )
    return judged, figures


def _describe(
    judged: pd.DataFrame,
    given: dict[tuple[str, str, str], list[float]],
    asked_of: set[str],
    rival: str,
    config: AnswerJudge,
) -> Judged:
    """Return the figures; `asked_of` are the rows whose two answers differ, which the judge compared."""
    scores: dict[str, Models] = {}
    asked: dict[str, int] = {
        metric: len({id for name, id, _ in given if name == metric}) for metric in config.metrics
    }
    for metric in config.metrics:
        for model in ("candidate", rival):
            values = (
                judged[judged.model == model][f"{JUDGE}{metric}"]
                .astype(float)
                .dropna()
                .to_numpy(dtype=np.float64)
            )
            if len(values):
                interval = bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0)
                scores.setdefault(metric, {})[model] = interval.on(len(values))
    both = [
        values
        for (metric, id, _), values in given.items()
        if metric == "preference" and id in asked_of and np.isfinite(values).all()
    ]
    consistent = sum(one == other for one, other in both) / len(both) if both else UNSET
    return Judged(config.model, config.protocol, len(judged) // 2, scores, asked, consistent=consistent)


def read_agreement(own: Path, config: AnswerJudge) -> dict[str, Agreement]:
    """Return for each metric how far people agree with this judge and its present prompts.

    Raises DataError for a file that `ratchet gate judge` did not write.
    """
    path = own / AGREEMENT
    try:
        record = msgspec.convert(read_json(path), Measured) if path.exists() else None
    except msgspec.ValidationError as error:
        raise DataError(f"{path} is no record of a judge: {error}", remedy="ratchet gate judge") from None
    return {metric: _agreement(record, metric, config) for metric in config.metrics}


def _agreement(record: Measured | None, metric: str, config: AnswerJudge) -> Agreement:
    if record is None:
        return Agreement(why="its agreement with people was never measured (ratchet gate judge)")
    if (record.protocol, record.model) != (config.protocol, config.model):
        measured = f"its agreement was measured of {record.model}, the judge is {config.model}"
        return Agreement(why=f"{measured} (ratchet gate judge)")
    if record.prompts.get(metric) != prompt_version(metric):
        return Agreement(why="its agreement was measured with another prompt (ratchet gate judge)")
    return record.agreement.get(metric) or Agreement(why="no decision of a reviewer concerns it")
