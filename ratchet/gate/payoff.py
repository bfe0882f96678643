"""Compare the value of a gain over some months of traffic with the cost of the training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.paired import paired_gains
from ratchet.evaluation.statistics import Interval
from ratchet.files import read_json
from ratchet.gate.checks import interval_of, make_check
from ratchet.promotion.verdict import Check, Result

if TYPE_CHECKING:
    import pandas as pd

SECONDS = 3600.0


def training_seconds(training: Path, run_key: str) -> float:
    """Read how long the run took that made the candidate.

    Raises RatchetError when there are no figures, or when they are of another run.
    """
    figures = read_json(training / "figures.json")
    if figures.get("run_key") != run_key:
        raise RatchetError(
            f"{training} tells of the run {str(figures.get('run_key'))[:12]}, "
            f"the candidate comes from {run_key[:12]}",
            remedy="dvc repro --force train",
        )
    return float(figures["seconds"])


def weigh(test: pd.DataFrame, rival: str, seconds: float, config: GateConfig) -> Check:
    """Check that the expected gain is worth more than the training cost, in the currency of `gate.worth`."""
    worth = config.worth
    requests = worth.requests_per_month * worth.months
    cost = seconds / SECONDS * worth.cost_per_hour
    gain = interval_of(paired_gains(test, rival, config.metric), config)
    brings = Interval(*(value * requests * worth.value_per_correct for value in gain))
    result: Result = "pass" if brings.mean > cost else "fail"
    words = (
        "brings more than the training cost" if result == "pass" else "does not bring what the training cost"
    )
    months = f"{worth.months:g} month{'s' * (worth.months != 1)}"
    reason = (
        f"worth: a gain of {gain.mean:+.3f} over {requests:,.0f} requests in {months} {words}: "
        f"{brings.text(',.2f')} against {cost:,.2f} for {seconds / SECONDS:.2f} h"
    )
    return make_check("worth", config.metric, brings, test.id.nunique(), cost, result, reason)
