"""Take one look at a rollout: hold, advance, promote, roll back, stop, or end it for lack of evidence.

The bounds hold at all looks together (ratchet/promotion/sequential_test.py), so any number of looks may be
taken. `rollout.alpha`, the chance that a rollout of an equal model ends wrongly, is divided between the ways
in which it may end: 40 % for a false gain, 50 % for false harm (over four measures), and the rest for a split
of users that only looks wrong. ratchet/promotion/rollout.py applies a look's result to the rollout; this
module copies it to MLflow. It is a task of the flow `rollout`, not a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ratchet.config.monitoring import RolloutConfig
from ratchet.errors import ServiceError
from ratchet.monitoring.request_records import Unit
from ratchet.promotion.rollout import Bounds, Figures, Measure, Rollout, Users
from ratchet.promotion.sequential_test import Stratum, difference, split_e_value
from ratchet.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    Version,
    drop_alias,
    get_alias,
    list_versions,
    set_tag,
)

Action = Literal["hold", "advance", "promote", "roll_back", "stop", "no_evidence"]
GAIN_SHARE, HARM_SHARE, SPLIT_SHARE = 0.4, 0.5, 0.1  # of rollout.alpha
SUCCESS = "feedback"
# Expected standard deviation of a value: it decides where the bounds are tightest, never whether they hold.
SCALES = {"feedback": 0.45, "errors": 0.1, "empty": 0.1, "latency": 0.5}
MAX_TAG = 1000  # characters; more would hide the rest of MLflow's page


class Look(NamedTuple):
    """What a look decides, and why.

    `figures` are for people and the page: the users of each step, and bounds of challenger minus champion
    for each measure.
    """

    action: Action
    reason: str
    figures: Figures


class Registry(NamedTuple):
    """The state of MLflow's registry; `champion` and `challenger` are the versions with these aliases."""

    versions: dict[int, Version]
    champion: int | None
    challenger: int | None


class Outcomes(NamedTuple):
    """The units as columns, each (units,); NaN where a unit has no value."""

    step: NDArray[np.int64]
    challenger: NDArray[np.bool_]
    errors: NDArray[np.float64]  # share of the unit's requests
    empty: NDArray[np.float64]
    latency: NDArray[np.float64]  # log of the mean in milliseconds
    feedback: NDArray[np.float64]
    unit: NDArray[np.int64]  # a user's number, the same in every step


def look(units: list[Unit], rollout: Rollout, config: RolloutConfig, now: float) -> Look:
    """Judge the rollout. Requests that came during a pause are left out, because they belong to no step."""
    return judge(outcomes_of([unit for unit in units if unit.step >= 0]), rollout, config, now)


def outcomes_of(units: list[Unit]) -> Outcomes:
    def column(value: Callable[[Unit], float | None]) -> NDArray[np.float64]:
        return np.array(
            [math.nan if (found := value(unit)) is None else found for unit in units], dtype=np.float64
        )

    return Outcomes(
        np.array([unit.step for unit in units], dtype=np.int64),
        np.array([unit.arm == "challenger" for unit in units], dtype=np.bool_),
        column(lambda unit: unit.errors / unit.requests),
        column(lambda unit: unit.empty / unit.requests),
        column(lambda unit: math.log(unit.latency_ms) if unit.latency_ms else None),
        column(lambda unit: unit.feedback),
        np.unique([unit.unit for unit in units], return_inverse=True)[1].astype(np.int64),
    )


def judge(found: Outcomes, rollout: Rollout, config: RolloutConfig, now: float) -> Look:
    """Judge a rollout: the split of users first, then harm, gain, the time limit, and the step."""
    figures = _figures(found, rollout, config)
    if rollout.shares[0] >= 1:
        return Look("promote", "rollout.steps begins with 1.0: no comparison was wanted", figures)
    if wrong := _wrong_split(figures.steps, rollout, config.alpha):
        return Look("stop", wrong, figures)
    if harm := _certain_harm(figures, config):
        return Look("roll_back", harm, figures)
    missing = _missing_for_promotion(figures, rollout, config)
    if not missing:
        return Look("promote", _gain_in_words(figures), figures)
    if now - rollout.opened - rollout.paused_seconds >= config.max_hours * 3600:
        return Look(
            "no_evidence",
            f"{config.max_hours:g} h passed without enough evidence: {'; '.join(missing)}",
            figures,
        )
    waiting = _missing_for_step(figures, rollout, config, now)
    if not waiting:
        return Look(
            "advance",
            f"{rollout.shares[rollout.step]:.0%} of the users did well enough: on to "
            f"{rollout.shares[rollout.step + 1]:.0%}",
            figures,
        )
    return Look("hold", "; ".join(waiting if rollout.step < rollout.last_step else missing), figures)


def _figures(found: Outcomes, rollout: Rollout, config: RolloutConfig) -> Figures:
    """Compute the bounds of each measure, and the users of each step.

    A measure has bounds at three alphas: for a promotion, for a rollback, and for passing as a guardrail.
    All guardrails have to pass together, so each of them may use the whole alpha.
    """
    alphas = (config.alpha * GAIN_SHARE, config.alpha * HARM_SHARE / len(SCALES), config.alpha)
    measures = {}
    for name, scale in SCALES.items():
        strata = _strata(found, getattr(found, name))
        gain, harm, held = (difference(strata, alpha, scale=scale) for alpha in alphas)
        measures[name] = Measure(gain, harm, held)
    arms = [found.step[found.challenger == arm] for arm in (False, True)]
    steps = [Users(step, *(int((arm == step).sum()) for arm in arms)) for step in range(rollout.step + 1)]
    return Figures(measures, steps)


def _strata(found: Outcomes, values: NDArray[np.float64]) -> list[Stratum]:
    told = ~np.isnan(values)
    strata = []
    for step in range(int(found.step.max(initial=-1)) + 1):
        champion, challenger = (
            told & (found.step == step) & (found.challenger == arm) for arm in (False, True)
        )
        strata.append(
            Stratum(values[champion], values[challenger], found.unit[champion], found.unit[challenger])
        )
    return strata


def _wrong_split(steps: list[Users], rollout: Rollout, alpha: float) -> str:
    # A correct split exceeds 1/alpha in any of its looks with that probability; each step has its own chance.
    most = len(rollout.shares) / (SPLIT_SHARE * alpha)
    for counts in steps:
        share = rollout.shares[counts.step]
        if share < 1 and (e := split_e_value(counts.champion, counts.challenger, share)) > most:
            users = counts.champion + counts.challenger
            return (
                f"{counts.challenger} of {users} users got the challenger in a step of {share:.0%} "
                f"(e-value {e:.0f}): the routing or the log is broken, so no figure counts"
            )
    return ""


def _certain_harm(figures: Figures, config: RolloutConfig) -> str:
    margins = _margins(config)
    for name, measure in figures.measures.items():
        found = measure.harm
        if not found:
            continue
        if name == SUCCESS and found.high < -margins[name]:
            loss = f"a loss of up to {margins[name]:g} is accepted"
            return f"the users' feedback is worse for certain: {_said(found)}, {loss}"
        if name != SUCCESS and found.low > margins[name]:
            return f"{name} worse for certain: {_said(found)}, up to {margins[name]:.3g} more is accepted"
    return ""


def _margins(config: RolloutConfig) -> dict[str, float]:
    return {
        "feedback": config.feedback_margin,
        "errors": config.error_margin,
        "empty": config.empty_margin,
        "latency": math.log1p(config.latency_margin),
    }


def _missing_for_promotion(figures: Figures, rollout: Rollout, config: RolloutConfig) -> list[str]:
    """List what the challenger lacks for promotion; empty when it lacks nothing."""
    if rollout.step < rollout.last_step:
        return [f"step {rollout.step + 1} of {len(rollout.shares)}"]
    gain = figures.measures[SUCCESS].gain
    if gain is None:
        return ["no feedback yet"]
    missing = [
        f"feedback of {users} users of the {arm}, wanted {config.min_users}"
        for arm, users in (("champion", gain.champion), ("challenger", gain.challenger))
        if users < config.min_users
    ]
    if gain.low <= config.min_gain:
        missing.append(
            f"a gain of {_said(gain)}, wanted a lower bound over "
            f"{config.min_gain:+.3f}{_how_many_more(gain, config)}"
        )
    for name, margin in _margins(config).items():
        found = figures.measures[name].pass_
        if name != SUCCESS and (found is None or found.high > margin):
            missing.append(
                f"{name} {_said(found) if found else 'unknown'}, wanted no more than {margin:.3g} for certain"
            )
    return missing


def _how_many_more(gain: Bounds, config: RolloutConfig) -> str:
    """Estimate how many more users are needed: the bound narrows with about the square root of users."""
    surplus, half = gain.mean - config.min_gain, gain.mean - gain.low
    if surplus <= 0:
        return ""
    users = gain.champion + gain.challenger
    more = max(1, math.ceil(users * ((half / surplus) ** 2 - 1)))
    return f"; if the gain stays so, about {more} more users' feedback"


def _missing_for_step(figures: Figures, rollout: Rollout, config: RolloutConfig, now: float) -> list[str]:
    if rollout.step >= rollout.last_step:
        return ["the last step before all users"]
    counts, minutes = figures.steps[rollout.step], (now - rollout.step_since) / 60
    missing = [
        f"{users} users of the {arm} in this step, wanted {config.step_users}"
        for arm, users in (("champion", counts.champion), ("challenger", counts.challenger))
        if users < config.step_users
    ]
    return missing + (
        [f"{minutes:.0f} min of {config.step_minutes:g}"] if minutes < config.step_minutes else []
    )


def _gain_in_words(figures: Figures) -> str:
    gain = figures.measures[SUCCESS].gain
    assert gain is not None  # nothing is missing for a promotion
    return f"mean feedback {_said(gain)} on {gain.champion} + {gain.challenger} users"


def _said(found: Bounds) -> str:
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


# --- MLflow -------------------------------------------------------------------------------------------------


def read_registry(name: str) -> Registry:
    """Read the registry. Raises ServiceError when MLflow does not answer, or its answer cannot be parsed."""
    try:
        return Registry(
            {version.number: version for version in list_versions(name)},
            get_alias(name, CHAMPION),
            get_alias(name, CHALLENGER),
        )
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # what MLflow's client raises for a body that it cannot parse
        raise ServiceError(
            f"MLflow's answer about {name} cannot be read: {type(error).__name__}: {error}",
            remedy="MLFLOW_TRACKING_URI names an MLflow server?",
        ) from error


def follow(registry: Registry, rollout: Rollout) -> None:
    """Copy the rollout's state to MLflow: tags on the version, and no alias `challenger` once it has ended.

    The reason is written only when the state or the share changes: it changes at each look, and each change
    in the registry triggers another look. Raises ServiceError.
    """
    version = registry.versions.get(rollout.version)
    if version is None:
        return
    told = {"rollout_state": rollout.state, "rollout_share": f"{rollout.share:g}"}
    if not told.items() <= version.tags.items():
        for key, value in {**told, "rollout_reason": rollout.why[:MAX_TAG]}.items():
            set_tag(version.name, version.number, key, value)
    if rollout.ended is not None and registry.challenger == rollout.version:
        drop_alias(rollout.name, CHALLENGER)
