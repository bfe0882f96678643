"""The guardrail over all slices: which of them are worse for certain, with Holm's correction for their number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ratchet.checks import make_check, paired_gains, said
from ratchet.config import GateConfig
from ratchet.slices import groups
from ratchet.statistics import Values, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd


def judge_slices(scores: pd.DataFrame, rival: str, config: GateConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a guardrail, or none without slices; every slice with its gain). It fails when any slice is worse by more than the margin for certain.

    Holm's step-down (1979) over the slices, from the one that looks worst on: the chance to call any of equal slices worse is
    `guardrail_alpha`, however many there are. To show of each small slice that it is no worse would stop every candidate.
    """
    gains = {name: paired_gains(part, rival, config.metric) for name, part in groups(scores, least=config.min_slice_rows).items()}
    judged: list[dict[str, Any]] = []
    holds = True
    for step, name in enumerate(sorted(gains, key=lambda name: _distance(gains[name], config.slice_margin))):
        alpha = config.guardrail_alpha / (len(gains) - step)
        found = bootstrap_mean(gains[name], alpha=alpha, resamples=config.resamples, seed=config.seed)
        holds = holds and found.high < -config.slice_margin
        result = "fail" if holds else "pass" if found.low >= -config.slice_margin else "unclear"
        words = {"fail": "is worse than the {}'s for certain", "pass": "is no worse than the {}'s", "unclear": "cannot be told from the {}'s"}[result].format(rival)
        reason = f"{name}: {config.metric} on {len(gains[name])} rows {words}: gain {said(found)}"
        judged.append(make_check(name, config.metric, found, len(gains[name]), -config.slice_margin, result, reason))
    return ([_guardrail(judged, rival, config)] if judged else []), judged


def _guardrail(judged: list[dict[str, Any]], rival: str, config: GateConfig) -> dict[str, Any]:
    failed, worst = [one for one in judged if one["result"] == "fail"], judged[0]
    taken = f"a loss of {config.slice_margin:g} is still taken; Holm over {len(judged)} slices"
    if failed:
        reason = f"guardrail slices: {'; '.join(one['reason'] for one in failed)} ({taken})"
    else:
        reason = f"guardrail slices: no slice is worse than the {rival}'s for certain, the lowest {worst['name']} with a gain of {worst['mean']:+.3f} [{worst['low']:+.3f}, {worst['high']:+.3f}] ({taken})"
    kept = {key: worst[key] for key in ("metric", "rows", "mean", "low", "high", "wanted")}
    return {"name": "slices", **kept, "result": "fail" if failed else "pass", "reason": reason}


def _distance(gains: Values, margin: float) -> float:
    """How many standard errors the gain lies over -margin."""
    over, error = float(gains.mean()) + margin, float(gains.std()) / math.sqrt(len(gains))
    return over / error if error else math.copysign(math.inf, over)
