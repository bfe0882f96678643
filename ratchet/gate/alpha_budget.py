"""Count the candidates that were judged against a champion, and spend an alpha budget over these looks.

`reports/looks.json` is in git and an input of the gate: champion's version → run keys of the candidates that
were judged against it. A retraining writes it from the last verdict before it trains, so that the gate itself
only reads files.
"""

from __future__ import annotations

import math
from pathlib import Path

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.files import read_json
from ratchet.promotion.verdict import Verdict

FILE = Path("reports/looks.json")
POWER = 1.2  # of the spending: slow enough that the thirtieth look still has a chance
ALL_LOOKS = 5.591582441177751  # the sum of k ** -1.2 over all k
Looks = dict[str, list[str]]


def read_looks(path: Path) -> Looks:
    """Raises RatchetError: no file, or one that holds something else."""
    found = read_json(path)
    judged = found.get("judged") if isinstance(found, dict) else None
    if not isinstance(judged, dict) or not all(isinstance(keys, list) for keys in judged.values()):
        raise RatchetError(
            f"{path} holds no looks", remedy=f"git checkout HEAD -- {FILE}; retrainings write it"
        )
    return judged


def with_verdict(looks: Looks, verdict: Verdict) -> Looks:
    """Add the look that `reports/gate.json` tells of.

    A candidate that is judged twice against the same champion is one look.
    """
    rival, key = name_of(verdict.rival.version), verdict.candidate.run_key
    known = looks.get(rival, [])
    return looks if key in known else {**looks, rival: [*known, key]}


def look_number(looks: Looks, version: int | None, run_key: str = "") -> int:
    """1 for the first candidate against that champion."""
    return len([key for key in looks.get(name_of(version), []) if key != run_key]) + 1


def alpha_of(look: int, config: GateConfig) -> float:
    """Return the error of look k: budget * k ** -1.2 / 5.59, and never more than `gate.alpha`.

    So all looks together spend at most the budget, however many there are.
    """
    return min(config.alpha, config.alpha_budget / (math.pow(look, POWER) * ALL_LOOKS))


def name_of(version: int | None) -> str:
    return "base" if version is None else str(version)
