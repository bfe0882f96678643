"""The benchmark of forgetting, as small as it goes: two domains of CLINC150, one seed; and what it says where
the data are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data/clinc150"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.forgetting", *arguments],
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
def test_two_domains_arrive_and_each_arm_is_told_with_what_it_kept(tmp_path):
    done = run(
        "--data",
        str(DATA),
        "--quick",
        "--arms",
        "0,all",
        "--jobs",
        "1",
        "--json",
        "--runs",
        str(tmp_path / "runs"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone, everything = map(json.loads, done.stdout.splitlines())
    assert (alone["arm"], everything["arm"]) == ("0", "all")
    assert (alone["last_rows"], everything["last_rows"]) == (90, 180)  # the newest domain's; both
    assert all(
        0 <= row["kept"]["mean"] <= 1 and row["seconds"] > 0 and len(row["forgotten_by_domain"]) == 1
        for row in (alone, everything)
    )
    assert everything["against_all"]["mean"] == 0
    again = run(
        "--data",
        str(DATA),
        "--quick",
        "--arms",
        "0,all",
        "--jobs",
        "1",
        "--json",
        "--runs",
        str(tmp_path / "runs"),
    )
    assert again.stdout == done.stdout  # what was measured is kept


def test_without_the_data_it_says_so(tmp_path):
    done = run("--data", str(tmp_path))
    assert done.returncode == 1
    assert "no CLINC150 in" in done.stderr
