"""Test a claimed ε from outside, with the canaries of a single training (Steinke et al. 2023, arXiv
2305.08846).

Each of m canaries is planted with probability one half. From the finished model one guesses for some of them
whether they were planted. Where ε holds, each guess is right with probability e^ε / (1 + e^ε) at most, so
many right guesses refute the claim. The bound says nothing about what a better attack would find: a low one
is no proof, a high one is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)  # of the canaries that are guessed as planted, and as many as not
HIGHEST = 50.0  # ε of which no audit of feasible size can tell more
ROUNDS = 24  # of the bisection


class Bound(NamedTuple):
    """The lower bound of ε, and the guesses from which it follows."""

    epsilon: float
    guesses: int
    right: int


def lower_bound(
    scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_], *, delta: float, alpha: float
) -> Bound:
    """Return a lower bound of ε that is too high with probability `alpha` at most.

    `scores`, (canaries,), are higher where the model knows a canary better; `planted`, (canaries,), was drawn
    independently with probability one half. The numbers of guesses are fixed beforehand and share `alpha`.
    """
    order = np.argsort(-scores, kind="stable")
    total, found = len(scores), Bound(0.0, 0, 0)
    for share in SHARES:
        side = min(max(1, round(share * total)), total // 2)
        right = int(planted[order[:side]].sum() + (~planted[order[total - side :]]).sum())
        epsilon = _bound(total, 2 * side, right, delta, alpha / len(SHARES))
        if epsilon >= found.epsilon:
            found = Bound(epsilon, 2 * side, right)
    return found


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the probability, at most, of so many right guesses under (ε, δ) (theorem 5.2)."""
    chance = 1 / (1 + math.exp(-epsilon))
    below = stats.binom.pmf(np.arange(right - 1, -1, -1), guesses, chance)  # right - 1, right - 2, … of them
    slack = float((np.cumsum(below) / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(stats.binom.sf(right - 1, guesses, chance)) + 2 * canaries * delta * slack)


def _bound(canaries: int, guesses: int, right: int, delta: float, alpha: float) -> float:
    if p_value(canaries, guesses, right, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, HIGHEST
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) <= alpha:
            low = middle
        else:
            high = middle
    return low
