"""A retraining whose stage `train` runs on another machine: two network namespaces with a cable between them.

`hub` has git, an object store, Prefect and MLflow; `gpu` sees nothing of its disk. Minutes; marker e2e.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from patience import scaled
from ruamel.yaml import YAML
from tiny_project import EASY, tiny_project

from ratchet.config.docs import render_params
from ratchet.config.params import Config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]
ROOT = Path(__file__).parents[2]
HUB, GPU = f"rh{os.getpid()}", f"rg{os.getpid()}"
HOST = "10.77.0.1"
SERVERS = {
    "PREFECT_API_URL": f"http://{HOST}:4200/api",
    "PREFECT_API_AUTH_STRING": "ratchet:test",
    "MLFLOW_TRACKING_URI": f"http://{HOST}:5000",
    "RATCHET_TEST_PATIENCE": "1",
    "OMP_NUM_THREADS": "1",
}


class Server(NamedTuple):
    """One of the hub's servers, which can be killed and started again."""

    process: subprocess.Popen[bytes]
    again: Callable[[], subprocess.Popen[bytes]]


def tiny_config() -> Config:
    return tiny_project(
        train={"epochs": 6, "checkpoint_minutes": 0.0, "patience": 100},
        **EASY,
        landing="push",
        execution={"train": {"pool": "gpu", "lease_minutes": 1.0}},
    )


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    if shutil.which("ip") is None or os.geteuid():
        pytest.skip("network namespaces cannot be made here: needs root and `ip`")
    try:
        ip("netns", "add", HUB)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", GPU)
        ip("link", "add", "vh", "netns", HUB, "type", "veth", "peer", "name", "vg", "netns", GPU)
        for space, link, address in ((HUB, "vh", HOST), (GPU, "vg", "10.77.0.2")):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", link, "up")
        yield
    finally:
        for space in (GPU, HUB):
            end_all(space)
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        for process in STARTED:
            process.wait()


STARTED: list[subprocess.Popen[bytes]] = []
RUNNING: dict[str, Server] = {}
OUTAGE_SECONDS = 60


def start(command: list[str], cwd: Path, log: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start a program that runs until its machine ends."""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment(**more), stdout=out, stderr=out, start_new_session=True
        )
    STARTED.append(process)
    return process


def pids(space: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    return [int(word) for word in done.stdout.split()]


def end_all(space: str) -> None:
    """Kill -9 every process of a machine: what the loss of its power does."""
    while found := pids(space):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def environment(**more: str) -> dict[str, str]:
    plain = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "RATCHET_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**plain, **SERVERS, "PATH": path, "NO_PROXY": "*", "no_proxy": "*", **more}


def on_hub(*command: str) -> list[str]:
    return ["ip", "netns", "exec", HUB, *command]


def on_gpu(place: Path, *command: str) -> list[str]:
    """With a mount namespace of its own, in which the hub's folder is empty."""
    hide = 'mount --make-rprivate / && mount -t tmpfs none "$0" && exec "$@"'
    return ["ip", "netns", "exec", GPU, "unshare", "--mount", "sh", "-c", hide, str(place / "hub"), *command]


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def wait(what: str, holds: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + scaled(seconds)
    while not holds():
        assert time.monotonic() < until, f"waited too long for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place(cable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub with its servers and a project that holds a batch of rows, and two workers' checkouts."""
    place = tmp_path_factory.mktemp("machines")
    hub = place / "hub"
    for name in ("git", "store", "mlflow", "prefect"):
        (hub / name).mkdir(parents=True)
    run(["git", "clone", "--quiet", "--bare", str(ROOT), str(hub / "git/project.git")], place)
    logs = hub / "servers.log"
    python = sys.executable
    prefect = ["--host", HOST, "--port", "4200"]
    mlflow = ["--host", HOST, "--port", "5000", "--workers", "1", "--allowed-hosts", f"{HOST}:5000"]
    stored = ["--backend-store-uri", f"sqlite:///{hub / 'mlflow/mlflow.db'}", "--serve-artifacts"]
    stored += ["--artifacts-destination", str(hub / "mlflow/artifacts")]
    listen = ["--reuseaddr", f"--listen={HOST}", "--export-all", "--enable=receive-pack"]
    servers = {
        "git": ["git", "daemon", *listen, f"--base-path={hub / 'git'}", str(hub / "git")],
        "store": [python, str(ROOT / "tests/object_store.py"), str(hub / "store"), HOST, "8333"],
        "Prefect": [python, "-m", "prefect", "server", "start", *prefect],
        "MLflow": [python, "-m", "mlflow", "server", *mlflow, *stored],
    }
    own = {
        "PREFECT_HOME": str(hub / "prefect"),
        "PREFECT_SERVER_API_AUTH_STRING": "ratchet:test",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, server in servers.items():
        again = partial(start, on_hub(*server), hub, logs, **own)
        RUNNING[name] = Server(again(), again)
    for path in (":4200/api/health", ":5000/health", ":8333/none"):
        command = on_gpu(place, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{HOST}{path}")
        wait(path, lambda command=command: "000" not in answer(command), 300)
    assert all(server.process.poll() is None for server in RUNNING.values()), logs.read_text()[-3000:]
    project = make_project(place)
    for name in ("first", "second"):
        run(on_gpu(place, "git", "clone", "--quiet", f"git://{HOST}/project.git", str(place / name)), place)
    yield place
    assert project.exists()


def answer(command: list[str]) -> str:
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False).stdout


def make_project(place: Path) -> Path:
    project = place / "hub/project"
    run(on_hub("git", "clone", "--quiet", f"git://{HOST}/project.git", str(project)), place)
    for command in (
        ("git", "checkout", "-q", "-B", "main"),
        ("git", "config", "user.name", "Ana"),
        ("git", "config", "user.email", "ana@example.org"),
        (sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "store", f"http://{HOST}:8333/dvc"),
        (sys.executable, "-m", "dvc", "remote", "modify", "-q", "store", "method", "PUT"),
    ):
        run(on_hub(*command), project)
    (project / "params.yaml").write_text(render_params(tiny_config()), encoding="utf-8")
    run(on_hub("git", "commit", "-qam", "Our settings"), project)
    run(on_hub("git", "push", "-q", "--set-upstream", "origin", "main"), project)
    ingest(place, project, "house", ["red", "blue", "green", "white"])
    return project


def ingest(place: Path, project: Path, thing: str, colours: list[str]) -> None:
    rows = [
        {
            "question": f"What colour has the {thing} number {index}, they ask?",
            "answer": colours[index % len(colours)],
        }
        for index in range(400)
    ]
    path = place / f"hub/{thing}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(ratchet("ingest", "--path", str(path)), project)


def ratchet(*arguments: str) -> list[str]:
    return on_hub(sys.executable, "-m", "ratchet.cli", *arguments)


def start_worker(place: Path, name: str) -> None:
    worker = on_gpu(place, sys.executable, "-m", "ratchet.cli", "worker", "--pool", "gpu")
    start(worker, place / name, place / f"{name}.log")


def start_retraining(project: Path, reason: str, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as out:
        command = ratchet("retrain", "--json", "--reason", reason)
        piped = subprocess.PIPE
        return subprocess.Popen(command, cwd=project, env=environment(), stdout=piped, stderr=out, text=True)


def points_of(project: Path, version: int) -> int:
    """The points of a version's curve in MLflow."""
    code = (
        "from mlflow import MlflowClient; client = MlflowClient(); "
        f"run = client.get_model_version('colours', '{version}').run_id; "
        "print(len(client.get_metric_history(run, 'validation_loss')))"
    )
    return int(run(on_hub(sys.executable, "-c", code), project))


def training_on_gpu() -> psutil.Process | None:
    for pid in pids(GPU):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if "tasks.train" in process.cmdline():
                return process
    return None


def test_a_training_on_a_machine_that_dies_is_finished_by_another_with_the_bytes_of_one_here(place):
    project = place / "hub/project"
    start_worker(place, "first")
    log = place / "hub/retrain.log"
    retrain = start_retraining(project, "first", log)

    def ends() -> str:
        assert retrain.poll() is None, log.read_text()[-5000:]
        return log.read_text()

    # The machine stands still after its first checkpoint, so that the training cannot end before it dies.
    checkpoints = place / "first/.ratchet/checkpoints"
    wait("a checkpoint", lambda: ends() and list(checkpoints.glob("*/step-*/manifest.json")), 900)
    training = training_on_gpu()
    assert training
    training.suspend()
    wait("its push", lambda: "another machine could go on from it" in ends(), 300)
    end_all(GPU)
    heads = run(on_hub("git", "ls-remote", "--heads", f"git://{HOST}/project.git"), place)
    assert "refs/heads/ratchet/train/" in heads
    start_worker(place, "second")
    said, _ = retrain.communicate(timeout=scaled(1200))
    told = log.read_text()

    assert retrain.returncode == 0, told[-6000:] + (place / "second.log").read_text()[-3000:]
    assert "attempt 1 is lost: no sign of life for 1 minutes" in told
    assert "of an earlier attempt" in told and "train: goes on from the checkpoint of step" in told
    done = json.loads(said)
    assert done["stages"]["train"] and (done["version"], done["champion"]) == (1, 1)
    heads = run(on_hub("git", "ls-remote", "--heads", f"git://{HOST}/project.git"), place)
    ours = run(on_hub("git", "rev-parse", "HEAD"), project).strip()
    assert [line.split() for line in heads.splitlines()] == [[ours, "refs/heads/main"]], "landed, and tidy"
    assert not (place / "second/.ratchet/checkpoints").exists()

    assert points_of(project, 1) > 2

    def candidate() -> str:
        lock = YAML(typ="safe").load((project / "dvc.lock").read_text())
        return next(
            out["md5"] for out in lock["stages"]["train"]["outs"] if out["path"] == "models/candidate"
        )

    elsewhere = candidate()
    run(on_hub(sys.executable, "-m", "dvc", "repro", "-q", "--force", "--single-item", "code"), project)
    assert run(on_hub(sys.executable, "-m", "dvc", "status", "train"), project).count("changed") == 0
    run(on_hub(sys.executable, "-m", "dvc", "repro", "-q", "--force", "--single-item", "train"), project)
    assert candidate() == elsewhere


def test_a_minute_without_object_store_and_mlflow_costs_nothing_but_the_minute(place):
    """Both are away from the middle of a training on the other machine until its outputs cannot be pushed."""
    project, log, worker = place / "hub/project", place / "hub/second.log", place / "second.log"
    run(on_hub("git", "checkout", "--quiet", "--", "."), project)  # what the comparison above left
    ingest(place, project, "shed", ["grey", "brown", "black", "pink"])
    before = len(worker.read_text())
    retrain = start_retraining(project, "second", log)

    def said() -> str:
        assert retrain.poll() is None, log.read_text()[-5000:]
        return worker.read_text()[before:]

    checkpoints = place / "second/.ratchet/checkpoints"
    wait("a checkpoint", lambda: said() and list(checkpoints.glob("*/step-*/manifest.json")), 900)
    training = training_on_gpu()
    assert training
    training.suspend()  # so that it cannot end before they are away
    for name in ("store", "MLflow"):
        os.killpg(RUNNING[name].process.pid, signal.SIGKILL)
    training.resume()
    away = time.monotonic()
    wait("the end of the training", lambda: said() and not training.is_running(), 300)
    wait("a push in vain", lambda: "tried again in" in said(), 120)
    time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - away)))
    for name in ("store", "MLflow"):
        RUNNING[name].again()
    result, _ = retrain.communicate(timeout=scaled(1200))

    assert retrain.returncode == 0, log.read_text()[-6000:] + worker.read_text()[-3000:]
    done = json.loads(result)
    assert (done["version"], done["stages"]["train"]) == (2, True)
    assert "is lost" not in log.read_text()
    assert points_of(project, 2) > 2
