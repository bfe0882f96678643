"""The guardrail over all slices: which of them are worse for certain, with Holm's correction for their number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.paired import make_check, paired_gains, said
from ratchet.evaluation.slices import groups
from ratchet.evaluation.statistics import Values, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd


def judge_slices(scores: pd.DataFrame, rival: str, config: GateConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a guardrail, or none without slices; every slice with its gain). It fails when any slice is worse by more than the margin for certain.

    Holm's step-down (1979) over the slices, from the one that looks worst on: the chance to call any of equal slices worse is
    `guardrail_alpha`, however many there are. To show of each small slice that it is no worse would stop every candidate.
    """
    gains = {name: paired_gains(part, rival, config.metric) for name, part in groups(scores, least=config.min_slice_rows).items()}
    return judge_parts("slices", gains, rival, config.metric, config.slice_margin, config, word="slice")


def judge_parts(name: str, gains: dict[str, Values], rival: str, metric: str, margin: float, config: GateConfig, *, word: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same for any parts; `word` is what one of them is called."""
    judged: list[dict[str, Any]] = []
    holds = True
    for step, part in enumerate(sorted(gains, key=lambda part: _distance(gains[part], margin))):
        alpha = config.guardrail_alpha / (len(gains) - step)
        found = bootstrap_mean(gains[part], alpha=alpha, resamples=config.resamples, seed=config.seed)
        holds = holds and found.high < -margin
        result = "fail" if holds else "pass" if found.low >= -margin else "unclear"
        words = {"fail": "is worse than the {}'s for certain", "pass": "is no worse than the {}'s", "unclear": "cannot be told from the {}'s"}[result].format(rival)
        reason = f"{part}: {metric} on {len(gains[part])} rows {words}: gain {said(found)}"
        judged.append(make_check(part, metric, found, len(gains[part]), -margin, result, reason))
    return ([_guardrail(name, judged, rival, margin, word)] if judged else []), judged


def _guardrail(name: str, judged: list[dict[str, Any]], rival: str, margin: float, word: str) -> dict[str, Any]:
    failed, worst = [one for one in judged if one["result"] == "fail"], judged[0]
    taken = f"a loss of {margin:g} is still taken; Holm over {len(judged)} {word}s"
    if failed:
        reason = f"guardrail {name}: {'; '.join(one['reason'] for one in failed)} ({taken})"
    else:
        reason = f"guardrail {name}: no {word} is worse than the {rival}'s for certain, the lowest {worst['name']} with a gain of {worst['mean']:+.3f} [{worst['low']:+.3f}, {worst['high']:+.3f}] ({taken})"
    kept = {key: worst[key] for key in ("metric", "rows", "mean", "low", "high", "wanted")}
    return {"name": name, **kept, "result": "fail" if failed else "pass", "reason": reason}


def _distance(gains: Values, margin: float) -> float:
    """How many standard errors the gain lies over -margin."""
    over, error = float(gains.mean()) + margin, float(gains.std()) / math.sqrt(len(gains))
    return over / error if error else math.copysign(math.inf, over)
