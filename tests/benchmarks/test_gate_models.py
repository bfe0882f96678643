"""The benchmark of the gate on real models, as small as it goes: one known domain of CLINC150, a few cycles,
one candidate of each kind.
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
from safetensors.numpy import load_file

from benchmarks import gate_models
from benchmarks.gate_models import (
    EXCHANGED,
    ITSELF,
    LOST,
    NO_BETTER,
    Models,
    Pair,
    bare,
    change_weights,
    exchanged,
    forgetful,
    forgetful_in_answers,
    not_a_number,
)
from ratchet.files import read_json
from ratchet.models.loading import WEIGHTS, adapter_sha256

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gate_models", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.e2e
@pytest.mark.skipif(
    not (DATA / "data_full.json").exists(), reason="CLINC150 does not lie in ../shared/data/clinc150"
)
def test_the_gate_promotes_neither_the_champion_nor_a_spoilt_one():
    done = run("--data", str(DATA), "--quick", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    models, *lines = map(json.loads, done.stdout.splitlines())
    found = {line["name"]: line["found"] for line in lines}
    assert len(models["twins"]) == 1 and models["rows"] > 280
    assert found[ITSELF] == {"reject": 10}
    assert sum(found[EXCHANGED].values()) == 10
    spoilt = {
        line["name"].split(" ")[0]: line["found"]
        for line in lines
        if not line["name"].startswith(("a twin", "the champion"))
    }
    assert spoilt == {
        "noise": {"reject": 1},
        "shuffled": {"reject": 1},
        "the": {"reject": 1},
        "an": {"reject": 1},
        "NaN": {"error": 1},
    }
    assert all(
        len(line["lost"]) == line["found"].get("reject") for line in lines if line["found"] == {"reject": 1}
    )


def test_without_the_data_it_says_so(tmp_path):
    done = run("--data", str(tmp_path))
    assert done.returncode == 1
    assert "no CLINC150 in" in done.stderr


def scores(right: list[float], nll: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "id": [f"row{number}" for number in range(len(right))],
            "batch": "one",
            "exact_match": right,
            "answer_nll": nll,
        }
    )


def test_exchanged_twins_keep_each_rows_pair_of_scores_and_neither_side_is_the_better_one():
    one, other = scores([1.0] * 400, [0.1] * 400), scores([0.0] * 400, [0.9] * 400)
    pair = exchanged(models_of(one, other), np.random.default_rng(0))
    sides = pair.candidate.merge(pair.champion, on=["id", "batch"])
    assert (sides.exact_match_x + sides.exact_match_y == 1).all() and np.allclose(
        sides.answer_nll_x + sides.answer_nll_y, 1
    )
    assert np.allclose(
        pair.candidate.answer_nll, np.where(pair.candidate.exact_match == 1, 0.1, 0.9)
    )  # a row's scores stay together
    assert 160 < pair.candidate.exact_match.sum() < 240


def test_a_twin_that_is_as_good_counts_as_no_better():
    equal = scores([1.0, 0.0], [0.1, 0.9])
    models = models_of(equal, equal.copy())
    assert gate_models.as_they_are(models, np.random.default_rng(0)).name == NO_BETTER


def test_a_forgetful_twin_loses_5_points_against_the_champion_in_one_domain_and_nothing_elsewhere():
    rows = 20_000
    parts = np.where(np.arange(rows) % 2, "one", "two")
    better, champion, weak = (
        scores([float(number % 10 < right) for number in range(rows)], [nll] * rows).assign(batch=parts)
        for right, nll in ((6, 0.1), (5, 0.2), (0, 3.0))
    )
    models = Models([champion, better], weak, weak, ["one"])
    for name, shown in ((forgetful, True), (forgetful_in_answers, False)):
        pair = name(models, np.random.default_rng(0))
        lost = (pair.champion.exact_match - pair.candidate.exact_match).groupby(parts).mean()
        assert lost["one"] == pytest.approx(LOST, abs=0.01)
        assert lost["two"] == pytest.approx(champion.exact_match[::2].mean() - better.exact_match[::2].mean())
        assert pair.champion is champion and bool((pair.candidate.answer_nll == 3.0).any()) == shown


def models_of(*twins: pd.DataFrame) -> Models:
    return Models(list(twins), twins[0], twins[0], ["one"])


def test_a_drawn_table_holds_the_same_rows_of_all_three():
    model = scores([1.0] * 50, [0.1] * 50)
    table = gate_models.drawn(Pair("", model, model), model, np.random.default_rng(0), (20, 10))
    parts = [part for _, part in table.groupby("model")]
    assert [len(part) for part in parts] == [30] * 3 and len({tuple(part.id) for part in parts}) == 1
    assert all((part.batch == "golden").sum() == 10 for part in parts)


@pytest.fixture
def champion(candidate, tmp_path) -> Path:
    """The folder of the benchmark, with one trained adapter in it."""
    shutil.copytree(candidate, tmp_path / gate_models.CHAMPION)
    return tmp_path


def test_a_changed_adapter_is_whole_and_another(champion):
    out = champion / "noise-1/candidate"
    change_weights(champion / gate_models.CHAMPION, out, lambda _, weight: weight + 1)
    before, after = load_file(champion / gate_models.CHAMPION / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys() and all(
        np.allclose(after[name], before[name] + 1) for name in before
    )
    assert (
        read_json(out / "manifest.json")["adapter_sha256"]
        == adapter_sha256(out)
        != adapter_sha256(champion / gate_models.CHAMPION)
    )


def test_the_bare_base_is_an_adapter_that_changes_nothing(champion):
    bare(champion, champion / "bare-0/candidate", 0, gate_models.QUICK)
    weights = load_file(champion / "bare-0/candidate" / WEIGHTS)
    assert not any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert all(weight.any() for name, weight in weights.items() if "lora_A" in name)


def test_weights_are_spoilt_by_one_value_by_a_matrix_and_all(champion):
    broken = []
    for number in range(3):
        not_a_number(champion, champion / f"nan-{number}/candidate", number, gate_models.QUICK)
        weights = load_file(champion / f"nan-{number}/candidate" / WEIGHTS)
        broken.append(
            [
                (int(np.isnan(weight).sum()), weight.size)
                for weight in weights.values()
                if np.isnan(weight).any()
            ]
        )
    (one, *_), (matrix, *_), every = broken
    assert one[0] == 1 and matrix[0] == matrix[1] > 1
    assert [len(part) for part in broken] == [1, 1, len(weights)] and all(
        count == size for count, size in every
    )
