"""Count the candidates that were judged against each champion, and divide an alpha budget between these
looks.

`reports/looks.json` is in git and an input of the gate. It maps a champion's version to the run keys of the
candidates that were judged against it, each with a key of the rows that it was judged on: the same candidate
on more rows is a further look. A retraining adds the last verdict to the file before it trains, so the gate
itself only reads files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.files import read_json, sha256_json
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

    A candidate that is judged twice on the same rows against the same champion counts as one look; on other
    rows it is another look.
    """
    rival, rows = name_of(verdict.rival.version), verdict.look.rows if verdict.look else ""
    known, entry = looks.get(rival, []), entry_of(verdict.candidate.run_key, rows)
    return looks if entry in known else {**looks, rival: [*known, entry]}


def look_number(looks: Looks, version: int | None, run_key: str = "", rows: str = "") -> int:
    """Return the number of this look at a candidate against that champion; the first is 1.

    `rows`: see `rows_key`. The candidate's own look at these rows is left out, so judging it again gives the
    same number.
    """
    own = _own(run_key, rows)
    return len([entry for entry in looks.get(name_of(version), []) if entry not in own]) + 1


def looks_before(looks: Looks, version: int | None, run_key: str, rows: str) -> int:
    """Return how often this candidate was judged against that champion on other rows."""
    own = _own(run_key, rows)
    entries = looks.get(name_of(version), [])
    return sum(entry.partition("@")[0] == run_key and entry not in own for entry in entries)


def _own(run_key: str, rows: str) -> set[str]:
    return {run_key, entry_of(run_key, rows)}  # files of older versions hold the run key alone


def entry_of(run_key: str, rows: str) -> str:
    return f"{run_key}@{rows}" if rows else run_key


def rows_key(ids: Iterable[str]) -> str:
    """Return a key of the rows that a look judges, whatever their order."""
    return sha256_json(sorted(set(ids)))[:16]


def alpha_of(look: int, config: GateConfig) -> float:
    """Return the error of look k: budget * k ** -1.2 / 5.59, and at most `gate.alpha`.

    The errors of all looks together stay within the budget, however many looks there are.
    """
    return min(config.alpha, config.alpha_budget / (math.pow(look, POWER) * ALL_LOOKS))


def name_of(version: int | None) -> str:
    return "base" if version is None else str(version)
