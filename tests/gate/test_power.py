"""The plan says what the gate does: against closed forms, and the gate's own verdicts on drawn tables."""

from __future__ import annotations

import json
import math
from statistics import NormalDist

import msgspec
import numpy as np
import pandas as pd
import pytest
from places import make_repository, use_git_without_a_user
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.config.evaluation import GateConfig
from ratchet.gate.power import Spread, plan, spread_of
from ratchet.promotion.verdict import Candidate, Rival, Verdict

CONFIG = GateConfig(min_rows=50)
NORMAL = NormalDist()


def closed_form(effect: float, rows: int, spread: Spread, alpha: float) -> float:
    return NORMAL.cdf(effect * math.sqrt(rows) / spread.at(effect) - NORMAL.inv_cdf(1 - alpha))


@pytest.mark.parametrize(
    ("differing", "effect", "rows"), [(0.29, 0.03, 1000), (0.29, 0.05, 700), (0.1, 0.03, 687)]
)
def test_power_and_rows_are_those_of_the_closed_form(differing, effect, rows):
    """n = 6.18 q / d^2 rows for 80 % at one-sided 5 %, about (Miller, arXiv 2411.00640, equation 9)."""
    spread = Spread(differing, 0.0)
    found = plan(effect, {"test": rows}, [], 0, spread, 0.05, CONFIG)
    assert found.power == pytest.approx(closed_form(effect, rows, spread, 0.05), abs=0.035)
    assert found.needed == pytest.approx(6.18 * differing / effect**2, rel=0.1)
    assert closed_form(found.smallest, rows, spread, 0.05) == pytest.approx(0.8, abs=0.06)


def test_a_score_between_0_and_1_is_planned_by_its_deviation():
    found = plan(0.02, {"test": 900}, [], 0, Spread(None, 0.25), 0.05, CONFIG)
    assert found.power == pytest.approx(closed_form(0.02, 900, Spread(None, 0.25), 0.05), abs=0.02)


def test_the_spread_is_that_of_the_gains():
    told = np.array([0.3, -0.3, 0.1, -0.1])
    assert spread_of(np.array([1.0, -1.0, 0.0, 0.0]), told) == (
        0.5,
        pytest.approx(math.sqrt(0.5)),
        pytest.approx(0.9),  # 0.6 ** 2 / (2 * 0.2)
    )
    assert spread_of(np.array([0.5, -0.5]), np.zeros(2)) == (None, 0.5, 0.0)


def test_guardrails_lower_the_power_and_a_small_golden_set_may_bar_the_way():
    batches = {"old": 60, "older": 60, "new": 900}
    free = plan(0.04, batches, [], 0, Spread(0.2, 0.0), 0.01, CONFIG)
    guarded = plan(0.04, batches, ["old", "older"], 0, Spread(0.2, 0.0), 0.01, CONFIG)
    assert free.power == free.success == guarded.success
    assert guarded.power < free.power - 0.1
    barred = plan(0.01, batches, [], 20, Spread(0.2, 0.0), 0.01, CONFIG)
    assert barred.needed is None
    assert barred.power <= barred.success


def test_under_the_least_number_of_rows_nothing_is_promoted():
    assert plan(0.5, {"test": 49}, [], 0, Spread(0.5, 0.0), 0.05, CONFIG).power == 0.0


def test_more_rows_or_a_larger_effect_never_mean_less_power():
    found = [
        plan(0.03, {"a": 300, "b": 100}, ["a"], 0, Spread(0.2, 0.0), 0.01, CONFIG, rows=rows).power
        for rows in (200, 400, 800, 1600, 3200)
    ]
    assert found == sorted(found)
    assert [
        plan(0.03, {"a": 10}, [], 0, Spread(0.2, 0.0), 0.01, CONFIG, rows=rows).rows for rows in (200, 400)
    ] == [200, 400]


# --- the command ---


@pytest.fixture
def root(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    return make_repository(tmp_path / "checkout")


def call(root, *arguments: str):
    return CliRunner().invoke(app, ["-C", str(root), "gate", "plan", *arguments])


def test_without_an_evaluation_rows_have_to_be_named(root):
    assert "name one with --rows" in str(call(root, "--effect", "0.03").exception)
    found = json.loads(call(root, "--effect", "0.03", "--rows", "1000", "--json").stdout)
    assert (found["rows"], found["basis"]["from"], found["basis"]["spread"]["differing"]) == (
        1000,
        "an assumption",
        0.2,
    )


def test_an_effect_that_is_not_wanted_is_refused(root):
    assert "wanted more than gate.min_gain" in str(call(root, "--effect", "0", "--rows", "10").exception)
    assert "wanted 1 at most" in str(call(root, "--effect", "3", "--rows", "1000").exception)


def test_the_last_evaluation_gives_rows_and_spread_and_the_ledger_the_look(root):
    rows = pd.DataFrame(
        {
            "id": [str(number) for number in range(400)],
            "batch": ["new"] * 300 + ["golden"] * 100,
            "exact_match": ([1.0] + [0.0] * 3) * 100,
            "answer_nll": 1.0,
        }
    )
    other = rows.assign(exact_match=([0.0] * 3 + [1.0]) * 100)
    (root / "reports/evaluation").mkdir(parents=True)
    pd.concat([rows.assign(model="candidate"), other.assign(model="base")]).to_parquet(
        root / "reports/evaluation/scores.parquet"
    )
    verdict = Verdict("reject", ["worse"], Rival("base", None), [], Candidate("b", "sha"))
    (root / "reports/gate.json").write_bytes(msgspec.json.encode(verdict))
    (root / "reports/looks.json").write_text(json.dumps({"judged": {"base": ["a"]}}))
    found = json.loads(call(root, "--effect", "0.1", "--json").stdout)
    assert (found["rows"], found["basis"]["golden"], found["basis"]["look"]) == (300, 100, 3)
    assert found["basis"]["spread"]["differing"] == 0.5
    told = call(root, "--effect", "0.1", "--rows", "3000").stdout
    assert "a gain of +0.100 in exact_match, look 3 against this champion, error 0.0024" in told
    assert "the models differ in 50.0% of the rows (the last evaluation)" in told
    assert "with 3,000 test rows: promoted with" in told
