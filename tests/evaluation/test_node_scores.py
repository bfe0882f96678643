"""Counts and sums of nodes give the gain and its interval that all rows together give."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ratchet.config.evaluation import GateConfig
from ratchet.evaluation.node_scores import ALL, FILE, Scores, Sums, check_sums, gain_of, read_groups, sum_up
from ratchet.files import write_json
from ratchet.gate.guardrails import judge_nodes


def nodes(gain: float, sizes: tuple[int, ...] = (40, 7, 130)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    chance = np.random.default_rng(3)
    rival = [chance.random(size) for size in sizes]
    return [each + chance.normal(gain, 0.2, len(each)) for each in rival], rival


def scores(gain: float) -> Scores:
    mine, theirs = nodes(gain)
    sums = {f"n{number}": {ALL: sum_up(*pair)} for number, pair in enumerate(zip(mine, theirs, strict=True))}
    return Scores("exact_match", "champion", sums, {"away": "no reply"})


@pytest.mark.parametrize("alpha", [0.05, 0.005])
def test_the_interval_from_sums_is_that_from_rows(alpha):
    found = gain_of(scores(0.03).together[ALL], alpha)
    gains = np.concatenate([one - other for one, other in zip(*nodes(0.03), strict=True)])
    wanted = stats.ttest_1samp(gains, 0).confidence_interval(1 - 2 * alpha)
    assert found.mean == pytest.approx(gains.mean(), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_one_row_tells_nothing():
    found = gain_of(sum_up([1.0], [0.0]), 0.05)
    assert (found.mean, found.low, found.high) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize(("gain", "result"), [(0.03, "pass"), (-0.05, "unclear"), (-0.3, "fail")])
def test_the_gate_judges_the_nodes_rows(tmp_path, gain, result):
    write_json(tmp_path / FILE, msgspec.to_builtins(scores(gain)))
    (check,) = judge_nodes(tmp_path / FILE, GateConfig())
    assert (check.name, check.rows, check.result) == ("nodes", 177, result)
    assert "177 rows of 3 nodes" in check.reason and "without away" in check.reason


def test_without_sums_there_is_no_check(tmp_path):
    assert judge_nodes(tmp_path / FILE, GateConfig()) == []
    write_json(tmp_path / FILE, msgspec.to_builtins(Scores("exact_match", "base", {}, {"a": "away"})))
    assert judge_nodes(tmp_path / FILE, GateConfig()) == []


def table(path: Path, kinds: dict[str, int]) -> Path:
    lines = [
        {"id": f"{kind}{number}", "kind": kind, "batch": "b", "model": model}
        | {"exact_match": score, "answer_nll": 2 - score}
        for kind, count in kinds.items()
        for number in range(count)
        for model, score in (("candidate", 1.0), ("base", float(number % 2)))
    ]
    golden = [{**lines[0], "id": "g", "batch": "golden"}, {**lines[1], "id": "g", "batch": "golden"}]
    pd.DataFrame(lines + golden).sample(frac=1, random_state=1).to_parquet(path)
    return path


def test_groups_of_few_rows_stay_at_the_node(tmp_path):
    found = read_groups(table(tmp_path / "t", {"a": 40, "b": 30, "few": 4}), "exact_match", "base", 20)
    assert found == {
        ALL: Sums(74, 74.0, 37.0, 37.0, 37.0),
        "kind:a": Sums(40, 40.0, 20.0, 20.0, 20.0),
        "kind:b": Sums(30, 30.0, 15.0, 15.0, 15.0),
    }
    # The whole without a group of 40 would tell of the four.
    assert set(read_groups(table(tmp_path / "t", {"a": 40, "few": 4}), "exact_match", "base", 20)) == {ALL}
    assert read_groups(table(tmp_path / "t", {"a": 10}), "exact_match", "base", 20) == {}


def test_of_a_likelihood_less_is_better(tmp_path):
    found = read_groups(table(tmp_path / "t", {"a": 40}), "answer_nll", "base", 20)[ALL]
    assert found.difference == 20.0


@pytest.mark.parametrize(
    "sums",
    [
        Sums(5, 1.0, 1.0, 0.0, 0.0),
        Sums(30, math.nan, 1.0, 0.0, 0.0),
        Sums(30, 1.0, 1.0, 30.0, 1.0),
        Sums(30, 1.0, 1.0, 0.0, -1.0),
    ],
)
def test_sums_that_cannot_be_are_named(sums):
    assert check_sums({ALL: sums}, 20)
    assert check_sums({ALL: sum_up([1.0] * 30, [0.5] * 30)}, 20) is None
