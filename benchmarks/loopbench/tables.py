"""The table: for each policy the median and the range over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.loopbench.scores import Score
from benchmarks.loopbench.world import Size

COLUMNS: dict[str, tuple[Callable[[Score], float], str]] = {
    "right answers": (lambda score: score.right, ".1%"),
    "regret": (lambda score: score.regret, ".1%"),
    "trainings": (lambda score: score.trainings, ".0f"),
    "rows trained": (lambda score: score.rows, ",.0f"),
    "seconds of training": (lambda score: score.seconds, ".0f"),
    "promotions": (lambda score: score.promotions, ".0f"),
    "wrong": (lambda score: score.wrong, ".0f"),
    "poisoned answers": (lambda score: score.poisoned, ".0%"),
    "weeks with erased rows": (lambda score: score.unerased / 2, "g"),
}


def tables(found: Sequence[Score], size: Size) -> Iterator[str]:
    seeds = sorted({score.seed for score in found})
    over = f"{len(seeds)} seeds; median and range over seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    yield f"{size.weeks} weeks, {over}"
    yield ""
    yield f"| policy | {' | '.join(COLUMNS)} | ahead of weekly |"
    yield f"|{'---|' * (len(COLUMNS) + 2)}"
    weekly = {score.seed: score.right for score in found if score.policy == "weekly"}
    for name in dict.fromkeys(score.policy for score in found):
        mine = [score for score in found if score.policy == name]
        cells = [cell([value(score) for score in mine], form) for value, form in COLUMNS.values()]
        if name == "oracle":  # it trains and promotes nothing
            cells[2:] = [""] * len(cells[2:])
        ahead = sum(score.right > weekly[score.seed] for score in mine if score.seed in weekly)
        told = f"{ahead} of {len(mine)}" if weekly and name != "weekly" else ""
        yield f"| {mine[0].told} | {' | '.join(cells)} | {told} |"


def cell(values: Sequence[float], form: str) -> str:
    """Return the median and, where it is no point, the range."""
    low, middle, high = (
        format(one, form).replace("%", " %") for one in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low} to {high})"
