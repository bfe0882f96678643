"""Benchmarks that need a machine this one is not: they run here on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_the_benchmark_for_gpus_runs_on_a_tiny_shape(tmp_path):
    arguments = [
        "--shape",
        "tiny",
        "--length",
        "128",
        "--rows",
        "60",
        "--seconds",
        "1",
        "--arms",
        "usual,ratchet",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["arm"] for line in found] == ["usual", "ratchet"]
    for line in found:
        assert 0 < line["utilisation"] < 1 and 0 < line["tokens_per_second"] < line["positions_per_second"]
        assert line["of_peak"] > 0 and line["peak_mib"] > 100
