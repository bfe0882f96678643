"""Two projects on one real Prefect server: neither touches the other's deployments and automations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import scaled
from stand_in_flows import write_flows

from ratchet.config.params import Config
from ratchet.services.processes import free_port
from ratchet.services.specs import plan_services

pytestmark = pytest.mark.e2e

# As a version before deployments had the project's name registered them; the second project takes the first
# one's over.
OLD = """
import sys
from prefect.deployments.runner import RunnerDeployment
from prefect.types.entrypoint import EntrypointType
from pathlib import Path
from flows import deployments
from ratchet.config.params import load_config

root = Path(sys.argv[1])
config = load_config(root / "params.yaml")
for describe in (deployments.describe_retrain, deployments.describe_monitor):
    deployment = describe(root, config)
    deployment.name = deployment.flow_name
    deployment.apply()
"""
DRIFT = """
from pathlib import Path
from flows.events import DRIFTED, tell
from ratchet.config.params import load_config
tell(DRIFTED, load_config(Path("params.yaml")), {"reason": "drift", "topics": []})
"""


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    port = free_port()
    config = Config.model_validate({"services": {"prefect_port": port}})
    plan = plan_services(tmp_path_factory.mktemp("server"), config)["prefect"]
    plan.folder.mkdir(parents=True)
    environment = plan.environment | {"PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "false"}
    address = f"http://127.0.0.1:{port}/api/"
    with (
        process(plan.command, plan.folder, environment),
        httpx.Client(base_url=address, trust_env=False, timeout=scaled(60)) as client,
    ):
        wait_for(lambda: _answers(client))
        yield client


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(holds: Callable[[], Any], seconds: float = 120) -> None:
    until = time.monotonic() + scaled(seconds)
    while not holds():
        assert time.monotonic() < until, "it did not come in time"
        time.sleep(0.3)


@contextmanager
def process(command: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (
        (folder / "output.log").open("wb") as out,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out) as running,
    ):
        try:
            yield
        finally:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(scaled(60))
            except subprocess.TimeoutExpired:
                running.kill()


def make_project(folder: Path, name: str, prefect: httpx.Client) -> Path:
    root = folder / name
    write_flows(root)
    port = prefect.base_url.port
    (root / "params.yaml").write_text(
        json.dumps({"project": {"name": name}, "services": {"prefect_port": port}})
    )
    return root


def environment_of(root: Path, prefect: httpx.Client) -> dict[str, str]:
    return {
        **os.environ,
        "PREFECT_API_URL": str(prefect.base_url).rstrip("/"),
        "PREFECT_HOME": str(root / "home"),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "MLFLOW_TRACKING_URI": "sqlite:///none.db",
        "RATCHET_ROOT": str(root),
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parents[2])]),
    }


def run(code: str, root: Path, prefect: httpx.Client) -> None:
    command = [sys.executable, "-c", code, str(root)]
    subprocess.run(command, cwd=root, env=environment_of(root, prefect), check=True)


@contextmanager
def served(root: Path, prefect: httpx.Client) -> Iterator[None]:
    command = [sys.executable, "-m", "flows.deployments", "--end-lost-runs"]
    with process(command, root, environment_of(root, prefect)):
        wait_for(lambda: (find(prefect, f"retrain/{root.name}") or {}).get("status") == "READY")
        yield


def find(prefect: httpx.Client, name: str) -> dict[str, Any] | None:
    answer = prefect.get(f"deployments/name/{name}")
    return answer.json() if answer.status_code == 200 else None


def names(prefect: httpx.Client) -> set[str]:
    flows = {one["id"]: one["name"] for one in prefect.post("flows/filter", json={}).json()}
    found = prefect.post("deployments/filter", json={}).json()
    return {f"{flows[one['flow_id']]}/{one['name']}" for one in found}


def automations(prefect: httpx.Client) -> list[str]:
    return sorted(one["name"] for one in prefect.post("automations/filter", json={}).json())


def drift_runs(prefect: httpx.Client, project: str) -> list[dict[str, Any]]:
    chosen = {"deployments": {"name": {"any_": [project]}}}
    found = prefect.post("flow_runs/filter", json=chosen).json()
    return [one for one in found if one["parameters"].get("reason") == "drift"]


def all_of(project: str) -> set[str]:
    return {f"{flow}/{project}" for flow in ("retrain", "ingest", "synthesize", "monitor", "rollout")}


def test_each_keeps_its_deployments_and_automations_through_an_upgrade(
    prefect: httpx.Client, tmp_path: Path
) -> None:
    claims, letters = (make_project(tmp_path, name, prefect) for name in ("claims", "letters"))
    run(OLD, claims, prefect)
    run(OLD, letters, prefect)
    assert names(prefect) == {"retrain/retrain", "monitor/monitor"}, "the second took over the first one's"
    assert automations(prefect) == ["letters: retrain on drift"]
    old = find(prefect, "retrain/retrain")
    assert old is not None
    (schedule,) = old["schedules"]
    paused = prefect.patch(f"deployments/{old['id']}/schedules/{schedule['id']}", json={"active": False})
    assert paused.status_code == 204

    with served(claims, prefect):
        # The old ones are the other project's, and it has not been upgraded yet.
        assert names(prefect) == all_of("claims") | {"retrain/retrain", "monitor/monitor"}
        assert automations(prefect) == ["claims: retrain on drift", "letters: retrain on drift"]
        with served(letters, prefect):
            wait_for(lambda: names(prefect) == all_of("claims") | all_of("letters"))
            assert automations(prefect) == ["claims: retrain on drift", "letters: retrain on drift"]
            assert not is_active(prefect, "retrain/letters"), "a person had paused it"
            assert is_active(prefect, "monitor/letters") and is_active(prefect, "retrain/claims")

            run(DRIFT, claims, prefect)
            wait_for(lambda: drift_runs(prefect, "claims"))
            run(DRIFT, letters, prefect)
            wait_for(lambda: drift_runs(prefect, "letters"))
            assert [len(drift_runs(prefect, name)) for name in ("claims", "letters")] == [1, 1]
            (mine,), (other,) = (drift_runs(prefect, name) for name in ("claims", "letters"))
            assert (mine["parameters"]["root"], other["parameters"]["root"]) == (str(claims), str(letters))

    with served(claims, prefect):  # again: nothing doubles, and the other's stays
        assert names(prefect) == all_of("claims") | all_of("letters")
        assert automations(prefect) == ["claims: retrain on drift", "letters: retrain on drift"]
        assert not is_active(prefect, "retrain/letters")


def is_active(prefect: httpx.Client, name: str) -> bool:
    found = find(prefect, name)
    assert found is not None
    return bool(found["schedules"][0]["active"])
