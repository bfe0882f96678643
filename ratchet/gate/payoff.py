"""Is it worth it: what the gain would bring over the traffic of some months, against what the training cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import make_check, paired_gains
from ratchet.evaluation.statistics import Interval, bootstrap_mean
from ratchet.files import read_json

if TYPE_CHECKING:
    import pandas as pd

SECONDS = 3600.0


def training_seconds(training: Path, run_key: str) -> float:
    """Of the run that made the candidate. Raises RatchetError: there are no figures, or they are of another run."""
    figures = read_json(training / "figures.json")
    if figures.get("run_key") != run_key:
        raise RatchetError(
            f"{training} tells of the run {str(figures.get('run_key'))[:12]}, the candidate comes from {run_key[:12]}",
            remedy="dvc repro --force train",
        )
    return float(figures["seconds"])


def weigh(test: pd.DataFrame, rival: str, seconds: float, config: GateConfig) -> dict[str, Any]:
    """As a check: it fails when the expected gain brings less than the training cost. Its figures are in the currency of `gate.worth`."""
    worth = config.worth
    requests = worth.requests_per_month * worth.months
    cost = seconds / SECONDS * worth.cost_per_hour
    gain = bootstrap_mean(
        paired_gains(test, rival, config.metric),
        alpha=config.guardrail_alpha,
        resamples=config.resamples,
        seed=config.seed,
    )
    brings = Interval(*(value * requests * worth.value_per_correct for value in gain))
    result = "pass" if brings.mean > cost else "fail"
    words = {"pass": "brings more than the training cost", "fail": "does not bring what the training cost"}[
        result
    ]
    reason = (
        f"worth: a gain of {gain.mean:+.3f} over {requests:,.0f} requests in {worth.months:g} month{'s' * (worth.months != 1)} {words}: "
        f"{brings.mean:,.2f} [{brings.low:,.2f}, {brings.high:,.2f}] against {cost:,.2f} for {seconds / SECONDS:.2f} h"
    )
    return make_check("worth", config.metric, brings, test.id.nunique(), cost, result, reason)
