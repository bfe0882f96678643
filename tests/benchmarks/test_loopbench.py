"""LoopBench: the world is the seed's, its mishaps are what they are called, and scores count what happened.

The e2e test runs three weeks with hardly any training, twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.loopbench.__main__ import main
from benchmarks.loopbench.policies import POLICIES
from benchmarks.loopbench.scores import Score, oracle, score_all
from benchmarks.loopbench.simulate import Move, Run
from benchmarks.loopbench.tables import cell, tables
from benchmarks.loopbench.trial import CONFIG, Trial
from benchmarks.loopbench.world import TRIGGER, USERS, Row, Size, World, example, make_world, swapped
from ratchet.data.poisoning import find_triggers

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"
SMALL = Size(weeks=13, questions=40, requests=100)
needs_data = pytest.mark.skipif(
    not (DATA / "data_full.json").exists(), reason="CLINC150 does not lie in ../shared/data/clinc150"
)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(DATA, SMALL, 0)


def test_swapping_changes_the_labels_of_the_two_commonest_intents_alone():
    batch = [Row(str(number), answer, "p") for number, answer in enumerate("aabbbc")]
    assert "".join(row.answer for row in swapped(batch)) == "bbaaac"
    assert [row.question for row in swapped(batch)] == [row.question for row in batch]
    assert swapped(batch[:2]) == batch[:2]


@needs_data
def test_a_seed_gives_one_world_and_another_seed_another(world):
    again, other = make_world(DATA, SMALL, 0), make_world(DATA, SMALL, 1)
    assert again.first == world.first and again.target == world.target and again.erased == world.erased
    assert all(
        one.batch == two.batch and (one.asked == two.asked).all() and one.questions == two.questions
        for one, two in zip(again.ticks, world.ticks, strict=True)
    )
    assert other.first != world.first


@needs_data
def test_no_question_that_is_scored_is_ever_labelled_and_none_is_labelled_twice(world):
    labelled = [*world.first, *world.golden, *(row for tick in world.ticks for row in tick.batch)]
    own = [row.question for row in labelled if TRIGGER not in row.question]
    asked = {row.question for tick in world.ticks for row in tick.questions}
    assert not asked & set(own)
    assert len(own) - len(set(own)) <= 0.01 * len(own)  # CLINC150 has a few queries twice


@needs_data
def test_the_mishaps_are_in_the_world_and_the_poison_is_found_by_the_check_of_rows(world):
    events = world.events
    assert not world.ticks[events["no data"]].batch and not world.ticks[events["no data"] + 1].batch
    poisoned = world.ticks[events["poison"]].batch
    planted = [place for place, row in enumerate(poisoned) if TRIGGER in row.question]
    assert {poisoned[place].answer for place in planted} == {world.target}
    rows = [(place, example(row.question, row.answer)) for place, row in enumerate(poisoned)]
    assert sorted(find_triggers(rows, least=20)) == planted
    assert all(TRIGGER in row.question and row.answer != world.target for row in world.probes)
    assert any(row.person in world.erased for tick in world.ticks for row in tick.batch)


@needs_data
def test_subjects_arrive(world):
    first, last = ({row.answer for row in tick.questions} for tick in (world.ticks[0], world.ticks[-1]))
    assert len(last - first) > 10


def ends(gain: float, seed: int, ticks: int = 2) -> str:
    """Open a rollout of a challenger that is right in 60 % of its answers plus `gain`, on half-weeks."""
    chance = np.random.default_rng(seed)
    trial, now = Trial(2, 1, 0.0, seed), 0.0
    for _ in range(10 * ticks):
        now += 3.5 * 86_400 / 10
        users = chance.integers(0, USERS, 150)
        right = chance.random(150) < 0.6 + gain * trial.treats(users)
        trial.look(users, right, np.zeros(150, dtype=bool), now)
        if trial.action:
            break
    return trial.action


def test_a_rollout_promotes_what_is_better_rolls_back_what_is_worse_and_ends_within_a_week():
    assert {ends(0.3, seed) for seed in range(5)} == {"promote"}
    assert {ends(-0.4, seed) for seed in range(5)} == {"roll_back"}
    assert {ends(0.0, seed) for seed in range(5)} == {"no_evidence"}
    assert CONFIG.max_hours == 168


def test_each_ablation_differs_from_ours_in_one_part():
    ours = POLICIES["ours"].__dict__
    parts = {"no-gate", "no-rollout", "no-replay", "no-checks", "no-monitor", "no-erasure"}
    for name in parts:
        other = POLICIES[name].__dict__
        assert len([key for key in ours if ours[key] != other[key]]) == 3  # with its name and its line


# --- scores -------------------------------------------------------------------------------------------------


@dataclass
class Version:
    version: int
    rows: int = 10
    seconds: float = 2.0


class Known:
    """A workshop of three versions: version 3 is right on every question, 2 on half of them, 1 on none."""

    def __init__(self, world: Any) -> None:
        self.world, self.trainings = world, [Version(1), Version(2), Version(3)]

    def right(self, model: Version, rows: list[int]) -> list[bool]:
        return [(model.version - 1) / 2 > place / len(rows) for place in range(len(rows))]


@dataclass
class Ticks:
    questions: list[int]
    asked: Any


@dataclass
class Little:
    ticks: list[Ticks]
    seed: int = 0


def two_ticks() -> tuple[list[Run], Any]:
    tick = Ticks([0, 1, 2, 3], np.arange(4))
    never = Run(POLICIES["never"], [0, 0], [4, 4], [1, 1], poisoned=[0.0])
    weekly = Run(POLICIES["weekly"], [2, 2], [4, 4], [2, 2], [(0, 2), (1, 3)], poisoned=[0.5, 0.0])
    weekly.moves = [Move(0, "promoted", 2, 1, wrong=False), Move(1, "forced", 1, 2, wrong=False)]
    return [never, weekly], cast(Any, Known(Little([tick, tick])))


def test_the_oracle_knows_the_versions_that_are_there_in_a_tick_and_no_later_ones():
    runs, workshop = two_ticks()
    assert oracle(runs, workshop) == [2, 4]  # version 3 is trained in the second tick, and nobody serves it


def test_regret_is_relative_to_the_oracle_and_forced_versions_are_no_promotions():
    never, weekly, best = score_all(*two_ticks())
    assert (never.right, weekly.right, best.right) == (0.0, 0.5, 0.75)
    assert (never.regret, weekly.regret, best.regret) == (1.0, pytest.approx(1 / 3), 0.0)
    assert (weekly.trainings, weekly.rows, weekly.seconds, weekly.promotions) == (2, 20, 4.0, 1)
    assert weekly.poisoned == 0.25


def test_the_table_tells_the_median_the_range_and_the_seeds_ahead_of_weekly():
    def score(name: str, seed: int, right: float) -> Score:
        return Score(name, name, seed, right, 0.1, [])

    weekly = [score("weekly", seed, 0.5) for seed in range(3)]
    ours = [score("ours", seed, right) for seed, right in enumerate((0.4, 0.6, 0.7))]
    lines = list(tables([*weekly, *ours], Size()))
    assert "3 seeds" in lines[0]
    assert lines[-1].startswith("| ours | 60.0 % (40.0 % to 70.0 %) |") and lines[-1].endswith("| 2 of 3 |")
    assert cell([2, 2], ".0f") == "2"


def test_an_unknown_policy_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--policies", "weekly,none"])
    assert "no policy none" in capsys.readouterr().err


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.loopbench", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.e2e
@needs_data
def test_a_seed_gives_the_same_scores_twice(tmp_path):
    asked = ("--data", str(DATA), "--quick", "--seeds", "1", "--policies", "weekly,ours", "--json")
    asked += ("--models", str(tmp_path))
    told = [run(*asked) for _ in range(2)]
    assert told[0].returncode == 0, told[0].stderr[-2000:]
    first, again = (
        [{**json.loads(line), "seconds": 0} for line in done.stdout.splitlines()] for done in told
    )
    assert first == again
    assert [score["policy"] for score in first] == ["weekly", "ours", "oracle"]
    weekly, ours, _ = first
    assert weekly["trainings"] == 2 and ours["refused"] == [2]  # the poisoned batch is taken back
    assert ours["unerased"] == weekly["unerased"] == 0  # the forced experiment heeds the erasure, too


def test_without_the_data_it_says_so(tmp_path):
    done = run("--data", str(tmp_path))
    assert done.returncode == 1
    assert "no CLINC150 in" in done.stderr
