"""Checks of the gate: paired gains on the same rows, and whether they are no worse for certain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.statistics import Interval, Values, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

LOWER_IS_BETTER = ("answer_nll", "refusal")
AGAIN = "dvc repro --force evaluate"
SEEN_SHARE = 0.02  # of all rows: what an evaluation may leave out because the demo's base has read it


def paired_gains(rows: pd.DataFrame, rival: str, metric: str) -> Values:
    """Candidate minus rival by row, in the ids' order, positive when the candidate is better. Raises RatchetError when the pairs are not whole."""
    if metric not in rows:
        raise RatchetError(
            f"the evaluation has no scores named {metric}",
            remedy="add it to `evaluate.metrics` or `evaluate.custom`, then dvc repro evaluate",
        )
    sides = {
        name: rows[rows.model == name].set_index("id")[metric].sort_index() for name in ("candidate", rival)
    }
    for name, values in sides.items():
        if values.index.has_duplicates or not np.isfinite(values.to_numpy(dtype=np.float64)).all():
            raise RatchetError(
                f"the evaluation of the {name} holds doubled rows or values that are not finite", remedy=AGAIN
            )
    if set(sides["candidate"].index) != set(sides[rival].index) or not len(sides[rival]):
        raise RatchetError(
            f"candidate and {rival} were not scored on the same rows ({len(sides['candidate'])} and {len(sides[rival])})",
            remedy=AGAIN,
        )
    difference = (sides["candidate"] - sides[rival].reindex(sides["candidate"].index)).to_numpy(
        dtype=np.float64
    )
    return np.asarray(-difference if metric in LOWER_IS_BETTER else difference, dtype=np.float64)


def no_worse(
    name: str, gains: Values, rival: str, metric: str, margin: float, config: GateConfig
) -> dict[str, Any]:
    """Non-inferiority: the lower bound of the gain must clear -margin. Guardrails that all have to hold need no correction of alpha for their number."""
    found = bootstrap_mean(gains, alpha=config.guardrail_alpha, resamples=config.resamples, seed=config.seed)
    result = "pass" if found.low >= -margin else "fail" if found.high < -margin else "unclear"
    words = {
        "pass": "is no worse than the {}'s",
        "fail": "is worse than the {}'s",
        "unclear": "may be worse than the {}'s, and these rows cannot tell",
    }
    reason = f"guardrail {name}: {metric} on {len(gains)} rows {words[result].format(rival)}: gain {said(found)}, a loss of {margin:g} is still taken"
    return make_check(name, metric, found, len(gains), -margin, result, reason)


def make_check(
    name: str, metric: str, found: Interval, rows: int, wanted: float, result: str, reason: str
) -> dict[str, Any]:
    return {
        "name": name,
        "metric": metric,
        "rows": rows,
        **found._asdict(),
        "wanted": wanted,
        "result": result,
        "reason": reason,
    }


def said(found: Interval) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
