"""How often a rollout ends wrongly, how soon it ends rightly: simulated users through the real `tasks.rollout.look`.

    python -m benchmarks.rollout [--runs 1000] [--power-runs 100]

Users come back, each with a quality, a pace and a readiness to give feedback of his own; the hour changes quality, latency and traffic.
A look every two hours, 80 of them, and the share rises as the looks allow. Two minutes and a half on one core.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import NamedTuple

import numpy as np

from ratchet.anytime import Floats, Ints
from ratchet.config import RolloutConfig
from ratchet.rollout import Rollout
from tasks.rollout import Columns, look

LOOKS, LOOK_HOURS = 80, 2.0
LIMIT_OF_1000 = 67  # 99 % binomial limit of a true 5 %
NAIVE_Z = 1.96


class End(NamedTuple):
    """`action` of the last look, at `hours`; `naive`: the usual test would have called a difference at one of the looks."""

    action: str
    hours: float
    naive: bool
    exposed: float  # share of the requests that the challenger answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="rollouts of an equal model")
    parser.add_argument("--power-runs", type=int, default=100, help="rollouts of each better or worse model")
    options = parser.parse_args()
    print_equal(options.runs)
    print_power(options.power_runs)
    print_harm(options.power_runs)


def print_equal(runs: int) -> None:
    started = time.perf_counter()
    ends = [simulate(seed, users=1500) for seed in range(runs)]
    wrong, naive = sum(is_wrong(end) for end in ends), sum(end.naive for end in ends)
    print(f"{runs} rollouts of an equal model, {LOOKS} looks each, 1500 users ({time.perf_counter() - started:.0f} s)\n")
    print("| test | ended wrongly |\n|---|---|")
    print(f"| Ratchet (alpha 0.05) | {wrong} of {runs} ({wrong / runs:.1%}): {_count([end.action for end in ends if is_wrong(end)])} |")
    print(f"| z-test at each look (alpha 0.05) | {naive} of {runs} ({naive / runs:.1%}) |\n")
    if runs == 1000:
        print(f"99 % limit: {LIMIT_OF_1000}; {'held' if wrong <= LIMIT_OF_1000 else 'BROKEN'}\n")


def print_power(runs: int) -> None:
    print("| better by | users | promoted | median hours | rolled back |\n|---|---|---|---|---|")
    for effect in (0.05, 0.10):
        for users in (1000, 2000, 4000, 8000) if effect < 0.1 else (1000, 2000, 4000):
            ends = [simulate(10_000 + seed, users=users, effect=effect) for seed in range(runs)]
            right = [end.hours for end in ends if end.action == "promote"]
            print(
                f"| {effect:+.2f} | {users} | {len(right) / runs:.0%} | {median(right) if right else float('nan'):.0f} | {sum(end.action == 'roll_back' for end in ends)} |",
                flush=True,
            )


def print_harm(runs: int) -> None:
    print("\n| harm | users | rolled back | median hours | 90 % within | answers from the challenger until then |\n|---|---|---|---|---|---|")
    for name, harm in (("feedback -0.10", {"effect": -0.10}), ("10 % more errors", {"errors": 0.10}), ("twice as slow", {"slower": 2.0})):
        ends = [simulate(20_000 + seed, users=2000, **harm) for seed in range(runs)]
        right = sorted(end.hours for end in ends if end.action == "roll_back")
        exposed = float(np.mean([end.exposed for end in ends]))
        told = f"{median(right):.0f} | {right[int(0.9 * (len(right) - 1))]:.0f}" if right else "- | -"
        print(f"| {name} | 2000 | {len(right) / runs:.0%} | {told} | {exposed:.1%} |", flush=True)


def is_wrong(end: End) -> bool:
    return end.action in ("promote", "roll_back", "stop")


class Population:
    """Regular users and what they met so far, in arrays (steps, users)."""

    def __init__(self, generator: np.random.Generator, users: int, shares: list[float]) -> None:
        self._random, self._shares = generator, shares
        self.position = generator.random(users)
        self._quality = generator.beta(6, 3, users)
        self._pace = generator.gamma(2.0, 0.05, users)  # visits an hour
        self._talks = generator.beta(2, 4, users)
        self._latency = generator.lognormal(5.5, 0.4, users)
        self.requests, self.errors, self.empty, self.latency, self.score, self.scores = (np.zeros((len(shares), users)) for _ in range(6))

    def pass_hours(self, hour: float, step: int, *, effect: float, errors: float, slower: float) -> None:
        """One look's worth of visits; each arm meets its own model."""
        day = np.sin(2 * np.pi * hour / 24)
        is_challenged = self.position < self._shares[step]
        visits = self._random.poisson(self._pace * LOOK_HOURS * (1 + 0.6 * day))
        came = np.flatnonzero(visits)
        count, challenged = visits[came], is_challenged[came]
        failed = self._random.binomial(count, 0.005 + errors * challenged)
        good = np.clip(self._quality[came] + 0.08 * day + effect * challenged, 0, 1)
        said = self._random.binomial(count, self._talks[came])
        self.requests[step, came] += count
        self.errors[step, came] += failed
        self.empty[step, came] += self._random.binomial(count, 0.01)
        self.latency[step, came] += count * self._latency[came] * (1 + 0.3 * day) * self._random.lognormal(0, 0.3, len(came)) * np.where(challenged, slower, 1)
        self.score[step, came] += self._random.binomial(said, good)
        self.scores[step, came] += said

    def columns(self) -> Columns:
        step, user = np.nonzero(self.requests)
        requests, scores = self.requests[step, user], self.scores[step, user]
        arm: Ints = (self.position[user] < np.array(self._shares)[step]).astype(np.int64)
        feedback = np.where(scores > 0, self.score[step, user] / np.maximum(scores, 1), np.nan)
        return Columns(user, step, arm, self.errors[step, user] / requests, self.empty[step, user] / requests, self.latency[step, user] / requests, feedback)


def simulate(seed: int, *, users: int, effect: float = 0.0, errors: float = 0.0, slower: float = 1.0, looks: int = LOOKS) -> End:
    """One rollout to its end, or through all its looks."""
    config = RolloutConfig()
    met = Population(np.random.default_rng(seed), users, config.steps)
    state = Rollout("r", "m", 2, 1, "", "", "salt", 0, config.steps, "open", 0.0, 0.0)
    naive = False
    for number in range(1, looks + 1):
        met.pass_hours((number - 1) * LOOK_HOURS, state.step, effect=effect, errors=errors, slower=slower)
        columns, now = met.columns(), number * LOOK_HOURS * 3600
        naive = naive or z_test(columns.arm, columns.feedback)
        verdict = look(columns, state, config, now, bounds=False)
        if verdict.action == "advance":
            state = step_up(state, now)
        elif verdict.action != "hold":
            break
    return End(verdict.action, number * LOOK_HOURS, naive, _exposed(met))


def step_up(state: Rollout, now: float) -> Rollout:
    import msgspec

    return msgspec.structs.replace(state, step=state.step + 1, step_since=now)


def z_test(arm: Ints, outcome: Floats) -> bool:
    """What one would do by habit: all users of both arms, 5 %, at each look."""
    groups = [outcome[(arm == number) & np.isfinite(outcome)] for number in (0, 1)]
    if min(len(group) for group in groups) < 30:
        return False
    error = np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups))
    return bool(abs(groups[1].mean() - groups[0].mean()) > NAIVE_Z * error)


def _exposed(met: Population) -> float:
    shares = np.array(met._shares)[:, None]
    return float(met.requests[met.position[None, :] < shares].sum() / met.requests.sum())


def _count(actions: list[str]) -> str:
    return ", ".join(f"{actions.count(action)} {action}" for action in sorted(set(actions))) or "none"


if __name__ == "__main__":
    main()
