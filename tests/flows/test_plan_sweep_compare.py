"""`ratchet plan`, `sweep` and `compare` on a real clone with MLflow away: what they make through the DAG,
what they propose, and that DVC makes a trial again. Minutes; marker e2e.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from patience import scaled
from tiny_project import tiny_project

from ratchet.config.docs import render_params
from ratchet.config.params import Config, load_config
from ratchet.files import read_json
from ratchet.pipeline.checkout import child_environment
from ratchet.services.environment import HEALTH, fetch_body
from ratchet.services.processes import free_port
from ratchet.services.specs import plan_services
from tests.bases.test_base import REVISION, snapshot  # noqa: F401  (a fixture)
from tests.flows.test_loop import ROOT, ratchet, run, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


def small_config(**sweep: Any) -> Config:
    return tiny_project(
        train={"epochs": 3},
        gate={"min_rows": 20},
        sweep={
            "space": {
                "train.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True},
                "adapter.rank": [4, 8],
            },
            "trials": 3,
            "startup_trials": 2,
            **sweep,
        },
        services={"mlflow_port": free_port(), "prefect_port": free_port()},
        gateway={"port": free_port()},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("finding") / "colours"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    for command in (
        ["remote", "remove", "origin"],
        ["checkout", "-q", "-B", "main"],
        ["config", "user.name", "Ana"],
        ["config", "user.email", "ana@example.org"],
    ):
        run(place, "git", *command)
    (place / "params.yaml").write_text(render_params(small_config()), encoding="utf-8")
    run(place, "git", "commit", "-qam", "Our settings")
    write_rows(place, "first.jsonl", "house", 400)
    with prefect_alone(place):
        ratchet(place, "ingest", "--path", str(place.parent / "first.jsonl"))
        yield place


@contextmanager
def prefect_alone(place: Path) -> Iterator[None]:
    """Run the server that `ratchet up` would start, without MLflow: each command would start its own."""
    plan = plan_services(place, load_config(place / "params.yaml"))["prefect"]
    plan.folder.mkdir(parents=True)
    with (
        (plan.folder / "log").open("wb") as log,
        subprocess.Popen(
            plan.command,
            cwd=plan.folder,
            env=plan.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            until = time.monotonic() + scaled(120)
            while fetch_body(plan.host, plan.port, HEALTH[plan.name]) is None:
                assert process.poll() is None and time.monotonic() < until, (plan.folder / "log").read_text()
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(timeout=scaled(60))


def test_a_plan_is_made_before_anything_was_trained(home: Path) -> None:
    assert "ratchet plan --prepare" in ratchet(home, "plan", code=2)
    found = json.loads(ratchet(home, "plan", "--prepare", "--json"))
    assert found["fits"] and found["steps"] > 10 and found["seconds"] > 0
    assert run(home, "git", "status", "--porcelain") == "" and not (home / "models/candidate").exists()
    assert list((home / ".ratchet/workspaces").iterdir()) == []


def test_a_trial_is_made_again_by_dvc(home: Path) -> None:
    assert "MLflow" in ratchet(home, "retrain", code=1)
    done = json.loads(ratchet(home, "sweep", "--json"))
    assert done["counts"]["complete"] >= 1 and done["trials"] == 3 and done["unit"] == "nats a learned token"
    assert run(home, "git", "status", "--porcelain") == "", "shown, not written"
    record = read_json(home / f".ratchet/sweeps/{done['study']}/trial-{done['best']['number']:04d}.json")
    again = subprocess.run(
        [sys.executable, "-m", *shlex.split(done["best"]["command"])],
        cwd=home,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    made = read_json(home / "models/candidate/manifest.json")
    assert (made["run_key"], made["adapter_sha256"]) == (
        record["manifest"]["run_key"],
        record["manifest"]["adapter_sha256"],
    ), "the same bytes"
    assert read_json(home / "reports/train/figures.json")["best_validation_loss"] == done["best"]["value"]
    run(home, "git", "checkout", "--", ".")


def test_the_same_command_goes_on_and_writes_what_it_proposes(home: Path) -> None:
    done = json.loads(ratchet(home, "sweep", "--trials", "4", "--apply", "--json"))
    assert done["trials"] == 4
    written = load_config(home / "params.yaml")
    assert {"train.learning_rate": written.train.learning_rate, "adapter.rank": written.adapter.rank} == done[
        "best"
    ]["changes"]
    changed = {line.split()[1] for line in done["diff"].splitlines() if line.startswith("+ ")}
    assert changed <= {"learning_rate:", "rank:"}
    run(home, "git", "checkout", "--", ".")


def test_bases_are_compared_by_nats_a_row_in_own_tokens(home: Path, snapshot: Path) -> None:  # noqa: F811
    config = small_config(space={"base.model": ["demo", f"tiny/llama@{REVISION}"]}, trials=2)
    config = config.model_copy(update={"services": load_config(home / "params.yaml").services})
    (home / "params.yaml").write_text(render_params(config), encoding="utf-8")
    run(home, "git", "commit", "-qam", "Look at bases")
    done = json.loads(ratchet(home, "sweep", "--json"))
    assert done["unit"] == "nats a row" and done["trials"] == 2
    records = [
        read_json(path) for path in sorted((home / f".ratchet/sweeps/{done['study']}").glob("trial-*.json"))
    ]
    complete = {
        record["manifest"]["base"]["model"]: record for record in records if record["state"] == "complete"
    }
    assert complete.keys() >= {"demo"} and {record["changes"]["base.model"] for record in records} <= {
        "demo",
        "tiny/llama",
    }
    for record in complete.values():
        assert record["value"] > record["figures"]["best_validation_loss"], (
            "a row has more than one learned token"
        )


def test_methods_are_compared_on_the_same_rows(home: Path) -> None:
    found = json.loads(ratchet(home, "compare", "lora,full", "--json"))
    assert [(row["method"], row["failed"]) for row in found["methods"]] == [("lora", ""), ("full", "")]
    assert {row["test_rows"] for row in found["methods"]} == {found["rows"]}
    assert found["methods"][1]["saved_mib"] > found["methods"][0]["saved_mib"]
    assert read_json(home / "reports/compare/compare.json") == found
    assert "| full |" in (home / "reports/compare/compare.md").read_text()
    assert "no method" in ratchet(home, "compare", "lora,lara", code=2)
