"""The benchmark of pictures runs as it stands in the documentation, on little."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> dict[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.media", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return {found["part"]: found["lines"] for found in map(json.loads, lines)}


@pytest.mark.e2e
def test_validation_and_memory_are_measured_for_each_kind_and_number():
    found = run("--parts", "validation,memory", "--passes", "2", "--pictures", "300,900")
    assert [line["picture"].partition(",")[0] for line in found["validation"]] == ["JPEG", "PNG"] * 2
    for line in found["validation"]:
        assert line["against_pillow"] > 0
        assert line["rows_a_second"] == pytest.approx(line["pillow_a_second"] * line["against_pillow"])
    few, many = found["memory"]
    assert (few["pictures"], many["pictures"]) == (300, 900) and many["peak_mib"] >= few["peak_mib"]


@pytest.mark.e2e
def test_the_arms_of_a_training_learn_from_the_same_rows_with_pictures():
    found = run("--parts", "training", "--rows", "24", "--seconds", "0.5", "--rounds", "1")
    usual, in_order, ours = found["training"]
    assert [line["arm"] for line in found["training"]] == ["usual", "sorted", "ratchet"]
    assert usual["against_the_usual"] == 1.0
    for line in (usual, in_order, ours):
        assert 0 < line["utilisation"] < 1 and line["steps"] > 2
        assert 0 < line["pictures"] < 1 and line["positions_per_second"] > line["tokens_per_second"]
