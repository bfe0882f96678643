"""Scores by group of people (or whatever a meta field names), by Fairlearn's MetricFrame, and the guardrail on the gap between groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.config.evaluation import GateConfig
from ratchet.errors import ConfigError, RatchetError
from ratchet.evaluation.paired import AGAIN, LOWER_IS_BETTER, make_check, paired_gains, said
from ratchet.evaluation.slices import require_fields
from ratchet.evaluation.statistics import Interval, Values

if TYPE_CHECKING:
    import pandas as pd

    from ratchet.data.examples import Example

GROUP = "group:"
LEAST = 20  # rows of a value that is shown
DRAWS = 200  # of Fairlearn's bootstrap, which takes milliseconds for each


def require_fairlearn(fields: Sequence[str]) -> None:
    """Raises ConfigError before any model answers."""
    if fields and find_spec("fairlearn") is None:
        raise ConfigError(
            f"evaluate.groups names {', '.join(fields)}, and Fairlearn is not installed",
            remedy="pip install 'ratchet[fairness]', or set `evaluate.groups: []`",
        )


def group_columns(rows: Sequence[Example], fields: Sequence[str]) -> dict[str, list[str]]:
    """A value a row for each field; empty where the row has none. Raises DataError for a field that no row has."""
    require_fields("evaluate.groups", fields, rows)
    return {f"{GROUP}{field}": ["" if row.meta.get(field) is None else str(row.meta[field]) for row in rows] for field in fields}


def describe_groups(table: pd.DataFrame, fields: Sequence[str], metrics: Sequence[str], *, draws: int = DRAWS) -> dict[str, Any]:
    """field → metric → model → {by_group: value → {rows, mean, low, high}, difference, ratio}, each with a 95 % interval. Values under LEAST rows are left out."""
    found: dict[str, Any] = {}
    for field in fields:
        for model, rows in table.groupby("model"):
            kept = _kept(rows, f"{GROUP}{field}", LEAST)
            scored = [metric for metric in metrics if np.isfinite(kept[metric].to_numpy(dtype=np.float64)).all()]
            if kept[f"{GROUP}{field}"].nunique() < 2:
                continue
            for metric, part in _frame(kept, f"{GROUP}{field}", scored, draws).items():
                found.setdefault(field, {}).setdefault(metric, {})[str(model)] = part
    return found


def _frame(rows: pd.DataFrame, column: str, metrics: Sequence[str], draws: int) -> dict[str, Any]:
    from fairlearn.metrics import MetricFrame

    def mean(_true: Any, _predicted: Any, score: Any) -> float:
        return float(np.mean(score))

    scores = {metric: {"score": rows[metric].to_numpy(dtype=np.float64)} for metric in metrics}
    nothing = np.zeros(len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ratio to a mean of 0
        frame = MetricFrame(
            metrics=dict.fromkeys(metrics, mean),
            y_true=nothing,
            y_pred=nothing,
            sensitive_features=rows[column].to_numpy(),
            sample_params=scores,
            n_boot=draws,
            ci_quantiles=[0.025, 0.975],
            random_state=0,
        )
        gaps = {"difference": (frame.difference(), frame.difference_ci()), "ratio": (frame.ratio(), frame.ratio_ci())}
    counts = rows[column].value_counts()
    found: dict[str, Any] = {}
    for metric in metrics:
        low, high = (side[metric] for side in frame.by_group_ci)
        by_group = {
            str(value): {"rows": int(counts[value]), "mean": float(mean), "low": float(low[value]), "high": float(high[value])} for value, mean in frame.by_group[metric].items()
        }
        found[metric] = {"by_group": by_group} | {name: _interval(value[metric], *(side[metric] for side in sides)) for name, (value, sides) in gaps.items()}
    return found


def _interval(mean: float, low: float, high: float) -> dict[str, float] | None:
    """None where a mean of 0 leaves no ratio."""
    return {"mean": float(mean), "low": float(low), "high": float(high)} if all(math.isfinite(value) for value in (mean, low, high)) else None


def judge_groups(scores: pd.DataFrame, fields: Sequence[str], rival: str, config: GateConfig) -> list[dict[str, Any]]:
    """A guardrail a field: the gap between the best and the worst group is not wider than the rival's by more than the margin for certain."""
    return [_judge(scores, field, rival, config, config.guardrail_alpha / len(fields)) for field in fields]


def _judge(scores: pd.DataFrame, field: str, rival: str, config: GateConfig, alpha: float) -> dict[str, Any]:
    name, column = f"groups:{field}", f"{GROUP}{field}"
    if column not in scores:
        raise RatchetError(f"the evaluation has no groups by {field}", remedy=AGAIN)
    kept = _kept(scores, column, config.min_slice_rows)
    paired_gains(kept if len(kept) else scores, rival, config.metric)  # whole, or it raises
    if kept[column].nunique() < 2:
        reason = f"guardrail {name}: not judged, {kept[column].nunique()} of its values have {config.min_slice_rows} rows (`gate.min_slice_rows`); two are needed"
        return {"name": name, "metric": config.metric, "rows": 0, "mean": None, "low": None, "high": None, "wanted": None, "result": "unclear", "reason": reason}
    sides = {model: kept[kept.model == model].set_index("id").sort_index() for model in ("candidate", rival)}
    sign = -1.0 if config.metric in LOWER_IS_BETTER else 1.0
    values = sign * np.column_stack([side[config.metric].to_numpy(dtype=np.float64) for side in sides.values()])
    of = np.unique(sides["candidate"][column].to_numpy(dtype=str), return_inverse=True)[1]
    found = _narrowing(values, of, alpha, config)
    result = "fail" if found.high < -config.group_margin else "pass"
    words = {"fail": "is wider than the {}'s for certain", "pass": "is not wider than the {}'s for certain"}[result].format(rival)
    groups = f"{of.max() + 1} groups, {len(of)} rows"
    reason = f"guardrail {name}: the gap in {config.metric} between groups ({groups}) {words}: narrower by {said(found)} (under 0 it is wider), {config.group_margin:g} wider is still taken"
    return make_check(name, config.metric, found, len(of), -config.group_margin, result, reason)


def _narrowing(values: Values, of: Any, alpha: float, config: GateConfig) -> Interval:
    """Rival's gap minus the candidate's; both from the same draws of rows. `values` is (rows, 2), `of` the rows' groups."""
    members = np.eye(of.max() + 1)[of]  # (rows, groups)
    generator = np.random.default_rng(config.seed)
    draws = [_gaps(generator.multinomial(len(of), np.full(len(of), 1 / len(of))).astype(np.float64), members, values) for _ in range(config.resamples)]
    narrower = [theirs - mine for mine, theirs in draws]
    mine, theirs = _gaps(np.ones(len(of)), members, values)
    low, high = np.quantile(narrower, [alpha, 1 - alpha])
    return Interval(theirs - mine, float(low), float(high))


def _gaps(weights: Values, members: Values, values: Values) -> tuple[float, float]:
    sizes = weights @ members  # (groups)
    means = ((members * weights[:, None]).T @ values)[sizes > 0] / sizes[sizes > 0, None]  # (groups, 2)
    gaps = means.max(axis=0) - means.min(axis=0)
    return float(gaps[0]), float(gaps[1])


def _kept(rows: pd.DataFrame, column: str, least: int) -> pd.DataFrame:
    """Rows whose group has a name and `least` rows of one model."""
    sizes = rows[rows[column] != ""].groupby(column).id.nunique()
    return rows[rows[column].isin(sizes[sizes >= least].index)]
