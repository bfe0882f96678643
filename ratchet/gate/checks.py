"""Compare an interval with a bound: pass, fail or unclear, as a check with its reason."""

from __future__ import annotations

import math

from msgspec import UNSET

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.statistics import Interval, Values, bootstrap_mean
from ratchet.promotion.verdict import Check, Needed, Result, tell_rows

MOST_ROWS = 1_000_000  # a wish for more rows than this helps nobody
BETTER: dict[Result, str] = {
    "pass": "is better for certain than the {}'s",
    "fail": "is not better than the {}'s",
    "unclear": "may be better than the {}'s, but these rows cannot tell",
}
NO_WORSE: dict[Result, str] = {
    "pass": "is no worse than the {}'s",
    "fail": "is worse than the {}'s",
    "unclear": "may be worse than the {}'s, and these rows cannot tell",
}


def exceeds(found: Interval, bound: float) -> Result:
    """Judge superiority: pass when the whole interval is over `bound`, fail when none of it is."""
    return "pass" if found.low > bound else "fail" if found.high <= bound else "unclear"


def reaches(found: Interval, bound: float) -> Result:
    """Judge non-inferiority: pass when no part of the interval is under `bound`, fail when all of it is."""
    return "pass" if found.low >= bound else "fail" if found.high < bound else "unclear"


def interval_of(values: Values, config: GateConfig, alpha: float | None = None) -> Interval:
    """Bootstrap the mean with the gate's settings, at `gate.guardrail_alpha` unless told otherwise."""
    alpha = config.guardrail_alpha if alpha is None else alpha
    return bootstrap_mean(values, alpha=alpha, resamples=config.resamples, seed=config.seed)


def no_worse(name: str, gains: Values, rival: str, metric: str, margin: float, config: GateConfig) -> Check:
    """Check that the lower bound of the gain is at least -margin.

    Guardrails all have to pass. So alpha needs no correction for their number: a chance failure only keeps
    the champion.
    """
    rows = len(gains)
    return check_loss(name, metric, interval_of(gains, config), rows, f"{rows} rows", rival, margin)


def check_loss(
    name: str, metric: str, found: Interval, rows: int, of: str, rival: str, margin: float
) -> Check:
    """Check that the interval has no part under -margin; `of` is the number of rows with what they are."""
    result = reaches(found, -margin)
    told = tell_gain(metric, found, of, rival, NO_WORSE, result)
    reason = f"guardrail {name}: {told}, a loss of {margin:g} is still taken"
    if result == "unclear":
        reason += f"; {tell_needed(found, margin, rows)}"
    needed = more_rows(result, found, margin, rows)
    return make_check(name, metric, found, rows, -margin, result, reason, needed)


def rows_needed(found: Interval, margin: float, rows: int) -> int | None:
    """Return the rows at which this gain would pass with a loss of `margin` taken; None: it never would.

    The distance from the mean to the lower bound shrinks with the root of the rows.
    """
    room = found.mean + margin
    return math.ceil(rows * ((found.mean - found.low) / room) ** 2) if room > 0 else None


def more_rows(result: Result, found: Interval, margin: float, rows: int) -> Needed:
    """Return how many more rows would settle an unclear check; None: no number of them would.

    A check that is settled has no such figure, nor one whose interval would pass already.
    """
    needed = rows_needed(found, margin, rows)
    if result != "unclear" or (needed is not None and needed <= rows):
        return UNSET
    return None if needed is None or needed > MOST_ROWS else needed - rows


def tell_needed(found: Interval, margin: float, rows: int) -> str:
    needed = rows_needed(found, margin, rows)
    if needed is None or needed > MOST_ROWS:
        return "no number of rows would show it at this gain"
    return f"about {tell_rows(needed)} rows would show it at this gain"


def tell_gain(
    metric: str, found: Interval, rows: str, rival: str, words: dict[Result, str], result: Result
) -> str:
    """Describe the gain in words.

    `rows` is the number of rows with what they are; `words` gives the phrase for each result.
    """
    return f"{metric} on {rows} {words[result].format(rival)}: gain {found.text()}"


def make_check(
    name: str,
    metric: str,
    found: Interval,
    rows: int,
    wanted: float,
    result: Result,
    reason: str,
    needed: Needed = UNSET,
) -> Check:
    return Check(name, metric, rows, result, reason, found.mean, found.low, found.high, wanted, needed=needed)


def unmeasured(name: str, metric: str, rows: int, result: Result, reason: str) -> Check:
    """Make a check whose figures could not be measured: they are null in the report."""
    return Check(name, metric, rows, result, reason, None, None, None, None)
