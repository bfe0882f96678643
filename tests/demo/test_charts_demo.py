"""`make demo-multimodal` as people run it: bars are learned, lines come, drift is found, v2 reads both.

In a clone of its own, so that a demo of the checkout stays. Five to ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratchet.demo.story import PLACE
from ratchet.evaluation.report import read_metrics
from ratchet.files import read_json
from ratchet.promotion.champion import read_champion
from ratchet.promotion.rollout import read_ended
from ratchet.promotion.verdict import read_verdict
from ratchet.services.supervisor import stop_services

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    clone = tmp_path_factory.mktemp("charts") / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    command = [sys.executable, "-m", "ratchet.cli", "-C", str(clone), "demo", "--base", "charts"]
    ran = subprocess.run(
        command, cwd=clone, env=os.environ | {"PYTHONPATH": str(clone)}, capture_output=True, text=True
    )
    try:
        assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-3000:]}"
        yield clone / PLACE
    finally:
        stop_services(clone / PLACE, report=lambda _: None)


def test_v2_reads_lines_and_has_not_forgotten_bars(home: Path) -> None:
    champion = read_champion(home)
    assert champion is not None and (champion.version, champion.previous) == (2, 1)
    slices = read_metrics(home / "reports/evaluation").slices
    batches = [slices[name] for name in slices if name.startswith("batch:")]
    of_bars, of_people = batches[0], batches[1]
    assert (
        of_bars["candidate"].scores["exact_match"].low
        > 0.4
        > 0.1
        > of_bars["base"].scores["exact_match"].high
    )
    assert of_people["champion"].scores["exact_match"].high < of_people["candidate"].scores["exact_match"].low
    checks = {check.name: check for check in read_verdict(home / "reports/gate.json").checks}
    assert checks["past"].result == checks["golden"].result == "pass"


def test_the_gate_saw_that_v2_looks_at_the_pictures(home: Path) -> None:
    verdict = read_verdict(home / "reports/gate.json")
    found = {check.name: check for check in verdict.checks if check.name.startswith("pictures:")}
    assert set(found) == {"pictures:without", "pictures:another"}
    for check in found.values():
        assert check.result == "pass" and check.gain is not None and check.gain[1] > 0, check.reason
    assert verdict.verdict == "promote" and verdict.rival.version == 1


def test_drift_was_found_in_the_pictures_when_lines_came_and_not_before(home: Path) -> None:
    lines = (home / ".ratchet/monitor/verdicts.jsonl").read_text(encoding="utf-8").splitlines()
    verdicts = [json.loads(line) for line in lines]
    assert verdicts[0]["verdict"] == "no drift"
    drifted = [found for found in verdicts if found["verdict"] == "drift"]
    assert drifted and "pictures" in drifted[0]["moved"]


def test_peoples_corrections_became_rows_with_their_pictures(home: Path) -> None:
    rows = [
        json.loads(line)
        for line in (home / "data/prepared/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    corrected = [row for row in rows if row["meta"].get("how") == "corrected"]
    lines = [row for row in corrected if "lines" in json.dumps(row["messages"])]
    assert len(lines) >= 30
    assert all("media" in json.dumps(row["messages"]) for row in lines)


def test_users_feedback_promoted_v2(home: Path) -> None:
    assert [ended.state for ended in read_ended(home)] == ["promoted"]
    assert read_json(home / "champion.json")["version"] == 2
