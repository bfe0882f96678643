"""A stage in a work pool: a real Prefect server, a real worker in another checkout, a stage without torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from patience import scaled
from places import use_git_without_a_user
from two_machines import Machines, make_machines

from ratchet.pipeline.checkout import git
from ratchet.services.processes import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
PARAMS = """project: {name: small}
execution: {train: {pool: gpu, lease_minutes: 1.0}}
"""
HUB = """
import sys
from pathlib import Path
from prefect import flow
from flows.execution import Execution
from ratchet.config.params import load_config
from ratchet.pipeline.dvc import run_stage
from ratchet.pipeline.workspace import open_workspace

def say(line):
    print(line, flush=True)

@flow(persist_result=False)
def hub(root: str) -> None:
    execution = Execution(load_config(Path(root) / "params.yaml"))
    with open_workspace(Path(root), "test", say) as workspace:
        for stage in ("make", "train", "train"):
            say(f"{stage} ran: {execution.run(workspace, stage, say)}")
        say(f"made: {(workspace.path / 'models/learned/weights').read_text()}")
        execution.forget(workspace)

hub(sys.argv[1])
"""


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    use_git_without_a_user(monkeypatch)
    return make_machines(tmp_path, PARAMS)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of both machines, with the address of a Prefect server."""
    port = free_port()
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "RATCHET_"))
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env={
            **plain,
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + scaled(120)
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield {
            **plain,
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_HOME": str(tmp_path / "hub prefect"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        }
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def start_worker(checkout: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (checkout.parent / f"{checkout.name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ratchet.cli", "-C", str(checkout), "worker", "--pool", "gpu"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def kill_machine(worker: subprocess.Popen[bytes]) -> None:
    """Kill -9 all that the worker has started, as a loss of power does."""
    with suppress(psutil.Error):
        for process in [psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)]:
            with suppress(psutil.Error):
                process.kill()
    worker.wait()


def test_a_worker_that_dies_is_replaced_by_one_on_another_machine_and_lines_come_live(
    machines: Machines, environment: dict[str, str], tmp_path: Path
):
    (machines.other / "wait").touch()  # the stage stands still after three of six steps
    git(tmp_path, "clone", "--quiet", "origin.git", "third")
    hub = subprocess.Popen(
        [sys.executable, "-c", HUB, str(machines.hub)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    workers = []
    with hub:
        try:
            for line in hub.stdout or []:
                lines.append(line.rstrip())
                if "waits for a worker" in line and not workers:
                    workers.append(start_worker(machines.other, environment))
                if "step-00000003 is pushed" in line and len(workers) == 1:
                    kill_machine(workers[0])
                    workers.append(start_worker(tmp_path / "third", environment))
        except BaseException:
            hub.kill()
            raise
        finally:
            for worker in workers:
                kill_machine(worker)
    told = "\n".join(lines)
    assert hub.returncode == 0, told[-5000:] + (tmp_path / "third.log").read_text()[-3000:]
    assert "train: attempt 1 is lost: no sign of life for 1 minutes" in told
    assert lines.index("from 0") < lines.index("from 3")
    assert "took step-00000003 of an earlier attempt" in told
    assert "train ran: True" in told and "train ran: False" in told
    assert f"made: {json.dumps([0, 1, 4, 9, 16, 25])}made" in told
    heads = git(machines.hub, "ls-remote", "--heads", "origin")
    assert [line.split()[1] for line in heads.splitlines()] == ["refs/heads/main"]


def test_a_setting_that_the_stage_refuses_is_told_with_its_exit_code(
    machines: Machines, environment: dict[str, str]
):
    """No second attempt: it would end in the same way."""
    learn = (machines.hub / "learn.py").read_text()
    (machines.hub / "learn.py").write_text("import sys\nprint('the rate is wrong')\nsys.exit(2)\n" + learn)
    git(machines.hub, "commit", "--quiet", "--all", "--message", "A wrong rate")
    worker = start_worker(machines.other, environment)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HUB, str(machines.hub)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        kill_machine(worker)
    assert done.returncode == 1
    assert "stage train failed:\nthe rate is wrong" in done.stderr
    assert "attempt 1" in done.stdout and "attempt 2" not in done.stdout
