"""Count the candidates that were judged against each champion, and divide an alpha budget between these
looks.

`reports/looks.json` is in git and an input of the gate. It maps a champion's version to the run keys of the
candidates that were judged against it. A retraining adds the last verdict to the file before it trains, so
the gate itself only reads files.
"""

from __future__ import annotations

import math
from pathlib import Path

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.files import read_json
from ratchet.promotion.verdict import Verdict

FILE = Path("reports/looks.json")
POWER = (
    1.2  # look k gets a share of k ** -1.2: small enough a power that the thirtieth look still has a chance
)
ALL_LOOKS = (
    5.591582441177751  # sum of k ** -1.2 over all k (the zeta function of 1.2): the shares add up to 1
)
Looks = dict[str, list[str]]


def read_looks(path: Path) -> Looks:
    """Read the looks of each champion.

    Raises RatchetError when there is no file, or it holds something else.
    """
    found = read_json(path)
    judged = found.get("judged") if isinstance(found, dict) else None
    if not isinstance(judged, dict) or not all(isinstance(keys, list) for keys in judged.values()):
        raise RatchetError(
            f"{path} holds no looks", remedy=f"git checkout HEAD -- {FILE}; retrainings write it"
        )
    return judged


def with_verdict(looks: Looks, verdict: Verdict) -> Looks:
    """Add the look that `reports/gate.json` records.

    A candidate that is judged twice against the same champion counts as one look.
    """
    rival, key = name_of(verdict.rival.version), verdict.candidate.run_key
    known = looks.get(rival, [])
    return looks if key in known else {**looks, rival: [*known, key]}


def look_number(looks: Looks, version: int | None, run_key: str = "") -> int:
    """Return the number of this look at a candidate against that champion; the first is 1.

    The candidate's own run key is left out, so judging it again gives the same number.
    """
    return len([key for key in looks.get(name_of(version), []) if key != run_key]) + 1


def alpha_of(look: int, config: GateConfig) -> float:
    """Return the error of look k: budget * k ** -1.2 / 5.59, and at most `gate.alpha`.

    The errors of all looks together stay within the budget, however many looks there are.
    """
    return min(config.alpha, config.alpha_budget / (math.pow(look, POWER) * ALL_LOOKS))


def name_of(version: int | None) -> str:
    return "base" if version is None else str(version)
