"""Measure false alarms and power of the monitor's quality test: a judge on all requests, people on fifty a
day.

    python -m benchmarks.quality [--streams 1000] [--windows 500] [--glide FOLDER]

Simulated streams of 500 requests a day, of which 80 % are answered rightly, and judges of known kinds. Months
without a change are looked at each hour; months with a fall to 70 % tell the days until the alarm; single
windows of 500 are looked at once, after seven days without a change. Beside it, on the same streams: people
alone and the judge alone by a z-test of the last 24 hours against all before, Evidently's drift of a column
at its defaults, and GLIDE's `AsymptoticPPRM`, which is told the true share of 80 %.

GLIDE (PyPI: glide-py 0.11) wants a newer Python and scipy than this project. `--glide` names a folder with
its wheel unpacked (`pip download --no-deps --ignore-requires-python glide-py`, then `unzip`).
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit
from scipy.stats import binom, norm
from threadpoolctl import threadpool_limits

from ratchet.monitoring.quality import (
    LEAST,
    MONTH,
    Days,
    Labels,
    Values,
    choose,
    compare,
    find_fall,
    inclusion,
)

A_DAY, LABELS_A_DAY, HOURS = 500, 50, 24
BEFORE, AFTER, RATE = 0.8, 0.7, 0.05  # shares of right answers, and the rate of false alarms
KNOWN_DAYS = 7  # before a window
FALL_DAY, WATCHED = 14, 21  # a month with a fall: its first day, and days watched
PROCESSES = 2
Chance = np.random.Generator


class Judge(NamedTuple):
    """A judge: its score of right and wrong answers at a time from 0 to 1 of the month.

    `sensitivity` and `specificity` are the shares of right and wrong answers that it calls so.
    """

    sensitivity: float
    specificity: float
    later: float | None = None  # the sensitivity at the month's end, if it drifts
    graded: float = 0.0  # distance of the scores' two normal curves: it scores by degrees

    def score(self, right: Values, at: Values, chance: Chance) -> Values:
        if self.graded:
            place = chance.normal(np.where(right > 0, self.graded, -self.graded) / 2)
            return np.asarray(expit(self.graded * place + np.log(BEFORE / (1 - BEFORE))), dtype=np.float64)
        sensitivity = self.sensitivity + at * ((self.later or self.sensitivity) - self.sensitivity)
        drawn = chance.random(len(right))
        return np.where(right > 0, drawn < sensitivity, drawn >= self.specificity).astype(np.float64)


JUDGES = {
    "perfect": Judge(1.0, 1.0),
    "right in 95 %": Judge(0.95, 0.95),
    "right in 90 %": Judge(0.9, 0.9),
    "right in 90 %, by degrees": Judge(0.9, 0.9, graded=2.26),
    "right in 85 %": Judge(0.85, 0.85),
    "biased: calls half of the wrong ones right": Judge(0.97, 0.5),
    "drifting: calls 95 %, then 70 % of the right ones right": Judge(0.95, 0.85, later=0.7),
    "a coin": Judge(0.5, 0.5),
}
MONTHS = [
    "right in 90 %",
    "biased: calls half of the wrong ones right",
    "drifting: calls 95 %, then 70 % of the right ones right",
    "a coin",
]


class Stream(NamedTuple):
    """Requests in order: day and hour, whether the answer is right, the judge's score."""

    day: Any
    hour: Any
    right: Values
    score: Values


def stream(judge: Judge, chance: Chance, days: int, falls_on: int | None = None) -> Stream:
    place = np.arange(days * A_DAY)
    day = place // A_DAY
    share = np.where(day >= (days if falls_on is None else falls_on), AFTER, BEFORE)
    right = (chance.random(len(place)) < share).astype(np.float64)
    score = judge.score(right, place / (MONTH * A_DAY), chance)
    return Stream(day, place * HOURS // A_DAY, right, score)


def hours(found: Stream, chance: Chance) -> Iterator[tuple[int, Days, Labels]]:
    """Ask about each hour's requests as the monitor does, and yield what is known after each hour."""
    edges = np.searchsorted(found.hour, np.arange(found.hour[-1] + 2))
    days, labels = int(found.day[-1]) + 1, Labels(np.zeros(0, int), *[np.zeros(0)] * 3)
    requests, scores = np.zeros(days), np.zeros(days)
    for hour, (start, end) in enumerate(pairwise(edges)):
        score = found.score[start:end]
        chances = inclusion(score, labels, LABELS_A_DAY / HOURS)
        chosen = choose(score, chances, chance)
        new = (found.day[start:end], score, found.right[start:end], chances)
        labels = Labels(*(np.concatenate([old, more[chosen]]) for old, more in zip(labels, new, strict=True)))
        requests[hour // HOURS] += end - start
        scores[hour // HOURS] += score.sum()
        today = hour // HOURS + 1
        yield hour + 1, Days(requests[:today].copy(), scores[:today].copy()), labels


# --- months -------------------------------------------------------------------------------------------------


class Month(NamedTuple):
    """The hours of the first alarm, 0 for none; `glide` in days."""

    ours: int
    people: int
    judge: int
    glide: int


def month(name: str, falls_on: int | None, glide: str, number: int) -> Month:
    chance = np.random.default_rng([number, len(name), 0 if falls_on is None else 1])
    found = stream(JUDGES[name], chance, MONTH if falls_on is None else WATCHED, falls_on)
    ours = people = judged = 0
    for hour, days, labels in hours(found, chance):
        if hour <= HOURS:
            continue
        now, last = days, labels
        if not ours and (fall := find_fall(now, last, rate=RATE)) and fall.alarm:
            ours = hour
        edge = np.searchsorted(found.hour, hour - HOURS)
        end = np.searchsorted(found.hour, hour)
        judged = judged or hour * fell(found.score[edge:end], found.score[:edge])
        asked = LABELS_A_DAY * (hour - HOURS) // HOURS  # people alone are asked about any, fifty a day
        said = found.right[:: A_DAY // LABELS_A_DAY]
        if asked >= LEAST:
            people = people or hour * fell(said[asked : asked + LABELS_A_DAY], said[:asked])
        if ours and people and judged:
            break
    return Month(ours, people, judged, glide_alarm(found, glide) if glide else 0)


def fell(now: Values, before: Values) -> bool:
    """Return whether a one-sided z-test finds a lower mean."""
    spread = np.sqrt(now.var() / len(now) + before.var() / len(before))
    return bool(spread > 0 and (before.mean() - now.mean()) / spread > norm.isf(RATE))


def glide_alarm(found: Stream, folder: str, start: int = 0) -> int:
    """Return the day on which GLIDE alarms, asked each day; 0: it does not."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from glide.monitors import AsymptoticPPRM

    asked = np.arange(len(found.right)) % (A_DAY // LABELS_A_DAY) == 0
    late = found.day >= start
    said = AsymptoticPPRM().detect(
        np.where(asked, found.right, np.nan)[late],
        found.score[late],
        found.day[late],
        higher_is_better=True,
        threshold=BEFORE,
        confidence_level=1 - RATE,
        power_tuning=bool(found.score.std() > 0),
    )
    return 0 if said.first_alarm_index is None else int(said.first_alarm_index) + 1


# --- windows ------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Whether a fall is found, by one look at one window."""

    ours: bool
    people: bool
    judge: bool
    glide: bool


def window(name: str, fallen: bool, glide: str, number: int) -> Window:
    chance = np.random.default_rng([number, len(name), 2])
    found = stream(JUDGES[name], chance, KNOWN_DAYS + 1, KNOWN_DAYS if fallen else None)
    *_, (_, days, labels) = hours(found, chance)
    difference = compare(days, labels, KNOWN_DAYS)
    late = found.day == KNOWN_DAYS
    asked = np.arange(len(late)) % (A_DAY // LABELS_A_DAY) == 0
    return Window(
        -difference.mean / np.sqrt(difference.variance) > norm.isf(RATE),
        fell(found.right[asked & late], found.right[asked & ~late]),
        fell(found.score[late], found.score[~late]),
        bool(glide and glide_alarm(found, glide, KNOWN_DAYS)),
    )


def evidently_says(name: str, fallen: bool, number: int) -> tuple[bool, bool]:
    """Return whether Evidently finds drift in people's answers, and in the judge's scores."""
    import pandas as pd
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    chance = np.random.default_rng([number, len(name), 2])
    found = stream(JUDGES[name], chance, KNOWN_DAYS + 1, KNOWN_DAYS if fallen else None)
    late = found.day == KNOWN_DAYS
    asked = np.arange(len(late)) % (A_DAY // LABELS_A_DAY) == 0
    said = []
    for values, rows in ((found.right, asked), (found.score, np.ones_like(asked))):
        sides = [
            Dataset.from_pandas(
                pd.DataFrame({"value": values[rows & side]}),
                data_definition=DataDefinition(numerical_columns=["value"]),
            )
            for side in (late, ~late)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = Report([ValueDrift(column="value")], include_tests=True).run(*sides).dict()
        said.append(report["tests"][0]["status"] == "FAIL")
    return said[0], said[1]


def bound(judge: Judge, labels: int, *, draws: int = 400_000) -> float:
    """Return the power of the best test of a window at RATE, where the past is known exactly.

    No estimate that is right whatever the judge's errors has less variance than
    E[sd(right | score)]^2 / labels + Var(E[right | score]) / requests (Hahn 1998, with Neyman's choice).
    """
    chance, errors = np.random.default_rng(0), []
    for share in (BEFORE, AFTER):
        right = (chance.random(draws) < share).astype(np.float64)
        score = judge.score(right, np.full(draws, KNOWN_DAYS / MONTH), chance)
        bins = np.unique(np.digitize(score, np.quantile(score, np.linspace(0, 1, 60))), return_inverse=True)[
            1
        ]
        count = np.bincount(bins)
        mean = np.bincount(bins, weights=right) / count
        spread, weight = np.sqrt(mean * (1 - mean)), count / draws
        between = float((weight * (mean - share) ** 2).sum())
        errors.append(np.sqrt(float((weight * spread).sum()) ** 2 / labels + between / A_DAY))
    return float(norm.cdf((BEFORE - AFTER - norm.isf(RATE) * errors[0]) / errors[1]))


# --- the tables ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=1000, help="months without a change, of each judge")
    parser.add_argument("--windows", type=int, default=500, help="windows of each judge")
    parser.add_argument("--evidently", type=int, default=100, help="of them for Evidently")
    parser.add_argument("--glide", default="", help="folder with GLIDE's package; without it no GLIDE")
    options = parser.parse_args()
    glide = str(Path(options.glide).resolve()) if options.glide else ""
    started = time.perf_counter()
    with threadpool_limits(1), get_context("fork").Pool(PROCESSES) as pool:
        each = partial(_each, pool)
        tell_windows(each, options.windows, options.evidently, glide)
        tell_months(each, options.streams, glide)
    limit = binom.ppf(0.99, options.streams, RATE) / options.streams
    print(f"\nThe binomial 99 % limit of {RATE:.0%} in {options.streams} months is {limit:.1%}.")
    print(f"{time.perf_counter() - started:.0f} s, {PROCESSES} processes.")


Each = Callable[[Callable[[int], Any], int], list[Any]]


def _each(pool: Any, function: Callable[[int], Any], count: int) -> list[Any]:
    return list(pool.map(function, range(count), chunksize=5))


def tell_windows(each: Each, count: int, evidently: int, glide: str) -> None:
    print(
        f"One look at a window of {A_DAY} with {LABELS_A_DAY} labels, at {RATE:.0%} a window: alarms without"
    )
    print(f"a change; with a fall from {BEFORE:.0%} to {AFTER:.0%}. {count} windows.\n")
    print(
        "| judge | this monitor | best possible | labels for 90 % | people alone | judge alone"
        " | Evidently, people | Evidently, judge | GLIDE |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, judge in JUDGES.items():
        told = [each(partial(window, name, fallen, glide), count) for fallen in (False, True)]
        ours, people, judged, other = pair(
            [np.mean(part) for part in zip(*side, strict=True)] for side in told
        )
        theirs = [each(partial(evidently_says, name, fallen), evidently) for fallen in (False, True)]
        evident = pair([np.mean(part) for part in zip(*side, strict=True)] for side in theirs)
        enough = next((n for n in range(10, A_DAY + 1, 5) if bound(judge, n) >= 0.9), None)
        print(
            f"| {name} | {ours} | {bound(judge, LABELS_A_DAY):.0%} | {enough} | {people} | {judged} |"
            f" {evident[0]} | {evident[1]} | {other if glide else 'not here'} |",
            flush=True,
        )


def pair(sides: Any) -> list[str]:
    return [f"{null:.1%}; {found:.0%}" for null, found in zip(*sides, strict=True)]


def tell_months(each: Each, count: int, glide: str) -> None:
    print(f"\nMonths looked at each hour (GLIDE: each day), at {RATE:.0%} a month: {count} without a change,")
    print(f"{count // 5} with a fall after {FALL_DAY} days.\n")
    print(
        "| judge | months with an alarm | fall found in 1, 3, 5, 7 days | people alone, with an alarm"
        " | judge alone | GLIDE, with an alarm | GLIDE, found in 7 days |\n|---|---|---|---|---|---|---|"
    )
    for name in MONTHS:
        still = each(partial(month, name, None, glide), count)
        moved = each(partial(month, name, FALL_DAY, glide), count // 5)
        alarms = [f"{np.mean([part > 0 for part in column]):.1%}" for column in zip(*still, strict=True)]
        waited = [one.ours - FALL_DAY * HOURS for one in moved if one.ours > FALL_DAY * HOURS]
        in_days = ", ".join(f"{sum(w <= d * HOURS for w in waited) / len(moved):.0%}" for d in (1, 3, 5, 7))
        theirs = np.mean([FALL_DAY < one.glide <= FALL_DAY + 7 for one in moved])
        print(
            f"| {name} | {alarms[0]} | {in_days} | {alarms[1]} | {alarms[2]} |"
            f" {f'{alarms[3]} | {theirs:.0%}' if glide else 'not here | '} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
