"""Let every rule judge every pair, in processes, and count."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from benchmarks.gatebench.judging import Rule, ask, load_rule
from benchmarks.gatebench.pairs import EQUAL, GAIN, LOSS, SPOILT, Case, Pool, farthest, make_table, read_pool

LOSSES = (1.0, 3.0, 5.0, 10.0, 20.0)
GAINS = (1.0, 2.0, 3.0, 5.0, 10.0)
CHUNK = 20  # pairs that a process takes at once


class Study(NamedTuple):
    """Sizes of the test sets, and pairs at each size: equal ones, of each loss and gain, and spoilt ones."""

    sizes: tuple[int, ...]
    equal: int
    repeats: int
    spoilt: int


FULL = Study((50, 100, 200, 400, 800, 1200, 2000), 400, 50, 40)
QUICK = Study((50, 100), 8, 2, 5)


class Cell(NamedTuple):
    """What a rule said to pairs of one kind on test sets of one size."""

    rule: str
    kind: str
    points: float
    rows: int
    pairs: int
    promoted: int
    faults: int = 0  # verdicts that failed; nothing was promoted
    fault: str = ""  # the first of them

    def plus(self, other: Cell) -> Cell:
        return self._replace(
            pairs=self.pairs + other.pairs,
            promoted=self.promoted + other.promoted,
            faults=self.faults + other.faults,
            fault=self.fault or other.fault,
        )


def cases_of(study: Study, pool: Pool) -> list[Case]:
    """List all pairs, the largest test sets first. Effects that the models cannot make are left out."""
    reach = farthest(pool)
    kinds = [
        (EQUAL, 0.0, study.equal),
        *((LOSS, points, study.repeats) for points in LOSSES if points <= reach),
        *((GAIN, points, study.repeats) for points in GAINS if points <= reach),
        (SPOILT, 0.0, study.spoilt),
    ]
    return [
        Case(kind, points, rows, number)
        for rows in sorted(study.sizes, reverse=True)
        for kind, points, count in kinds
        for number in range(count)
    ]


def measure(path: Path, rules: Sequence[Path], study: Study, jobs: int) -> list[Cell]:
    """Return the cells of every rule, from the table of scores in `path`."""
    cases = cases_of(study, _pool(path))
    chunks = [cases[start : start + CHUNK] for start in range(0, len(cases), CHUNK)]
    found: dict[tuple[str, str, float, int], Cell] = {}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as executor:
        parts = executor.map(judge_chunk, [path] * len(chunks), [tuple(rules)] * len(chunks), chunks)
        for cell in (cell for part in parts for cell in part):
            key = (cell.rule, cell.kind, cell.points, cell.rows)
            found[key] = found[key].plus(cell) if key in found else cell
    return sorted(found.values(), key=lambda cell: [rule.stem for rule in rules].index(cell.rule))


def judge_chunk(path: Path, rules: tuple[Path, ...], cases: list[Case]) -> list[Cell]:
    found: dict[tuple[str, Case], Cell] = {}
    for case in cases:
        table = make_table(_pool(path), case)
        for rule in _rules(rules):
            key = (rule.name, case._replace(number=0))
            said = ask(rule, table)
            counts = 1, int(said.promoted), int(bool(said.fault)), said.fault
            cell = Cell(rule.name, case.kind, case.points, case.rows, *counts)
            found[key] = found[key].plus(cell) if key in found else cell
    return list(found.values())


@cache
def _pool(path: Path) -> Pool:
    return read_pool(path)


@cache
def _rules(paths: tuple[Path, ...]) -> list[Rule]:
    return [load_rule(path) for path in paths]


def left_out(cells: Sequence[Cell]) -> Iterator[str]:
    """Name the effects that the models could not make."""
    made = {(cell.kind, cell.points) for cell in cells}
    for kind, all_points in ((LOSS, LOSSES), (GAIN, GAINS)):
        if missing := [f"{points:g}" for points in all_points if (kind, points) not in made]:
            yield f"{kind} of {', '.join(missing)} points"
