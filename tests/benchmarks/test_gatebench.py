"""GateBench: pairs have the effect that they are said to have, rules judge, and a rule's fault is told.

The pool of scores is simulated where the models do not matter; the e2e test makes them, as small as they go.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.gatebench.__main__ import main
from benchmarks.gatebench.judging import BUILT_IN, Rule, ask, built_in, load_rule
from benchmarks.gatebench.measure import QUICK, Cell, cases_of, left_out
from benchmarks.gatebench.models import FILE
from benchmarks.gatebench.pairs import (
    EQUAL,
    GAIN,
    LOSS,
    SPOILT,
    Case,
    Pool,
    farthest,
    make_pair,
    make_table,
    read_pool,
)

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"
ROWS = 400
# Shares of right answers, as of a fine-tune that is half done.
MODELS = {"base": 0.0, "twin-0": 0.6, "twin-1": 0.62, "twin-2": 0.58, "weaker": 0.3, "spoilt-noise-0": 0.1}


def scores(name: str, right: float) -> pd.DataFrame:
    generator = np.random.default_rng(list(name.encode()))
    hits = generator.random(ROWS) < right
    return pd.DataFrame(
        {
            "id": [f"row{number:03}" for number in range(ROWS)],
            "batch": np.resize(["old", "older", "new"], ROWS),
            "reference": "yes",
            "model": name,
            "exact_match": hits.astype(float),
            "answer_nll": np.where(hits, 0.2, 1.0),
            "answer": np.where(hits, "yes", f"no, says {name}"),
            "seen": np.resize([True, True, False], ROWS),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("models")
    pd.concat([scores(*each) for each in MODELS.items()]).to_parquet(out / FILE, index=False)
    return out


@pytest.fixture(scope="module")
def pool(folder) -> Pool:
    return read_pool(folder / FILE)


@pytest.mark.parametrize(
    ("kind", "points", "wanted"),
    [(EQUAL, 0.0, 0.0), (LOSS, 10.0, -0.1), (LOSS, 20.0, -0.2), (GAIN, 3.0, 0.03), (GAIN, 10.0, 0.1)],
)
def test_a_pair_has_the_effect_that_it_is_said_to_have(pool, kind, points, wanted):
    gains = []
    for number in range(200):
        pair = make_pair(pool, Case(kind, points, 100, number), np.random.default_rng(number))
        gains.append(pair.candidate["exact_match"].mean() - pair.champion["exact_match"].mean())
    error = np.std(gains) / np.sqrt(len(gains))
    assert np.mean(gains) == pytest.approx(wanted, abs=4 * error)


@pytest.mark.parametrize("kind", [EQUAL, LOSS, GAIN, SPOILT])
def test_a_rows_scores_and_answer_stay_together(pool, kind):
    table = make_table(pool, Case(kind, 5.0, 90, 1))
    right = table.exact_match == 1
    assert right.any() and ((table.answer == "yes") == right).all()
    assert np.allclose(table.answer_nll, np.where(right, 0.2, 1.0))


def test_three_models_are_asked_the_same_rows_and_the_earlier_champion_others(pool):
    table = make_table(pool, Case(EQUAL, 0.0, 90, 0))
    asked = {model: list(part.id) for model, part in table.groupby("model")}
    assert asked["candidate"] == asked["champion"] == asked["base"] != asked["champion_earlier"]
    assert len(set(asked["candidate"])) == len(set(asked["champion_earlier"])) == 120
    assert ((table.batch == "golden") & (table.model == "candidate")).sum() == 30
    assert make_table(pool, Case(EQUAL, 0.0, 90, 0)).equals(table)  # seeded
    assert not make_table(pool, Case(EQUAL, 0.0, 90, 1)).equals(table)


def test_effects_that_the_models_cannot_make_are_left_out_and_named(pool):
    assert 20 < farthest(pool) < 35
    near = Pool(pool.rows, {**pool.models, "weaker": pool.models["twin-2"]})
    kinds = {(case.kind, case.points) for case in cases_of(QUICK, near)}
    assert (EQUAL, 0.0) in kinds and (LOSS, 20.0) not in kinds
    cells = [Cell("any", kind, points, 50, 1, 0) for kind, points in kinds]
    assert any("loss of" in told and "20" in told for told in left_out(cells))
    assert not list(left_out([Cell("any", c.kind, c.points, 50, 1, 0) for c in cases_of(QUICK, pool)]))


def table_of(candidate: float, champion: float) -> pd.DataFrame:
    """Return scores of two models that are right on all rows (1) or on none (0); the base is on none."""
    shares = {"candidate": candidate, "champion": champion, "base": 0.0, "champion_earlier": champion}
    parts = [scores("any", share).assign(model=model) for model, share in shares.items()]
    table = pd.concat(parts, ignore_index=True)
    table["answer"] = table.model.where(table.answer != "yes", "yes")
    return table.assign(batch=table.batch.mask(table.id > "row300", "golden"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_promotes_a_perfect_candidate_and_no_wrong_one(name):
    rule = load_rule(*built_in(name))
    assert rule.title != name
    assert ask(rule, table_of(1.0, 0.0)) == (True, "")
    assert ask(rule, table_of(0.0, 1.0)) == (False, "")


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_where_ties_pass_the_champion_replaces_itself(name):
    assert ask(load_rule(*built_in(name)), table_of(1.0, 1.0)) == (name == "ties_pass", "")


@pytest.mark.parametrize("name", BUILT_IN)
def test_no_rule_fails_on_a_model_whose_likelihoods_are_no_numbers(name):
    table = table_of(0.0, 1.0)
    broken = table.assign(answer_nll=table.answer_nll.mask(table.model == "candidate"))
    assert ask(load_rule(*built_in(name)), broken) == (False, "")


def test_a_rule_that_raises_or_returns_no_verdict_is_a_fault_and_promotes_nothing():
    def raises(table: pd.DataFrame) -> bool:
        raise ZeroDivisionError("no rows")

    table = table_of(1.0, 0.0)
    assert ask(Rule("mine", "mine", raises), table) == (False, "ZeroDivisionError: no rows")
    assert ask(Rule("mine", "mine", lambda _: sys.exit("enough")), table) == (False, "SystemExit: enough")
    promoted, fault = ask(Rule("mine", "mine", lambda _: "promote"), table)
    assert not promoted and "'promote'" in fault and "True or False" in fault
    assert ask(Rule("mine", "mine", lambda table: table.exact_match.mean() > 0), table) == (True, "")


def test_a_rule_cannot_change_what_the_next_one_sees():
    table = table_of(1.0, 0.0)
    before = table.copy()
    ask(Rule("mine", "mine", lambda table: bool(table.insert(0, "more", 1)) or True), table)
    assert table.equals(before)


@pytest.mark.parametrize(
    ("body", "said"),
    [("def decide(table):\n    return True\n", "no function `judge`"), ("1 / 0\n", "ZeroDivisionError")],
)
def test_a_file_that_is_no_rule_is_refused(tmp_path, body, said):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(SystemExit, match=said):
        load_rule(tmp_path / "mine.py")
    with pytest.raises(SystemExit, match="no Python file"):
        load_rule(tmp_path / "other.py")
    with pytest.raises(SystemExit, match="no rule named luck"):
        built_in("gate,luck")


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gatebench", "--jobs", "1", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_users_rule_is_judged_beside_others_its_fault_is_told_and_the_page_is_written(folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        '"""Mine: at least three rows more."""\n'
        "def judge(table):\n"
        "    return table[table.model == 'candidate'].exact_match.sum()"
        " >= table[table.model == 'champion'].exact_match.sum() + 3\n"
    )
    (tmp_path / "broken.py").write_text("def judge(table):\n    return table.no_such_column.any()\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs/gatebench.md", docs)
    rules = [
        "--rule",
        tmp_path / "mine.py",
        "--rule",
        tmp_path / "broken.py",
        "--rules",
        "ties_pass,better_mean",
    ]
    done = run("--quick", "--models", folder, *rules, "--json", "--write", docs)
    assert done.returncode == 0, done.stderr[-2000:]
    models, *lines = map(json.loads, done.stdout.splitlines())
    assert models["rows"] == ROWS and not models["models_made"]
    cells = pd.DataFrame(lines)
    assert list(cells.rule.unique()) == ["ties_pass", "better_mean", "mine", "broken"]
    assert (cells.groupby("rule").pairs.sum() == len(cases_of(QUICK, read_pool(folder / FILE)))).all()
    large = cells[(cells.kind == GAIN) & (cells.points == 10)].set_index("rule")
    assert large.promoted["mine"].sum() > 0
    broken = cells[cells.rule == "broken"]
    assert (broken.promoted == 0).all() and (broken.faults == broken.pairs).all()
    assert cells[cells.rule != "broken"].faults.sum() == 0
    assert "broken: " in done.stderr and "no_such_column" in done.stderr
    page = (docs / "gatebench.md").read_text()
    assert "| Mine |" in page and "no_such_column" in page and "## The rules" in page
    assert "</svg>" in (docs / "images/gatebench.svg").read_text()


def test_nothing_is_measured_for_a_folder_without_the_page(folder, tmp_path):
    with pytest.raises(SystemExit, match="does not hold the marks"):
        main(["--quick", "--models", str(folder), "--rules", "better_mean", "--write", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_without_the_data_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match="no CLINC150 in"):
        main(["--data", str(tmp_path)])


def test_the_page_names_every_rule():
    page = (ROOT / "docs/gatebench.md").read_text()
    assert [name for name in BUILT_IN if f"| `{name}` |" not in page] == []


@pytest.mark.e2e
@pytest.mark.skipif(
    not (DATA / "data_full.json").exists(), reason="CLINC150 does not lie in ../shared/data/clinc150"
)
def test_the_models_are_made_and_judged():
    done = run("--data", DATA, "--quick", "--rules", "better_mean,gate", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    models, *lines = map(json.loads, done.stdout.splitlines())
    assert models["models_made"] and {"base", "weaker", "twin-0", "twin-1"} < {*models["accuracies"]}
    assert sum(name.startswith("spoilt-") for name in models["accuracies"]) == 5
    assert {line["kind"] for line in lines} >= {EQUAL, SPOILT}
    assert not any(line["promoted"] for line in lines if line["kind"] == SPOILT and line["rule"] == "gate")
