"""What the files for GitHub and Docker promise, as they say it; tests/containers runs the containers."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from ratchet.config.params import Config
from ratchet.services.environment import NO_TELEMETRY, service_environment
from ratchet.services.specs import plan_services

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# A runner of the team's own may take two days; GitHub ends its own jobs at 360 minutes.
OWN_RUNNER = "${{ fromJSON(vars.RATCHET_RETRAIN == 'gpu' && '2880' || '350') }}"
COMPOSE = ROOT / "docker" / "compose.yaml"


def read_yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def read_steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in read_yaml(path)["jobs"].values() for step in job["steps"]]


def test_the_workflows_are_those_that_the_docs_describe():
    assert [path.name for path in WORKFLOWS] == ["changes.yml", "checks.yml", "retrain.yml", "scan.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_to_a_commit_and_names_its_version(path: Path):
    used = [step["uses"] for step in read_steps(path) if "uses" in step]
    uses = [action for action in used if not action.startswith("./")]
    pinned = re.findall(
        r"uses: ([\w./-]+@[0-9a-f]{40}) # v\d+\.\d+\.\d+$", path.read_text(encoding="utf-8"), re.MULTILINE
    )

    assert len(uses) > 0
    assert pinned == uses
    assert set(used) - set(uses) <= {"./.github/actions/comment"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_job_has_the_permissions_that_it_names_and_a_time_limit(path: Path):
    workflow = read_yaml(path)

    assert workflow["permissions"] == {}
    assert len(workflow["jobs"]) > 0
    for job in workflow["jobs"].values():
        assert set(job["permissions"]) <= {"contents", "pull-requests"}
        if job["timeout-minutes"] != OWN_RUNNER:
            assert 0 < job["timeout-minutes"] < 360


def test_only_the_retraining_may_write_and_only_jobs_without_code_of_others_may_comment():
    jobs = {f"{path.stem}/{name}": job for path in WORKFLOWS for name, job in read_yaml(path)["jobs"].items()}
    writing = {name for name, job in jobs.items() if job["permissions"].get("contents") == "write"}
    commenting = {name for name, job in jobs.items() if "pull-requests" in job["permissions"]}

    assert writing == {"retrain/retrain"}
    assert commenting == {"changes/comment", "retrain/comment"}
    for name in commenting:
        commands = [step.get("run", "") for step in jobs[name]["steps"]]
        assert not any("make" in command or "ratchet" in command for command in commands), name
        assert "environment" not in jobs[name], "it needs no secret"


def test_no_job_with_secrets_runs_for_a_fork():
    found = {}
    for path in WORKFLOWS:
        for name, job in read_yaml(path)["jobs"].items():
            if "secrets." in str(job):
                found[f"{path.stem}/{name}"] = job["if"]
    assert found.keys() == {"changes/compare", "retrain/retrain", "retrain/request"}
    assert "head.repo.full_name == github.repository" in found["changes/compare"]
    assert all("!github.event.repository.fork" in found[f"retrain/{name}"] for name in ("retrain", "request"))
    assert not any("pull_request_target" in path.read_text() for path in WORKFLOWS)


def test_one_variable_chooses_where_a_retraining_computes():
    jobs = read_yaml(ROOT / ".github" / "workflows" / "retrain.yml")["jobs"]

    assert "vars.RATCHET_RETRAIN != 'prefect'" in jobs["retrain"]["if"]
    assert "vars.RATCHET_RETRAIN == 'prefect'" in jobs["request"]["if"]
    assert "vars.RATCHET_RETRAIN == 'gpu'" in jobs["retrain"]["runs-on"]


def test_gitlab_runs_the_same_targets():
    jobs = read_yaml(ROOT / ".gitlab-ci.yml")
    scripts = [line for job in jobs.values() if isinstance(job, dict) for line in job.get("script", [])]
    wanted = _targets_of_ci()

    assert sorted(line for line in scripts if line.startswith("make ") and line != "make install") == sorted(
        f"make {target}" for target in wanted
    )
    assert jobs["retrain"]["resource_group"]
    paths = read_yaml(ROOT / ".github" / "workflows" / "retrain.yml")["on"]["push"]["paths"]
    assert jobs["retrain"]["rules"][0]["changes"] == jobs["changes"]["rules"][0]["changes"] == paths


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_expression_is_pasted_into_a_shell(path: Path):
    scripts = [step["run"] for step in read_steps(path) if "run" in step]

    assert len(scripts) > 0
    assert [script for script in scripts if "${{" in script] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_checkout_leaves_its_token_behind(path: Path):
    checkouts = [step for step in read_steps(path) if step.get("uses", "").startswith("actions/checkout@")]

    assert len(checkouts) > 0
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_the_checks_run_what_a_clean_clone_must_pass():
    wanted = _targets_of_ci()
    scripts = [
        step["run"] for step in read_steps(ROOT / ".github" / "workflows" / "checks.yml") if "run" in step
    ]

    assert len(wanted) > 0
    assert sorted(scripts) == sorted(f"make {target}" for target in wanted)


def _targets_of_ci() -> list[str]:
    calls = re.findall(r"^make ([^#\n]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    return [word for call in calls for word in call.split() if re.fullmatch(r"[a-z][\w-]*", word)]


def test_a_retraining_cannot_start_itself():
    paths = read_yaml(ROOT / ".github" / "workflows" / "retrain.yml")["on"]["push"]["paths"]
    written = [
        "dvc.lock",
        "champion.json",
        "models/candidate.dvc",
        "reports/gate.json",
        "reports/gate.png",
        "reports/evaluation/metrics.json",
    ]

    assert any(fnmatch.fnmatch("data/raw.dvc", pattern) for pattern in paths)
    assert [name for name in written if any(fnmatch.fnmatch(name, pattern) for pattern in paths)] == []


def test_every_published_port_is_bound_to_loopback():
    ports = [port for service in read_yaml(COMPOSE)["services"].values() for port in service.get("ports", [])]

    assert len(ports) > 0
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_containers_get_what_up_sets(monkeypatch, tmp_path):
    """Nothing is missing of what `ratchet up` gives a service; only paths and addresses differ."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "PREFECT_", "OMP_")):
            monkeypatch.delenv(name)
    plans, services = plan_services(tmp_path, Config()), read_yaml(COMPOSE)["services"]
    itself = service_environment(tmp_path, Config()).keys() - {"PREFECT_API_URL"}  # what a flow sets
    image = dict(re.findall(r"(\w+)=(\S+)", read_target("runtime").partition("ENV")[2]))
    assert NO_TELEMETRY.items() <= image.items()
    for ours, theirs in (
        ("mlflow", "mlflow"),
        ("prefect", "prefect"),
        ("deployments", "worker"),
        ("gateway", "gateway"),
    ):
        given = services[theirs].get("environment", {})
        wanted = {
            name: value
            for name, value in plans[ours].environment.items()
            if name not in os.environ and name not in NO_TELEMETRY
        }
        if ours == "deployments":
            wanted = {name: value for name, value in wanted.items() if name not in itself}
        assert wanted, ours
        assert wanted.keys() - given.keys() == set(), theirs
        same = {name: value for name, value in wanted.items() if "/" not in value}
        assert same == {name: given[name] for name in same}, theirs
    for ours, theirs in (("deployments", "worker"), ("gateway", "gateway")):
        assert services[theirs]["command"].split()[1:] == plans[ours].command[1:]


def test_every_containers_log_is_bounded():
    for name, service in read_yaml(COMPOSE)["services"].items():
        assert service["logging"]["options"]["max-size"], name


def test_every_container_that_stays_has_a_health_check_and_starts_again():
    services = {name: one for name, one in read_yaml(COMPOSE)["services"].items() if name != "setup"}

    assert {name for name, one in services.items() if "test" not in one.get("healthcheck", {})} == set()
    assert {one["restart"] for one in services.values()} == {"unless-stopped"}


def test_no_secret_is_in_the_environment_of_a_container():
    compose = read_yaml(COMPOSE)
    settings = [
        f"{name}={value}"
        for service in compose["services"].values()
        for name, value in service.get("environment", {}).items()
    ]
    mounted = {name for service in compose["services"].values() for name in service.get("secrets", [])}
    secret = re.compile(r"(?!.*_FILE=).*(PASSWORD|AUTH_STRING|SECRET|API_KEY)|.*://[^@/]*:[^@/]*@")

    assert len(settings) > 0
    assert [line for line in settings if secret.match(line)] == []
    assert mounted == compose["secrets"].keys()
    assert {name for line in settings for name in re.findall(r"/run/secrets/(\w+)$", line)} <= mounted


def test_secrets_are_made_once_and_one_user_can_read_them(tmp_path):
    def make() -> dict[str, str]:
        subprocess.run(["sh", ROOT / "docker" / "make-secrets", tmp_path], check=True, capture_output=True)
        return {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}

    made = make()
    (tmp_path / "mlflow_pgpass").unlink()
    again = make()

    others = {"prefect_password", "objects_dvc_read"}  # a person's, and GitHub's
    assert read_yaml(COMPOSE)["secrets"].keys() == made.keys() - others
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o077] == []
    assert {name for name in made if made[name] != again[name]} == {"mlflow_pgpass"}
    who = {one["name"]: one["actions"] for one in json.loads(made["objects"])["identities"]}
    assert who["dvc"] == ["Read:dvc", "Write:dvc", "List:dvc", "Tagging:dvc"]
    assert who["dvc_read"] == ["Read:dvc", "List:dvc"]


def read_target(name: str) -> str:
    """The lines of one target of the Dockerfile."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    return re.split(r"^FROM ", text.partition(f" AS {name}\n")[2], flags=re.MULTILINE)[0]


@pytest.mark.parametrize("target", ["pipeline", "trainer", "gateway", "objects"])
def test_an_image_runs_as_an_ordinary_user(target: str):
    users = re.findall(r"^USER (.+)$", read_target(target), re.MULTILINE)

    assert users[-1:] == ["$UID"]
    assert "ARG UID=1000" in read_target(target)
