"""Measure how often a rollout of an equal model ends wrongly, and how soon a better or a worse one is
recognised, by the real `judge` at every look.

    python -m benchmarks.rollout [--rollouts 1000] [--looks 80]

Users come back, each with a mean score of their own; half of the requests get feedback; the hour shifts all
scores; the challenger's share grows as the rollout advances. For comparison, a plain z-test (two-sided, 5 %)
is made at every look.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratchet.config.monitoring import RolloutConfig
from ratchet.promotion.rollout import Rollout
from tasks.rollout import Outcomes, judge

WRONG = ("promote", "roll_back", "stop")
CONFIG = RolloutConfig(step_minutes=0, max_hours=1e9)
EIGHT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)  # shares of a rollout that advances eight times


class Ended(NamedTuple):
    """How a rollout ended; `look` counts from 1; `naive`: the z-test called a difference at some look."""

    action: str
    look: int
    users: int
    naive: bool


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=1000, help="A/A rollouts")
    parser.add_argument("--looks", type=int, default=80, help="looks of each")
    options = parser.parse_args()
    started = time.perf_counter()
    print(
        f"A/A: {options.rollouts} rollouts of an equal model, {options.looks} looks each, rollout.alpha"
        f" {CONFIG.alpha}"
    )
    print(
        "| effect on the feedback | rollouts | promoted | rolled back | stopped | undecided | ends wrongly |"
        " naive z-test calls a difference | median users at the end |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(row("0 (A/A)", simulate_many(options.rollouts, options.looks, effect=0.0), wrong=WRONG))
    print(
        row(
            "0, 8 steps, users of one opinion",
            simulate_many(
                max(20, options.rollouts // 4),
                options.looks,
                effect=0.0,
                seed=2,
                shares=EIGHT,
                opinion=(0.2, 0.2),
            ),
            wrong=WRONG,
        ),
        flush=True,
    )
    for effect in (0.05, 0.1, -0.05, -0.1):
        wrong = ("roll_back", "stop") if effect > 0 else ("promote", "stop")
        print(
            row(
                f"{effect:+.2f}",
                simulate_many(max(20, options.rollouts // 10), options.looks, effect=effect, seed=1),
                wrong=wrong,
            )
        )
    print(f"\n{time.perf_counter() - started:.0f} s")


def row(name: str, ended: list[Ended], wrong: tuple[str, ...]) -> str:
    counts = Counter(one.action for one in ended)
    told = sorted(one.users for one in ended if one.action in ("promote", "roll_back"))
    share = sum(counts[action] for action in wrong) / len(ended)
    median = str(told[len(told) // 2]) if told else "—"
    naive = sum(one.naive for one in ended) / len(ended)
    return (
        f"| {name} | {len(ended)} | {counts['promote']} | {counts['roll_back']} | {counts['stop']} |"
        f" {counts['hold'] + counts['advance']} | {share:.1%} | {naive:.1%} | {median} |"
    )


def simulate_many(
    rollouts: int,
    looks: int,
    *,
    effect: float,
    seed: int = 0,
    shares: Sequence[float] = CONFIG.steps,
    opinion: tuple[float, float] = (3, 2),
) -> list[Ended]:
    return [
        simulate(np.random.default_rng([seed, number]), looks, effect=effect, shares=shares, opinion=opinion)
        for number in range(rollouts)
    ]


def simulate(
    chance: np.random.Generator,
    looks: int,
    *,
    effect: float,
    shares: Sequence[float] = CONFIG.steps,
    opinion: tuple[float, float] = (3, 2),
    users: int = 1600,
    requests: int = 100,
) -> Ended:
    """Simulate one rollout; `requests` come between two looks, half of them with feedback.

    `opinion`: the parameters of the beta distribution of the users' mean scores.
    """
    spoken = 0.5
    rollout = Rollout("a", "small", 2, 1, "c", "h", "salt", 0, list(shares), "open", 0.0, 0.0)
    quality, place = chance.beta(*opinion, users), chance.random(users)
    sums = np.zeros(
        (len(rollout.shares), users, 5)
    )  # requests, errors, empty, log latency, and feedback's sum …
    voices = np.zeros((len(rollout.shares), users))  # … and number
    naive, seen = False, Counter[str]()
    for number in range(1, looks + 1):
        who = chance.integers(0, users, requests)
        treated = place[who] < rollout.share
        hour = 0.1 * math.sin(number / 4)
        score = chance.random(requests) < np.clip(quality[who] + hour + effect * treated, 0, 1)
        values = np.stack(
            [
                np.ones(requests),
                chance.random(requests) < 0.01,
                chance.random(requests) < 0.02,
                chance.normal(5 + hour, 0.5, requests),
                score,
            ],
            axis=1,
        )
        np.add.at(sums[rollout.step], who, values * np.array([1, 1, 1, 1, 0]))
        said = chance.random(requests) < spoken
        np.add.at(sums[rollout.step], who[said], values[said] * np.array([0, 0, 0, 0, 1]))
        np.add.at(voices[rollout.step], who[said], 1)
        found = outcomes(sums, voices, place, rollout)
        naive = naive or z_test(found)
        told = judge(found, rollout, CONFIG, float(number * 60))
        seen[told.action] += 1
        if told.action not in ("hold", "advance"):
            return Ended(told.action, number, len(np.unique(np.nonzero(sums[:, :, 0].sum(0))[0])), naive)
        if told.action == "advance":
            rollout = msgspec.structs.replace(rollout, step=rollout.step + 1, step_since=float(number * 60))
    return Ended("hold", looks, users, naive)


def outcomes(
    sums: NDArray[np.float64], voices: NDArray[np.float64], place: NDArray[np.float64], rollout: Rollout
) -> Outcomes:
    step, user = np.nonzero(sums[: rollout.step + 1, :, 0])
    unit, said = sums[step, user], voices[step, user]
    share = np.array(rollout.shares)[step]
    with np.errstate(invalid="ignore", divide="ignore"):
        feedback = np.where(said > 0, unit[:, 4] / said, math.nan)
    return Outcomes(
        step,
        place[user] < share,
        unit[:, 1] / unit[:, 0],
        unit[:, 2] / unit[:, 0],
        unit[:, 3] / unit[:, 0],
        feedback,
        user.astype(np.int64),
    )


def z_test(found: Outcomes) -> bool:
    """Return whether a two-sided test at 5 %, on the pooled feedback of all steps, finds a difference."""
    told = ~np.isnan(found.feedback)
    arms = [found.feedback[told & side] for side in (found.challenger, ~found.challenger)]
    if min(map(len, arms)) < 10:
        return False
    error = math.sqrt(sum(arm.var() / len(arm) for arm in arms))
    return error > 0 and abs(arms[0].mean() - arms[1].mean()) / error > 1.96


if __name__ == "__main__":
    main()
