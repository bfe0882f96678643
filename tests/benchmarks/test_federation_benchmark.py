"""The benchmark of federation, as small as it goes: five nodes, one seed; and what it says where the data are
not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.federation import ALPHAS, ARMS, POISONS, QUICK, STRATEGIES

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.federation", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.e2e
@pytest.mark.skipif(
    not (DATA / "data_full.json").exists(), reason="CLINC150 does not lie in ../shared/data/clinc150"
)
def test_each_arm_is_measured_at_each_node_and_each_strategy_with_each_poison(tmp_path):
    kept = ("--data", str(DATA), "--quick", "--keep", str(tmp_path / "kept"))
    done = run(*kept, "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    *dealt, poisoned = map(json.loads, done.stdout.splitlines())
    assert [found["alpha"] for found in dealt] == list(ALPHAS)
    rows = QUICK.domains * QUICK.intents * QUICK.counts.train
    for found in dealt:
        assert sum(found["rows"]) == rows and min(found["rows"]) >= QUICK.least_rows
        assert len(found["clusters"]) == len(found["shares"]) == QUICK.nodes
        assert set(found["accuracy"]) == set(ARMS)
        for right in found["accuracy"].values():
            assert len(right) == QUICK.nodes and all(0 <= each <= 1 for each in right)
    assert set(poisoned["accuracy"]) == set(STRATEGIES) and 0 <= poisoned["absent"] <= 1
    for right in poisoned["accuracy"].values():
        assert set(right) == set(POISONS) and all(0 <= each <= 1 for each in right.values())
    again = run(*kept)  # what was measured is kept
    assert again.returncode == 0 and "nodes, seed" not in again.stderr
    assert all(f"Dirichlet {alpha:g}: 1 seeds" in again.stdout for alpha in ALPHAS)
    assert again.stdout.count("FedAvg, exact") == len(ALPHAS) + 2


def test_without_the_data_it_says_so(tmp_path):
    done = run("--data", str(tmp_path))
    assert done.returncode == 1
    assert "no CLINC150 in" in done.stderr
