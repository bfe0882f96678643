"""The images and the compose file, run: `make test-docker`.

One stack of containers takes the tests in their order: it comes up, learns a version, loses its worker in the
middle of a training, is backed up, destroyed and restored. The commands are those of docker/README.md and
docs/operations.md. `RATCHET_DOCKER_FOLDER` keeps the engine's images between two runs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docker_engine import Engine, Unavailable, engine_in
from patience import scaled
from stand_in_images import build_stand_ins
from tiny_project import EASY, tiny_project

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.services.processes import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
COLOURS = ["red", "blue", "green", "white"]
LATER = ["grey", "brown", "black", "pink"]
ENTER = """
import sys, psycopg
try:
    psycopg.connect(host="postgres", user="requests", dbname=sys.argv[1])
    print("in")
except psycopg.OperationalError as error:
    print("refused" if "permission denied" in str(error) else error)
"""
LIST = """
import sys, boto3, botocore
try:
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=sys.argv[1])
    print(sum(page["KeyCount"] for page in pages))
except botocore.exceptions.ClientError as error:
    print(error.response["Error"]["Code"])
"""
# The training of the newest commit, without a kill and without what the cache knows of it.
ONCE_MORE = """
git clone --quiet /project /tmp/again && cd /tmp/again
dvc cache dir --local /project/.dvc/cache >&2
dvc checkout --quiet --allow-missing >&2
env -u MLFLOW_TRACKING_URI RATCHET_ROOT=/tmp/again dvc repro --quiet --force --single-item train >&2
cat dvc.lock
"""
SERVED = {"postgres", "objects", "mlflow", "prefect", "worker", "gateway"}


@dataclass(frozen=True)
class Stack:
    """The containers of one checkout."""

    engine: Engine
    home: Path
    config: Config
    variables: dict[str, str]

    def compose(self, *arguments: str, **settings: Any) -> str:
        return Engine(None, self.variables).docker("compose", *arguments, cwd=self.home, **settings)

    def worker(self, *command: str, **settings: Any) -> str:
        return self.compose("exec", "-T", "worker", *command, **settings)

    def bash(self, script: str, **variables: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.home,
            env=self.variables | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def id_of(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.engine.docker("inspect", self.id_of(service)))[0]
        return found

    def run_of(self, reason: str) -> tuple[str, ...]:
        """The command that starts a retraining by the deployment."""
        deployment = f"retrain/{self.config.project.name}"
        return "prefect", "deployment", "run", deployment, "--param", f"reason={reason}"

    def retrain(self, reason: str) -> None:
        try:
            self.worker(*self.run_of(reason), "--watch")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--tail', '60', 'worker')}") from None


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    kept = os.environ.get("RATCHET_DOCKER_FOLDER")
    folder = Path(kept).resolve() if kept else tmp_path_factory.mktemp("engine")
    try:
        with engine_in(folder) as running:
            if running.folder:
                build_stand_ins(running, folder / "stand-ins")
            yield running
    except Unavailable as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def stack(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    home = tmp_path_factory.mktemp("team") / "model"
    git(ROOT, "clone", "--quiet", str(ROOT), str(home))
    git(home, "remote", "remove", "origin")
    git(home, "checkout", "-q", "-B", "main")
    git(home, "config", "user.name", "Ana")
    git(home, "config", "user.email", "ana@example.org")
    config = tiny_config()
    (home / "params.yaml").write_text(render_params(config), encoding="utf-8")
    git(home, "commit", "-qam", "Our settings")
    subprocess.run([home / "docker/make-secrets"], check=True, stdout=subprocess.DEVNULL)
    settings = {
        "RATCHET_UID": os.getuid(),
        "RATCHET_TAG": "test",
        "MLFLOW_PORT": config.services.mlflow_port,
        "PREFECT_PORT": config.services.prefect_port,
        "OBJECTS_PORT": free_port(),
        "GATEWAY_PORT": config.gateway.port,
        # An index of its own for torch's CPU builds is not to be had where a folder of wheels stands in.
        **({"TORCH_INDEX": ""} if os.environ.get("PIP_FIND_LINKS") else {}),
    }
    lines = "".join(f"{name}={value}\n" for name, value in settings.items())
    (home / ".ratchet/compose.env").write_text(lines, encoding="utf-8")
    variables = engine.environment | {
        "COMPOSE_FILE": "docker/compose.yaml",
        "COMPOSE_ENV_FILES": ".ratchet/compose.env",
        "COMPOSE_PROJECT_NAME": f"ratchet-test-{os.getpid()}",
    }
    made = Stack(engine, home, config, variables)
    try:
        made.compose("build")
        try:
            made.compose("up", "--detach", "--wait")
        except AssertionError as error:
            pytest.fail(f"{error}\n{made.compose('ps', '--all')}{made.compose('logs', '--tail', '30')}")
        yield made
    finally:
        made.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", check=False)


def tiny_config() -> Config:
    return tiny_project(
        # A checkpoint after every step, so that a kill finds one.
        train={"epochs": 12, "checkpoint_minutes": 0.0},
        **EASY,
        services={"mlflow_port": free_port(), "prefect_port": free_port()},
        gateway={"port": free_port()},
    )


def git(place: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=place, capture_output=True, text=True, check=True)
    return done.stdout


def write_rows(home: Path, name: str, things: str, colours: list[str]) -> None:
    rows = [
        {
            "question": f"What colour has the {things} number {n}, they ask?",
            "answer": colours[n % len(colours)],
        }
        for n in range(400)
    ]
    (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def wait_for(what: str, seen: Callable[[], Any], seconds: float = 120) -> Any:
    until = time.monotonic() + scaled(seconds)
    while time.monotonic() < until:
        if found := seen():
            return found
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen")


def ask(stack: Stack, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{stack.config.gateway.port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=scaled(60)) as answer:
        return json.load(answer), {name.lower(): value for name, value in answer.headers.items()}


def version_that_answers(stack: Stack) -> int:
    _, headers = ask(stack, "/v1/chat/completions", question())
    return int(headers["x-ratchet-version"])


def question() -> dict[str, Any]:
    said = {"role": "user", "content": "What colour has the house number 7, they ask?"}
    return {"model": "colours", "user": "ana", "messages": [said]}


def test_all_services_are_healthy_and_start_again_by_themselves(stack: Stack) -> None:
    assert {name: stack.inspect(name)["State"]["Health"]["Status"] for name in SERVED} == dict.fromkeys(
        SERVED, "healthy"
    )
    setup = stack.inspect("setup")["State"]
    assert (setup["Status"], setup["ExitCode"]) == ("exited", 0)
    policies = {stack.inspect(name)["HostConfig"]["RestartPolicy"]["Name"] for name in SERVED}
    assert policies == {"unless-stopped"}


def test_no_secret_is_in_what_the_engine_tells_of_a_container(stack: Stack) -> None:
    files = sorted((stack.home / ".ratchet/secrets").iterdir())
    secrets = {word for file in files for word in re.findall(r"[0-9a-f]{48}", file.read_text())}
    told = json.dumps([stack.inspect(name) for name in [*SERVED, "setup"]]) + stack.compose("logs")

    assert len(secrets) == 9
    assert [file.name for file in files if file.stat().st_mode & 0o077] == []
    assert [secret[:4] for secret in secrets if secret in told] == []
    for service in ("worker", "gateway"):  # they see the checkout, and in it none of the others' secrets
        assert stack.compose("exec", "-T", service, "ls", "-A", "/project/.ratchet/secrets") == ""


def test_a_service_may_enter_its_own_database_and_bucket_alone(stack: Stack) -> None:
    databases = {name: stack.worker("python", "-c", ENTER, name).strip() for name in ("requests", "prefect")}
    buckets = {name: stack.worker("python", "-c", LIST, name).strip() for name in ("dvc", "mlflow")}

    assert databases == {"requests": "in", "prefect": "refused"}
    assert buckets == {"dvc": "0", "mlflow": "AccessDenied"}


def test_status_and_doctor_tell_the_truth_inside_and_outside(stack: Stack) -> None:
    outside = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "RATCHET_"))},
        "PREFECT_PROFILES_PATH": str(stack.home / ".ratchet/secrets/prefect_client"),
    }
    host = subprocess.run(
        [sys.executable, "-m", "ratchet.cli", "status", "--json"],
        cwd=stack.home,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    inside = json.loads(stack.worker("ratchet", "status", "--json"))["services"]
    pages = {name: service["url"] for name, service in inside.items()}

    assert {name: one["answers"] for name, one in json.loads(host)["services"].items()} == dict.fromkeys(
        ("mlflow", "prefect", "deployments", "gateway"), True
    )
    assert {name: one["answers"] for name, one in inside.items()} == dict.fromkeys(pages, True)
    for name in ("mlflow", "prefect", "gateway"):  # what a browser on this machine opens
        with urllib.request.urlopen(pages[name], timeout=scaled(20)) as page:
            assert b"<html" in page.read().lower(), name
    findings = json.loads(stack.worker("ratchet", "doctor", "--json"))
    assert [finding for finding in findings if finding["ok"] is False] == []

    stack.compose("stop", "gateway")
    inside = json.loads(stack.worker("ratchet", "status", "--json"))["services"]
    assert (inside["gateway"]["answers"], inside["mlflow"]["answers"]) == (False, True)
    stack.compose("start", "gateway")


def test_a_retraining_by_the_deployment_makes_a_version_that_the_gateway_serves(stack: Stack) -> None:
    stack.worker("dvc", "remote", "add", "--default", "storage", "s3://dvc/colours")
    git(stack.home, "commit", "-qam", "Keep data in the object store")
    write_rows(stack.home, "first.jsonl", "house", COLOURS)
    stack.worker("ratchet", "ingest", "--path", "first.jsonl")

    stack.retrain("first")

    wait_for("an answer of v1", lambda: answers_with(stack, 1))
    answer, _ = ask(stack, "/v1/chat/completions", question())
    ask(stack, "/v1/feedback", {"request_id": answer["id"], "user": "ana", "score": 1})
    logged = wait_for("the log of the request", lambda: count_rows(stack, "feedback"))
    assert logged == 1
    assert int(stack.worker("python", "-c", LIST, "dvc")) > 10
    files = mlflow(stack, "download_artifacts('models:/colours/1')")
    assert "adapter_model.safetensors" in files


def answers_with(stack: Stack, version: int) -> bool:
    try:
        return version_that_answers(stack) == version
    except OSError:
        return False


def count_rows(stack: Stack, table: str) -> int:
    said = stack.compose(
        *("exec", "-T", "postgres", "psql", "--username", "postgres", "--dbname", "requests"),
        *("--tuples-only", "--command", f"select count(*) from {table}"),
    )
    return int(said)


def mlflow(stack: Stack, call: str) -> str:
    """The files below what MLflow's artifacts module returns."""
    code = (
        "import os, mlflow.artifacts as a\n"
        f"print(*[name for _, _, names in os.walk(a.{call}) for name in names])"
    )
    return stack.worker("python", "-c", code)


def test_a_worker_killed_in_mid_training_starts_again_and_the_next_run_ends_in_the_same_bytes(
    stack: Stack,
) -> None:
    write_rows(stack.home, "second.jsonl", "shed", LATER)
    stack.worker("ratchet", "ingest", "--path", "second.jsonl")
    before = stack.inspect("worker")
    stack.worker(*stack.run_of("second"))
    checkpoints = stack.home / ".ratchet/checkpoints"
    wait_for("a checkpoint", lambda: list(checkpoints.glob("*/step-*/manifest.json")), 300)

    os.kill(before["State"]["Pid"], signal.SIGKILL)  # of its init, and so of all of the container

    assert list(checkpoints.glob("*/step-*")), "the training had ended before the kill"
    wait_for("a restart", lambda: stack.inspect("worker")["RestartCount"] > before["RestartCount"])
    wait_for("health", lambda: stack.inspect("worker")["State"]["Health"]["Status"] == "healthy")
    stack.retrain("again")

    logs = stack.compose("logs", "--no-log-prefix", "worker")
    resumed = re.search(r"from the checkpoint of step (\d+) of (\d+)", logs)
    assert resumed and 0 < int(resumed[1]) < int(resumed[2]), logs[-3000:]
    wait_for("an answer of v2", lambda: answers_with(stack, 2))
    landed = git(stack.home, "show", "HEAD:dvc.lock")
    assert trained(stack.worker("sh", "-c", ONCE_MORE)) == trained(landed)


def trained(lock: str) -> list[str]:
    """The hashes of what `train` made."""
    from ruamel.yaml import YAML

    stage = YAML(typ="safe").load(lock)["stages"]["train"]
    return sorted(f"{out['path']} {out['md5']}" for out in stage["outs"] if out["path"] == "models/candidate")


def commands(heading: str) -> str:
    text = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- commands: {heading} -->\n```sh\n(.*?)```", text, re.DOTALL)
    assert found, heading
    return found[1]


def test_what_was_backed_up_is_restored_after_all_was_lost(stack: Stack, tmp_path: Path) -> None:
    commit, feedback = git(stack.home, "rev-parse", "HEAD"), count_rows(stack, "feedback")
    # Asked in the container: what DVC links there, it links to the container's path of the cache.
    weights = ("sha256sum", "models/candidate/adapter_model.safetensors")
    before = stack.worker(*weights)
    stack.bash(commands("back up"), B=str(tmp_path / "backup"))
    stack.compose("down", "--volumes")
    stack.home.rename(stack.home.with_name("lost"))
    stack.home.mkdir()

    stack.bash(commands("restore"), B=str(tmp_path / "backup"))

    assert git(stack.home, "rev-parse", "HEAD") == commit
    wait_for("an answer of v2", lambda: answers_with(stack, 2))
    assert count_rows(stack, "feedback") == feedback == 1
    for version in (1, 2):
        assert "adapter_model.safetensors" in mlflow(
            stack, f"download_artifacts('models:/colours/{version}')"
        )
    assert stack.worker(*weights) == before
    stack.retrain("nothing is new")
    assert git(stack.home, "rev-parse", "HEAD") == commit


def configuration(engine: Engine, **variables: str) -> dict[str, Any]:
    """The services, as the GPUs' files leave them."""
    files = {"COMPOSE_FILE": "docker/compose.yaml:docker/compose.gpu.yaml"}
    compose = Engine(None, engine.environment | files | variables)
    told = compose.docker("compose", "--profile", "vllm", "config", "--format=json", cwd=ROOT)
    services: dict[str, Any] = json.loads(told)["services"]
    return services


def test_a_worker_and_vllm_get_the_gpus_of_nvidia(engine: Engine) -> None:
    services = configuration(engine)

    for name in ("worker", "vllm"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    build = services["worker"]["build"]
    assert build["target"] == "trainer" and "/cu" in build["args"]["TORCH_INDEX"]
    assert services["worker"]["command"] == ["python", "-m", "flows.deployments", "--end-lost-runs"]


def test_a_worker_and_vllm_get_the_gpus_of_amd_once_the_version_of_rocm_is_said(engine: Engine) -> None:
    with pytest.raises(AssertionError, match=r"TORCH_INDEX.*ROCm"):
        configuration(engine, RATCHET_GPU="amd")
    services = configuration(engine, RATCHET_GPU="amd", TORCH_INDEX="https://torch.example/whl")

    for name in ("worker", "vllm"):
        assert [device["source"] for device in services[name]["devices"]] == ["/dev/kfd", "/dev/dri"]
        assert services[name]["group_add"] == ["render", "video"]
        assert services[name]["security_opt"] == ["no-new-privileges:true", "seccomp:unconfined"]
    build = services["worker"]["build"]
    assert (build["target"], build["args"]["TORCH_INDEX"]) == ("trainer", "https://torch.example/whl")
