"""Scores by group, of people or of any other values of a meta field, by Fairlearn's MetricFrame."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.errors import ConfigError
from ratchet.evaluation.audit_tables import GROUP, rows_of_groups
from ratchet.evaluation.report import Groups
from ratchet.evaluation.slices import require_fields
from ratchet.evaluation.statistics import Estimate, Interval

if TYPE_CHECKING:
    import pandas as pd

    from ratchet.data.examples import Example

LEAST = 20  # rows that a value needs to be a group
DRAWS = 200  # resamples of Fairlearn's bootstrap, which takes milliseconds for each


def require_fairlearn(fields: Sequence[str]) -> None:
    """Check that Fairlearn is installed if fields are named. Raises ConfigError before any model answers."""
    if fields and find_spec("fairlearn") is None:
        raise ConfigError(
            f"evaluate.groups names {', '.join(fields)}, and Fairlearn is not installed",
            remedy="pip install 'ratchet[fairness]', or set `evaluate.groups: []`",
        )


def group_columns(rows: Sequence[Example], fields: Sequence[str]) -> dict[str, list[str]]:
    """Return one value per row for each field; empty where the row has none.

    Raises DataError for a field that no row has.
    """
    require_fields("evaluate.groups", fields, rows)
    return {
        f"{GROUP}{field}": ["" if row.meta.get(field) is None else str(row.meta[field]) for row in rows]
        for field in fields
    }


def describe_groups(
    table: pd.DataFrame, fields: Sequence[str], metrics: Sequence[str], *, draws: int = DRAWS
) -> dict[str, dict[str, dict[str, Groups]]]:
    """Return field → metric → model → its groups, with 95 % intervals.

    Values with fewer than LEAST rows are left out, and fields and models with fewer than two values.
    """
    found: dict[str, dict[str, dict[str, Groups]]] = {}
    for field in fields:
        for model, rows in table.groupby("model"):
            kept = rows_of_groups(rows, f"{GROUP}{field}", LEAST)
            scored = [
                metric for metric in metrics if np.isfinite(kept[metric].to_numpy(dtype=np.float64)).all()
            ]
            if kept[f"{GROUP}{field}"].nunique() < 2:
                continue
            for metric, part in _frame(kept, f"{GROUP}{field}", scored, draws).items():
                found.setdefault(field, {}).setdefault(metric, {})[str(model)] = part
    return found


def _frame(rows: pd.DataFrame, column: str, metrics: Sequence[str], draws: int) -> dict[str, Groups]:
    from fairlearn.metrics import MetricFrame

    def mean(_true: Any, _predicted: Any, score: Any) -> float:
        return float(np.mean(score))

    scores = {metric: {"score": rows[metric].to_numpy(dtype=np.float64)} for metric in metrics}
    nothing = np.zeros(len(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a ratio to a mean of 0, which `_interval` leaves out
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
        gaps = [(frame.difference(), *frame.difference_ci()), (frame.ratio(), *frame.ratio_ci())]
    counts = rows[column].value_counts()
    found: dict[str, Groups] = {}
    for metric in metrics:
        low, high = (side[metric] for side in frame.by_group_ci)
        by_group = {
            str(value): Estimate(float(mean), float(low[value]), float(high[value]), int(counts[value]))
            for value, mean in frame.by_group[metric].items()
        }
        found[metric] = Groups(by_group, *(_interval(*(float(side[metric]) for side in gap)) for gap in gaps))
    return found


def _interval(*bounds: float) -> Interval | None:
    """Return the bounds as an interval, or None where a mean of 0 leaves no ratio."""
    return Interval(*bounds) if all(map(math.isfinite, bounds)) else None
