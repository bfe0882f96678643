"""The benchmark of privacy, as small as it goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"


@pytest.mark.e2e
@pytest.mark.skipif(
    not (DATA / "data_full.json").exists(), reason="CLINC150 does not lie in ../shared/data/clinc150"
)
def test_each_epsilon_is_told_with_its_noise_and_the_plain_training_without() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.privacy", "--quick", "--epsilons", "1,8", "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {run["arm"]: run for run in map(json.loads, done.stdout.splitlines())}
    assert list(found) == ["1", "8", "none"]
    assert found["1"]["noise"] > found["8"]["noise"] > found["none"]["noise"] == 0
    assert found["1"]["steps"] == found["8"]["steps"]
    assert all(0 <= run["accuracy"] <= 1 and run["epsilon_low"] <= 1 for run in found.values())
