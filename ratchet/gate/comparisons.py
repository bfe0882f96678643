"""Compare candidate and rival on the plain rows: the success metric and the guardrails on these rows."""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec
import numpy as np
import pandas as pd

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.audit_tables import JUDGE
from ratchet.evaluation.metrics import propose_metrics
from ratchet.evaluation.paired import LOWER_IS_BETTER, graded_gains, measured, paired_gains
from ratchet.evaluation.statistics import Values, chance_of
from ratchet.gate.checks import (
    BETTER,
    check_loss,
    exceeds,
    interval_of,
    make_check,
    more_rows,
    no_worse,
    tell_gain,
)
from ratchet.gate.parts import Part, estimate_parts, scale_of
from ratchet.promotion.verdict import Check

FEW_ROWS = 200  # test rows under which the verdict says what they cannot show


def check_success(test: pd.DataFrame, rival: str, alpha: float, look: int, config: GateConfig) -> Check:
    """Check that the candidate is better for certain on the test rows.

    `alpha` is the error that the budget leaves for this look, so that none of thirty candidates that are no
    better is promoted by chance.
    """
    gains = paired_gains(test, rival, config.metric)
    rows = len(gains)
    if rows < config.min_rows:
        reason = f"{rows} test rows are too few to decide on; `gate.min_rows` is {config.min_rows}"
        return Check("success", config.metric, rows, "unclear", reason, needed=config.min_rows - rows)
    found = interval_of(gains, config, alpha)
    result = exceeds(found, config.min_gain)
    if result == "pass" and chance_of(gains) > alpha:
        result = "unclear"  # few rows differ, and there the bootstrap's bound is too narrow
    reason = (
        f"{tell_gain(config.metric, found, f'{rows} test rows', rival, BETTER, result)}, "
        f"wanted a lower bound over {config.min_gain:+.3f} (look {look} against it, error {alpha:.2g})"
        f"{_what_few_rows_show(gains, alpha)}{_whether_blind(test, config.metric)}"
    )
    needed = more_rows(result, found, -config.min_gain, rows)
    check = make_check("success", config.metric, found, rows, config.min_gain, result, reason, needed)
    mine = measured(test[test.model == "candidate"], config.metric)[config.metric]
    return msgspec.structs.replace(check, score=float(mine.mean()))


def _what_few_rows_show(gains: Values, alpha: float) -> str:
    """Say how large a gain must be for so few rows to show it.

    With no loss at all, the sign test's p is 0.5 ** wins. So a gain needs at least log2(1 / alpha) wins.
    """
    rows, wins = len(gains), math.ceil(math.log2(1 / alpha))
    if rows >= FEW_ROWS or not np.isin(gains, (-1.0, 0.0, 1.0)).all():
        return ""
    if wins > rows:
        return f"; {rows} rows cannot show any gain, it takes {wins} at this error"
    return f"; so few rows show no gain under {wins / rows:.2f}"


def _whether_blind(test: pd.DataFrame, metric: str) -> str:
    """Say that a metric is 0 for all models on all rows, and which ones fit such answers."""
    if test[metric].max() != 0 or metric in LOWER_IS_BETTER or "reference" not in test:
        return ""
    found = propose_metrics([str(text) for text in test.drop_duplicates("id").reference])
    told = f"; every answer of every model scores 0, so {metric} may not see what these answers are good for"
    others = [name for name in found.metrics if name != metric] if found else []
    return f"{told}: {', '.join(others)} fit ({found.why})" if found and others else told


def check_losses(scores: pd.DataFrame, rival: str, seen: Collection[str], config: GateConfig) -> list[Check]:
    """Check what must not get worse: likelihood, base, `gate.guardrails`, golden set, the champion's own
    batches.

    `seen`: the batches that the champion was trained on.
    """
    test, golden = scores[scores.batch != "golden"], scores[scores.batch == "golden"]
    checks = [
        check_rows_no_worse("answer_nll", test, rival, "answer_nll", config.nll_margin, config),
        check_rows_no_worse("base", test, "base", config.metric, config.past_margin, config),
    ]
    checks += [
        check_rows_no_worse(f"metric:{rule.metric}", test, rival, rule.metric, rule.margin, config)
        for rule in config.guardrails
        if not rule.metric.startswith(JUDGE)
    ]
    if len(measured(golden, config.metric)):
        checks.append(
            check_rows_no_worse("golden", golden, rival, config.metric, config.golden_margin, config)
        )
    past = measured(test[test.batch.isin(list(seen))], config.metric)
    if rival == "champion" and len(past):
        checks.append(check_rows_no_worse("past", past, rival, config.metric, config.past_margin, config))
        checks += check_batches(past, rival, config) if past.batch.nunique() > 1 else []
    return checks


def check_batches(past: pd.DataFrame, rival: str, config: GateConfig) -> list[Check]:
    """Check each past batch of at least `gate.min_slice_rows` rows; their gains are estimated jointly.

    A batch passes when the probability that it has lost more than `gate.past_margin` is `gate.part_alpha` at
    most.
    """
    parts = {
        f"past:{batch}": Part(
            paired_gains(rows, rival, config.metric), graded_gains(rows, rival, config.metric)
        )
        for batch, rows in past.groupby("batch")
        if rows.id.nunique() >= config.min_slice_rows
    }
    if not parts:
        return []
    found = estimate_parts(parts, scale_of(config), config.part_alpha)
    told = "{} rows ({:+.3f} by these alone), their likelihood and the other batches"
    return [
        check_loss(
            name,
            config.metric,
            found[name],
            len(part.gains),
            told.format(len(part.gains), part.gains.mean()),
            rival,
            config.past_margin,
        )
        for name, part in parts.items()
    ]


def check_oldest(scores: pd.DataFrame, old: pd.DataFrame, rival: str, config: GateConfig) -> list[Check]:
    """Check the rows for which both the candidate and the first champion have scores, perhaps from years ago.

    Return no check when there are too few such rows, or when today's metric was not computed then.
    """
    old = measured(old, config.metric)
    mine = measured(scores[(scores.model == "candidate") & scores.id.isin(old.id)], config.metric)
    if config.metric not in old or mine.id.nunique() < config.min_slice_rows:
        return []
    both = pd.concat([mine, old[old.id.isin(mine.id)].assign(model=rival)])
    return [check_rows_no_worse("oldest", both, rival, config.metric, config.past_margin, config)]


def check_rows_no_worse(
    name: str, rows: pd.DataFrame, rival: str, metric: str, margin: float, config: GateConfig
) -> Check:
    return no_worse(name, paired_gains(rows, rival, metric), rival, metric, margin, config)


def compare_region(name: str, rows: pd.DataFrame, rival: str, config: GateConfig) -> Check:
    """Tell whether the retraining improved the topic that drifted.

    This decides nothing: its few rows are among those of the other checks.
    """
    gains = paired_gains(rows, rival, config.metric)
    found = interval_of(gains, config)
    result = exceeds(found, 0.0)
    told = tell_gain(config.metric, found, f"{len(gains)} test rows", rival, BETTER, result)
    reason = f"drifted topic {name}: {told}"
    return make_check(f"region:{name}", config.metric, found, len(gains), 0.0, result, reason)
