"""A rollout on simulated users, judged by the project's own sequential test at each look."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from benchmarks.loopbench.world import USERS
from benchmarks.rollout import outcomes
from ratchet.config.monitoring import RolloutConfig
from ratchet.promotion.rollout import Rollout
from tasks.rollout import judge

CONFIG = RolloutConfig()
SPOKEN = 0.5  # share of the requests with feedback
TICK_SECONDS = 3.5 * 86_400


class Trial:
    """One open rollout of a challenger; `action` is how it ended, empty while it is open."""

    def __init__(self, challenger: int, champion: int, opened: float, seed: int) -> None:
        self.action = ""
        self._chance = np.random.default_rng([22, seed])
        self._place = self._chance.random(USERS)
        self._rollout = Rollout(
            *("trial", "loopbench", challenger, champion, "", "", "salt", 0),
            list(CONFIG.steps),
            "open",
            opened,
            opened,
        )
        self._sums = np.zeros((len(CONFIG.steps), USERS, 5))
        self._voices = np.zeros((len(CONFIG.steps), USERS))

    def treats(self, users: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which users the challenger answers now."""
        return self._place[users] < self._rollout.share

    def look(
        self, users: NDArray[np.int64], right: NDArray[np.bool_], empty: NDArray[np.bool_], now: float
    ) -> str:
        """Add the requests since the last look, and return what the look decides."""
        count = len(users)
        latency = self._chance.normal(5, 0.5, count)
        values = np.stack([np.ones(count), np.zeros(count), empty, latency, right], axis=1).astype(float)
        step = self._rollout.step
        np.add.at(self._sums[step], users, values * np.array([1, 1, 1, 1, 0]))
        said = self._chance.random(count) < SPOKEN
        np.add.at(self._sums[step], users[said], values[said] * np.array([0, 0, 0, 0, 1]))
        np.add.at(self._voices[step], users[said], 1)
        found = outcomes(self._sums, self._voices, self._place, self._rollout)
        action = judge(found, self._rollout, CONFIG, now).action
        if action == "advance":
            self._rollout = replace(self._rollout, step=step + 1, step_since=now)
        elif action != "hold":
            self.action = action
        return action
