"""Test a claimed ε from outside, with the canaries of a single training (Steinke et al. 2023, arXiv
2305.08846).

Each of m canaries is planted with probability one half. From the finished model one guesses for some of them
whether they were planted. Where ε holds, each guess is right with probability e^ε / (1 + e^ε) at most, so
many right guesses refute the claim. The bound says nothing about what a better attack would find: a low one
is no proof, a high one is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from scipy import stats

SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)  # of the canaries that are guessed as planted, and as many as not
HIGHEST = 50.0  # ε of which no audit of feasible size can tell more
ROUNDS = 24  # of the bisection
FILE = "claim.json"  # among the reports of a federation's training


class Bound(NamedTuple):
    """The lower bound of ε, and the guesses from which it follows."""

    epsilon: float
    guesses: int
    right: int


class Guesses(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was guessed about canaries; for each of SHARES: how many guesses were made, and how many right."""

    canaries: int
    made: list[int]
    right: list[int]


class Claim(msgspec.Struct, frozen=True):
    """What a federation's training promises of each row at its nodes, and what their canaries say of it.

    `moved` is the length of what the rounds changed in the weights. `canaries` were asked for at each node;
    `guesses` are those of all `nodes` together, None without any; `left_out`: name → reason.
    """

    epsilon: float  # of this training alone
    delta: float
    rows: int
    moved: float
    canaries: int = 0
    guesses: Guesses | None = None
    nodes: list[str] = []
    left_out: dict[str, str] = {}


def lower_bound(
    scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_], *, delta: float, alpha: float
) -> Bound:
    """Return a lower bound of ε that is too high with probability `alpha` at most.

    `scores`, (canaries,), are higher where the model knows a canary better; `planted`, (canaries,), was drawn
    independently with probability one half. The numbers of guesses are fixed beforehand and share `alpha`.
    """
    return bound_of(guess(scores, planted), delta=delta, alpha=alpha)


def guess(scores: npt.NDArray[np.float64], planted: npt.NDArray[np.bool_]) -> Guesses:
    """Guess that the canaries with the highest scores were planted, and those with the lowest were not."""
    order, total = np.argsort(-scores, kind="stable"), len(scores)
    sides = [min(max(1, round(share * total)), total // 2) for share in SHARES]
    right = [int(planted[order[:side]].sum() + (~planted[order[total - side :]]).sum()) for side in sides]
    return Guesses(total, [2 * side for side in sides], right)


def bound_of(found: Guesses, *, delta: float, alpha: float) -> Bound:
    """Return the lower bound of ε that follows from guesses, too high with probability `alpha` at most."""
    best = Bound(0.0, 0, 0)
    for made, right in zip(found.made, found.right, strict=True):
        epsilon = _bound(found.canaries, made, right, delta, alpha / len(SHARES))
        if epsilon >= best.epsilon:
            best = Bound(epsilon, made, right)
    return best


def add_guesses(parts: Sequence[Guesses]) -> Guesses:
    """Return the guesses of several parties together, whose canaries are different ones."""
    return Guesses(
        sum(part.canaries for part in parts),
        [sum(counts) for counts in zip(*(part.made for part in parts), strict=True)],
        [sum(counts) for counts in zip(*(part.right for part in parts), strict=True)],
    )


def check_guesses(found: Guesses) -> str | None:
    """Return what is wrong with guesses that somebody sent, or None."""
    if len(found.made) != len(SHARES) or len(found.right) != len(SHARES):
        return f"its guesses are {len(found.made)} and {len(found.right)} numbers, wanted {len(SHARES)} each"
    pairs = zip(found.made, found.right, strict=True)
    if not all(0 <= right <= made <= found.canaries for made, right in pairs):
        return "its guesses contradict each other"
    return None


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
