"""Decide on a candidate: promote, reject or uncertain, with every reason.

The success metric has to be better for certain, and every guardrail no worse for certain (Miller, arXiv
2411.00640: paired differences on the same rows). Where the rows cannot tell, the verdict is `uncertain` and
the champion stays.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd

from ratchet.config.base import PREFERENCE
from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.paired import measured
from ratchet.evaluation.report import Metrics
from ratchet.gate.comparisons import check_losses, check_oldest, check_success, compare_region
from ratchet.gate.guardrails import (
    guard_by_judge,
    judge_attacks,
    judge_bias,
    judge_blind,
    judge_groups,
    judge_leaks,
    judge_slices,
    judge_suites,
)
from ratchet.gate.payoff import weigh
from ratchet.gate.tables import check_range, read_part, read_table
from ratchet.monitoring.topics import parts
from ratchet.promotion.verdict import Candidate, Check, Look, Rival, Speed, Verdict


class Oldest(NamedTuple):
    """The version and the scores of the first champion."""

    version: int
    scores: pd.DataFrame


class Evidence(NamedTuple):
    """The inputs of a verdict, read and checked for completeness."""

    scores: pd.DataFrame  # a line a row and model: candidate, champion, base
    rival: Rival
    seen: Collection[str]  # batches that the champion was trained on
    candidate: Candidate
    look: Look
    oldest: Oldest | None
    audits: list[Check]
    parity: Check
    speed: Speed | None
    train_seconds: float | None  # None where `gate.worth` is not set


def decide(evidence: Evidence, config: GateConfig) -> Verdict:
    """Apply every rule: one failure rejects, and one unclear result keeps the champion."""
    scores, rival, look = evidence.scores, evidence.rival.model, evidence.look
    check_range(scores, config)
    test = scores[scores.batch != "golden"]
    slice_checks, slices = judge_slices(test, rival, config)
    checks = [
        check_success(test, rival, look.alpha, look.number, config),
        *check_losses(scores, rival, evidence.seen, config),
        *slice_checks,
    ]
    if evidence.oldest:
        checks += check_oldest(scores, evidence.oldest.scores, f"v{evidence.oldest.version}", config)
    checks += [*evidence.audits, evidence.parity]
    seconds = evidence.train_seconds
    worth = None if seconds is None else weigh(test, rival, seconds, config)
    if worth and config.require_worth:
        checks.append(worth)
    return Verdict(
        verdict_of(checks),
        [check.reason for check in checks if check.result != "pass"] or [check.reason for check in checks],
        evidence.rival,
        checks,
        evidence.candidate,
        regions=[
            compare_region(name, rows, rival, config)
            for name, rows in parts(measured(test, config.metric)).items()
        ],
        slices=slices,
        worth=worth,
        speed=evidence.speed,
        look=look,
        params=config.model_dump(mode="json"),
    )


def verdict_of(checks: Collection[Check]) -> Literal["promote", "reject", "uncertain"]:
    results = {check.result for check in checks}
    return "reject" if "fail" in results else "uncertain" if "unclear" in results else "promote"


def judge_audits(
    evaluation: Path, evaluated: Metrics, scores: pd.DataFrame, rival: str, config: GateConfig
) -> list[Check]:
    """Check the optional audits that the evaluation was configured for. Raises RatchetError for a missing
    table.
    """
    checks = judge_groups(scores[scores.batch != "golden"], evaluated.grouped, rival, config)
    if evaluated.pairs:
        pairs = read_part(evaluation, "counterfactual", evaluated.pairs, "counterfactual")
        checks.append(judge_bias(pairs, scores, rival, config))
    if evaluated.attacked:
        attacked = read_part(evaluation, "attacks", evaluated.attacked, "attacked")
        checks += judge_attacks(attacked, scores, rival, config)
    if evaluated.blind and config.metric != PREFERENCE:  # of which blind rows have no score
        blind = read_part(evaluation, "blind", evaluated.blind, "blind")
        checks += judge_blind(blind, scores, config)
    if evaluated.canaries:
        checks.append(judge_leaks(read_table(evaluation / "canaries.parquet"), evaluated.canaries, config))
    if evaluated.suites:
        checks += judge_suites(read_table(evaluation / "suites.parquet"), evaluated.suites, rival, config)
    judged = read_table(evaluation / "judged.parquet") if evaluated.judge else None
    return [*checks, *guard_by_judge(judged, evaluated.judge, rival, config)]
