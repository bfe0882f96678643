"""An open rollout: one look at what its users met, and the acts that follow. Nothing here moves the champion: flows do, with tasks/promote.py.

A flow's task, not a stage. Each act reads the state again under the lock `promote`; doing it twice changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ratchet.anytime import Cells, Draw, Floats, Ints, difference, draw_chances, log_evidence, log_mismatch, lower_bound, make_cells
from ratchet.config import RolloutConfig
from ratchet.request_log import Unit
from ratchet.rollout import Rollout

MISMATCH = 1000.0  # evidence that the arms' numbers do not fit their shares, from which a rollout stops
SLOWEST = math.log(8.0)  # latencies count within this factor of the median, either way
SUCCESS_SHARE = 0.5  # of alpha; the rest is for the harms and the mismatch


class Columns(NamedTuple):
    """Units as arrays, a row each: users as numbers, arms as 1 for the challenger; NaN where nothing is known."""

    user: Ints
    step: Ints
    arm: Ints
    errors: Floats  # share of the requests
    empty: Floats
    latency: Floats  # mean, in milliseconds
    feedback: Floats  # mean score


class Verdict(NamedTuple):
    """`figures` are JSON."""

    action: str  # "hold", "advance", "promote", "roll_back", "stop" or "no_evidence"
    reason: str
    figures: dict[str, Any]


class Guardrail(NamedTuple):
    """`sign` is the direction of harm; `margin` in the units of the cells."""

    name: str
    cells: Cells
    sign: int
    margin: float


def columns_of(units: Sequence[Unit]) -> Columns:
    """Requests that came while the rollout was paused carry no step; they are not compared."""
    kept = [unit for unit in units if unit.step >= 0]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(unit.unit for unit in kept))}

    def column(values: list[float | None]) -> Floats:
        return np.array(values, dtype=np.float64)  # None becomes NaN

    return Columns(
        user=np.array([numbers[unit.unit] for unit in kept], dtype=np.int64),
        step=np.array([unit.step for unit in kept], dtype=np.int64),
        arm=np.array([unit.arm == "challenger" for unit in kept], dtype=np.int64),
        errors=column([unit.errors / max(unit.requests, 1) for unit in kept]),
        empty=column([unit.empty / max(unit.requests, 1) for unit in kept]),
        latency=column([unit.latency_ms for unit in kept]),
        feedback=column([unit.feedback for unit in kept]),
    )


def look(units: Sequence[Unit] | Columns, rollout: Rollout, config: RolloutConfig, now: float, *, bounds: bool = True) -> Verdict:
    """What to do, and why. `bounds`: with the figures' intervals, which are for people: they follow from the same tests."""
    if rollout.shares[0] >= 1.0:
        return Verdict("promote", "rollout.steps is [1.0]: no canary", {})
    columns = units if isinstance(units, Columns) else columns_of(units)
    draw = draw_chances(columns.user, columns.step, columns.arm, rollout.shares)
    gain = make_cells(draw, columns.arm, columns.feedback)
    guardrails = _guardrails(columns, draw, gain, config)
    counts = _count(columns, rollout)
    figures = _figures(counts, gain, guardrails, config, bounds)
    hours = (now - rollout.opened - rollout.paused_seconds) / 3600
    mismatch = log_mismatch(draw, columns.arm, columns.step, len(rollout.shares))
    figures |= {"hours": round(hours, 2), "mismatch": round(min(math.exp(min(mismatch, 50)), 1e12), 4)}

    if mismatch > math.log(_mismatch_threshold(config)):
        return Verdict("stop", _say_mismatch(counts, rollout), figures)
    if harms := [rail for rail in guardrails if log_evidence(rail.cells, sign=rail.sign, margin=rail.margin) >= -math.log(_harm_alpha(config))]:
        return Verdict("roll_back", "certain harm: " + "; ".join(_say(rail, config) for rail in harms), figures)
    is_last = rollout.step + 1 >= len(rollout.shares) - 1
    missing = _missing(counts, gain, guardrails, config) if is_last else []
    if is_last and not missing:
        return Verdict("promote", _say_gain(gain, counts, config), figures)
    if hours >= config.max_hours:
        return Verdict("no_evidence", f"{hours:.0f} hours without enough evidence: " + ("; ".join(missing) or f"still in step {rollout.step + 1}"), figures)
    if is_last:
        return Verdict("hold", "; ".join(missing), figures)
    waits = _waits(counts, rollout, config, now)
    return Verdict("hold", "; ".join(waits), figures) if waits else Verdict("advance", f"no certain harm among {counts['challenger']['users']} users", figures)


def _guardrails(columns: Columns, draw: Draw, gain: Cells, config: RolloutConfig) -> list[Guardrail]:
    arm = columns.arm
    return [
        Guardrail("feedback", gain, -1, config.feedback_margin),
        Guardrail("errors", make_cells(draw, arm, columns.errors), 1, config.error_margin),
        Guardrail("empty", make_cells(draw, arm, columns.empty), 1, config.empty_margin),
        Guardrail("latency", make_cells(draw, arm, _scaled(columns.latency)), 1, math.log1p(config.latency_margin) / (2 * SLOWEST)),
    ]


def _scaled(latency: Floats) -> Floats:
    """Logarithms around the median of both arms, from 0 (8 times as fast) to 1 (8 times as slow)."""
    known = np.isfinite(latency)
    logs = np.full(len(latency), np.nan)
    logs[known] = np.log(np.maximum(latency[known], 1e-3))
    return 0.5 + (logs - (np.median(logs[known]) if known.any() else 0.0)) / (2 * SLOWEST)


def _count(columns: Columns, rollout: Rollout) -> dict[str, dict[str, int]]:
    """Distinct users of each arm: in all, in this step, and those who gave feedback."""
    found = {}
    for arm, name in enumerate(("champion", "challenger")):
        of_arm = columns.arm == arm
        users = {"users": of_arm, "in_step": of_arm & (columns.step == rollout.step), "feedback": of_arm & np.isfinite(columns.feedback)}
        found[name] = {key: len(np.unique(columns.user[rows])) for key, rows in users.items()}
    return found


def _mismatch_threshold(config: RolloutConfig) -> float:
    return max(MISMATCH, 20 / config.alpha)


def _success_alpha(config: RolloutConfig) -> float:
    return config.alpha * SUCCESS_SHARE


def _harm_alpha(config: RolloutConfig) -> float:
    """Of each of the four guardrails: with the test of success and of the shares they make up alpha."""
    return (config.alpha - _success_alpha(config) - 1 / _mismatch_threshold(config)) / 4


def _missing(counts: dict[str, dict[str, int]], gain: Cells, guardrails: list[Guardrail], config: RolloutConfig) -> list[str]:
    """What a promotion still waits for. The guardrails must all pass, so that each may use alpha whole (an intersection-union test)."""
    found = []
    few = min(count["feedback"] for count in counts.values())
    if few < config.min_users:
        found.append(f"{few} users of the smaller arm gave feedback, wanted {config.min_users}")
    won, wanted = log_evidence(gain, sign=1, margin=config.min_gain), -math.log(_success_alpha(config))
    if won < wanted:
        found.append(f"the gain of {_number(difference(gain))} is not certain to exceed {config.min_gain:g}{_more(gain, won, wanted)}")
    for rail in guardrails:
        won, wanted = log_evidence(rail.cells, sign=-rail.sign, margin=-rail.margin), -math.log(config.alpha)
        if won < wanted and not (rail.name == "feedback" and config.min_gain >= -config.feedback_margin):
            found.append(f"{rail.name} is not certain to be within its margin{_more(rail.cells, won, wanted)}")
    return found


def _more(cells: Cells, won: float, wanted: float) -> str:
    """Evidence grows in proportion to the units, after the cost of not knowing the best stake."""
    cost, units = math.log(9), float(cells.units.sum())
    grown = won + cost
    if grown <= 1 or units < 20:
        return ""
    more = units * ((wanted + cost) / grown - 1)
    return f": needs about {max(10, round(more, -1)):.0f} more users like these"


def _waits(counts: dict[str, dict[str, int]], rollout: Rollout, config: RolloutConfig, now: float) -> list[str]:
    """What the next step still waits for."""
    found = []
    minutes = (now - rollout.step_since) / 60
    if minutes < config.step_minutes:
        found.append(f"step {rollout.step + 1} goes on for {config.step_minutes - minutes:.0f} more minutes")
    for name, count in counts.items():
        if count["in_step"] < config.step_users:
            found.append(f"needs {config.step_users - count['in_step']} more users of the {name} in this step")
    return found


def _figures(counts: dict[str, dict[str, int]], gain: Cells, guardrails: list[Guardrail], config: RolloutConfig, bounds: bool) -> dict[str, Any]:
    """Differences are challenger minus champion; latency as a share of the champion's. Bounds are one-sided, at the levels that decide."""
    rails: dict[str, dict[str, Any]] = {rail.name: {"harm_beyond": _shown_margin(rail, config)} for rail in guardrails}
    figures: dict[str, Any] = {"users": counts, "gain": {}, "guardrails": rails}
    if bounds:
        figures["gain"] = _interval(gain, 1, _success_alpha(config), _harm_alpha(config), float)
        for rail in guardrails[1:]:
            rails[rail.name] |= _interval(rail.cells, rail.sign, _harm_alpha(config), config.alpha, _as_share if rail.name == "latency" else float)
        rails["feedback"] |= figures["gain"]
    return figures


def _interval(cells: Cells, sign: int, low_alpha: float, high_alpha: float, shown: Any) -> dict[str, float | None]:
    found = difference(cells)
    low, high = lower_bound(cells, sign=1, alpha=low_alpha), -lower_bound(cells, sign=-1, alpha=high_alpha)
    return {"mean": None if found is None else round(shown(found), 4), "low": round(shown(low), 4), "high": round(shown(high), 4)}


def _as_share(scaled: float) -> float:
    return math.expm1(scaled * 2 * SLOWEST)


def _shown_margin(rail: Guardrail, config: RolloutConfig) -> float:
    return config.latency_margin if rail.name == "latency" else -rail.margin if rail.sign < 0 else rail.margin


def _say(rail: Guardrail, config: RolloutConfig) -> str:
    found = difference(rail.cells)
    shown = _as_share(found) if rail.name == "latency" and found is not None else found
    return f"{rail.name} {_number(shown)}, still taken would be {_shown_margin(rail, config):+g}"


def _say_gain(gain: Cells, counts: dict[str, dict[str, int]], config: RolloutConfig) -> str:
    low = lower_bound(gain, sign=1, alpha=_success_alpha(config))
    told = " and ".join(f"{count['feedback']} of the {name}'s" for name, count in counts.items())
    return f"feedback {_number(difference(gain))}, at least {low:+.3f} (wanted over {config.min_gain:g}); {told} users spoke; every guardrail holds"


def _say_mismatch(counts: dict[str, dict[str, int]], rollout: Rollout) -> str:
    shares = ", ".join(f"{share:.0%}" for share in rollout.shares[: rollout.step + 1])
    return f"{counts['challenger']['users']} of the challenger's and {counts['champion']['users']} of the champion's users do not fit the shares {shares}: look at the routing and the log"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f}"
