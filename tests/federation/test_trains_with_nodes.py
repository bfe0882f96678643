"""With `retrain.trains_with: nodes` drift and the schedule train with the nodes, by the deployment that
`ratchet up` serves; where too few are connected, nothing is begun.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import ratchet
from live import Live, wait_until
from parties import make_node
from patience import scaled

from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.demo.checkout import AUTHOR
from ratchet.files import write_bytes
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import WORKSPACES
from ratchet.promotion.champion import read_champion
from ratchet.promotion.lineage import TAUGHT_BY
from ratchet.services.environment import service_environment
from ratchet.services.processes import free_port
from ratchet.tracking.registry import get_version

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, dict[str, Any]] = {
    "prepare": {"test_share": 0.5, "validation_share": 0.1},
    "train": {"epochs": 3.0, "batch_windows": 8, "learning_rate": 1e-2},
    "evaluate": {"simple_baseline": False},
    "parity": {"rows": 10},
    "gate": {"metric": "answer_nll", "min_rows": 10, "guardrails": []},
    "federate": {"rounds": 1, "min_nodes": 2, "round_minutes": 10.0, "least_rows": 5},
    "retrain": {"trains_with": "nodes"},
}
DRIFT = """
import sys
from pathlib import Path
from flows.events import DRIFTED, tell
from ratchet.config.params import load_config
tell(DRIFTED, load_config(Path("params.yaml")), {"reason": "drift", "topics": []})
"""
SCHEDULE = """
from pathlib import Path
from prefect.deployments import run_deployment
from ratchet.config.params import load_config
name = load_config(Path("params.yaml")).project.name
run_deployment(f"retrain/{name}", parameters={"reason": "schedule"}, timeout=0)
"""


@pytest.fixture(scope="module")
def live(tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Iterator[Live]:
    with tempfile.TemporaryDirectory(prefix="ratchet-with-nodes-") as scratch:
        folder = Path(scratch)
        values = tiny_config.model_dump(mode="json") | {"promotion": "auto"}
        for section, settings in SETTINGS.items():
            values[section] |= settings
        values["base"] = BaseConfig(model=str(tiny_base)).model_dump(mode="json")
        values["services"] |= {"mlflow_port": free_port(), "prefect_port": free_port()}
        values["gateway"]["port"] = free_port()
        config = Config.model_validate(values)
        git(ROOT, "clone", "--quiet", str(ROOT), str(folder / "coordinator"))
        live = Live(folder / "coordinator", config)
        git(live.root, "remote", "remove", "origin")
        git(live.root, "checkout", "--quiet", "-B", "main")
        git(live.root, *AUTHOR, "commit", "--quiet", "--all", "--message", "Settings")
        git(live.root, "config", "user.name", "Ana")
        git(live.root, "config", "user.email", "ana@example.org")
        rows = folder / "rows.jsonl"
        write_bytes(rows, [json.dumps(row).encode() + b"\n" for row in raw_rows[::3]])
        try:
            command(live, "ingest", "--path", rows)
            command(live, "up")
            live.up()
            for place, name in enumerate(("north", "south"), start=1):
                home = make_node(folder / name, config, raw_rows[place::3])
                live.join(home, live.invite(home))
            wait_until(lambda: live.connected() == {"north", "south"}, 120, "the nodes connect")
            yield live
        finally:
            live.stop()
            command(live, "down")


def command(live: Live, *arguments: object) -> str:
    done = ratchet("-C", live.root, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def run_with_services(live: Live, code: str) -> None:
    environment = os.environ | service_environment(live.root, live.config)
    subprocess.run([sys.executable, "-c", code], cwd=live.root, env=environment, check=True)


def runs(live: Live, reason: str) -> list[tuple[str, str]]:
    """The states of the flow's runs for this reason, and what was said of them."""
    database = sqlite3.connect(live.root / ".ratchet/prefect/prefect.db", timeout=scaled(20))
    try:
        found = database.execute(
            "select run.state_type, state.message from flow_run run join flow_run_state state "
            "on state.id = run.state_id where json_extract(run.parameters, '$.reason') = ? "
            "and run.start_time is not null",  # the schedule's next runs are there already
            (reason,),
        ).fetchall()
    finally:
        database.close()
    return [(str(state), str(message)) for state, message in found]


def wait_for_run(live: Live, reason: str) -> tuple[str, str]:
    def ended() -> bool:
        return bool((found := runs(live, reason)) and found[0][0] in ("COMPLETED", "FAILED", "CRASHED"))

    wait_until(ended, 600, f"the run for {reason}: {(live.root / '.ratchet/logs/deployments.log')}")
    return runs(live, reason)[0]


def test_drift_trains_with_the_nodes_and_the_version_names_them(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_services(live, DRIFT)
    state, message = wait_for_run(live, "drift")
    log = (live.root / ".ratchet/logs/deployments.log").read_text()[-5000:]
    assert state == "COMPLETED", f"{message}\n{log}"
    champion = read_champion(live.root)
    assert champion is not None, log
    assert (champion.version, champion.data.nodes) == (1, ["north", "south"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{live.config.services.mlflow_port}")
    version = get_version(live.config.project.name, 1)
    assert version is not None and json.loads(version.tags[TAUGHT_BY]) == ["north", "south"]


def test_the_schedule_begins_nothing_while_too_few_nodes_are_connected(live: Live) -> None:
    params = live.root / "params.yaml"
    values = json.loads(params.read_text())
    values["federate"]["round_minutes"] = 0.05
    params.write_text(json.dumps(values))
    git(live.root, "commit", "--quiet", "--all", "--message", "Wait for three seconds")
    before = read_champion(live.root), git(live.root, "rev-parse", "HEAD")
    done = ratchet("-C", live.nodes["south"], "federate", "down")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: live.connected() == {"north"}, 120, "a node goes")

    run_with_services(live, SCHEDULE)

    state, message = wait_for_run(live, "schedule")
    assert state == "FAILED"
    assert "1 nodes are connected (north); `federate.min_nodes` asks for 2" in message
    assert not list((live.root / WORKSPACES).glob("*"))
    assert (read_champion(live.root), git(live.root, "rev-parse", "HEAD")) == before
