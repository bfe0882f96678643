"""Starting, finding and ending services; e2e tests use real servers and a stand-in for the flow `retrain`."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import psutil
import pytest
from command import ratchet
from patience import scaled
from places import make_repository
from stand_in_flows import write_flows

from ratchet.config.params import Config
from ratchet.errors import RatchetError, ServiceError, UserError
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.workspace import clone
from ratchet.services.environment import NO_TELEMETRY, service_environment
from ratchet.services.processes import find_port_fault, free_port, name_place
from ratchet.services.specs import plan_services
from ratchet.services.supervisor import (
    Record,
    list_services,
    running_services,
    start_services,
    stop_services,
)


def make_config(mlflow_port: int, prefect_port: int, gateway_port: int) -> Config:
    return Config.model_validate(
        {
            "services": {
                "mlflow_port": mlflow_port,
                "prefect_port": prefect_port,
                "start_timeout": int(scaled(120)),
            },
            "gateway": {"port": gateway_port},
        }
    )


def find_free_ports(count: int) -> list[int]:
    return [free_port() for _ in range(count)]


def write_params(root: Path, config: Config) -> None:
    (root / "params.yaml").write_text(
        json.dumps({"services": config.services.model_dump(), "gateway": {"port": config.gateway.port}})
    )


@pytest.fixture
def config() -> Config:
    return make_config(*find_free_ports(3))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "RATCHET_GATEWAY_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A shell and its child, in a process group of their own."""
    with subprocess.Popen(["sh", "-c", "sleep 300 & wait"], start_new_session=True) as process:
        while not psutil.Process(process.pid).children():
            time.sleep(0.01)
        yield process
        for one in [*psutil.Process(process.pid).children(), process] if process.poll() is None else []:
            one.kill()


def remember(root: Path, name: str, pid: int, *, age: float = 0.0, settings: str = "", port: int = 1) -> Path:
    record = Record(name, pid, psutil.Process(pid).create_time() - age, port, settings)
    path = root / ".ratchet" / "run" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(record))
    return path


def test_a_port_in_use_is_reported_with_its_holder_and_its_key(tmp_path: Path) -> None:
    mlflow_port, prefect_port, gateway_port = find_free_ports(3)
    with socket.create_server(("127.0.0.1", prefect_port)), pytest.raises(UserError) as caught:
        start_services(tmp_path, make_config(mlflow_port, prefect_port, gateway_port), report=print)
    for part in (str(prefect_port), f"process {os.getpid()} ", "services.prefect_port", "params.yaml"):
        assert part in str(caught.value)
    assert not list(tmp_path.glob(".ratchet/run/*.json")), "nothing may start before all ports were looked at"


def test_a_port_that_is_bound_without_listening_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        assert find_port_fault(holder.getsockname()[1])


def test_one_port_for_both_servers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"services\.mlflow_port and services\.prefect_port are both 4300"):
        start_services(tmp_path, make_config(4300, 4300, 4301), report=print)
    with pytest.raises(UserError, match=r"services\.prefect_port and gateway\.port are both 4301"):
        start_services(tmp_path, make_config(4300, 4301, 4301), report=print)


def test_stopping_nothing_is_no_error(tmp_path: Path, config: Config) -> None:
    assert stop_services(tmp_path, report=print) == []
    assert running_services(tmp_path, config) == []


def test_no_service_is_taken_from_a_run_that_is_under_way(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    root = make_repository(tmp_path / "checkout")
    remember(root, "mlflow", sleeper.pid)
    with clone(root, "retrain", print, keep_failed=0):
        refused = ratchet("-C", root, "down")
        assert refused.returncode == 2 and "`retrain` since " in refused.stderr and "--wait" in refused.stderr
        assert sleeper.poll() is None
        waiting = subprocess.Popen(
            [sys.executable, "-m", "ratchet.cli", "-C", str(root), "down", "--wait"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout and waiting.stdout.readline().startswith("waits for `retrain` since ")
        assert sleeper.poll() is None
    assert waiting.communicate(timeout=scaled(60))[0].endswith("mlflow: stopped\n")
    assert sleeper.poll() is not None


def test_a_forced_stop_asks_about_no_run(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    root = make_repository(tmp_path / "checkout")
    remember(root, "mlflow", sleeper.pid)
    with clone(root, "retrain", print, keep_failed=0):
        assert ratchet("-C", root, "down", "--force").stdout == "mlflow: stopped\n"


def test_a_reused_process_id_is_not_killed(
    tmp_path: Path, config: Config, sleeper: subprocess.Popen[bytes]
) -> None:
    record = remember(tmp_path, "mlflow", sleeper.pid, age=3600)
    assert running_services(tmp_path, config) == []
    assert stop_services(tmp_path, report=print) == []
    assert sleeper.poll() is None
    assert not record.exists()


def test_a_process_id_of_another_container_or_machine_is_not_killed(
    tmp_path: Path, config: Config, sleeper: subprocess.Popen[bytes]
) -> None:
    path = remember(tmp_path, "mlflow", sleeper.pid)
    record = msgspec.json.decode(path.read_bytes(), type=Record)
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, place="elsewhere")))
    told: list[str] = []
    assert running_services(tmp_path, config) == []
    assert stop_services(tmp_path, report=told.append) == []
    assert sleeper.poll() is None
    assert path.exists() and told[0].startswith("mlflow: nothing ended")
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, place=name_place())))
    assert [service.name for service in running_services(tmp_path, config)] == ["mlflow"]


class Answers(BaseHTTPRequestHandler):
    """MLflow, a gateway, and Prefect with a password and a deployment that was polled just now."""

    def do_GET(self) -> None:
        secret = base64.b64encode(b"ratchet:word").decode()
        asked = self.path == "/api/deployments/name/retrain/pydoc"
        allowed = not asked or self.headers["Authorization"] == f"Basic {secret}"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        now = datetime.now(UTC).isoformat()
        self.wfile.write(json.dumps({"status": "READY", "last_polled": now}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def others() -> Iterator[str]:
    """The address of servers that nobody here started."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_servers_that_the_environment_names_are_asked_in_place_of_process_ids(
    tmp_path: Path, config: Config, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = tmp_path / "profiles"
    profiles.write_text(
        'active = "a"\n[profiles.a]\nPREFECT_API_AUTH_STRING = "ratchet:word"\n', encoding="utf-8"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", others.replace("//", "//ana:secret@"))
    monkeypatch.setenv("PREFECT_API_URL", f"{others}/api")
    monkeypatch.setenv("RATCHET_GATEWAY_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("RATCHET_GATEWAY_PAGE", "https://answers.example/")
    without = {service.name: service.answers for service in list_services(tmp_path, config)}
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(profiles))
    seen = {service.name: service for service in list_services(tmp_path, config)}

    assert without == {"mlflow": True, "prefect": True, "deployments": False, "gateway": False}
    assert {name: service.answers for name, service in seen.items()} == without | {"deployments": True}
    assert {service.url for service in seen.values()} == {
        others,
        f"{others}/deployments",
        "https://answers.example",
    }
    assert not any(service.alive for service in seen.values()) and all(one.given for one in seen.values())


def test_a_server_that_somebody_else_started_on_our_port_is_told_as_such(
    tmp_path: Path, config: Config, others: str
) -> None:
    services = config.services.model_copy(update={"mlflow_port": int(others.rpartition(":")[2])})
    by_name = {
        service.name: service
        for service in list_services(tmp_path, config.model_copy(update={"services": services}))
    }
    assert (by_name["mlflow"].answers, by_name["mlflow"].alive) == (True, False)
    assert (by_name["prefect"].answers, by_name["prefect"].alive) == (False, False)


def test_stopping_ends_the_whole_process_group(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(sleeper.pid), *psutil.Process(sleeper.pid).children()]
    remember(tmp_path, "mlflow", sleeper.pid)
    assert len(family) == 2
    assert stop_services(tmp_path, report=print) == ["mlflow"]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def test_an_alive_service_that_does_not_answer_is_told_apart(
    tmp_path: Path, config: Config, sleeper: subprocess.Popen[bytes]
) -> None:
    remember(tmp_path, "prefect", sleeper.pid, port=config.services.prefect_port)
    (seen,) = running_services(tmp_path, config)
    assert (seen.name, seen.pid, seen.alive, seen.answers) == ("prefect", sleeper.pid, True, False)


def test_changed_settings_do_not_restart_what_runs(
    tmp_path: Path, config: Config, sleeper: subprocess.Popen[bytes]
) -> None:
    remember(tmp_path, "mlflow", sleeper.pid, settings="services.mlflow_port: 1")
    with pytest.raises(
        UserError, match=r"services\.mlflow_port: 1; params\.yaml now says services\.mlflow_port"
    ):
        start_services(tmp_path, config, report=print)
    assert sleeper.poll() is None


def test_an_unreadable_record_is_not_taken_for_nothing(tmp_path: Path, config: Config) -> None:
    path = tmp_path / ".ratchet" / "run" / "prefect.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(RatchetError, match=r"prefect\.json is no record"):
        running_services(tmp_path, config)


def test_a_second_start_at_the_same_time_is_refused(tmp_path: Path, config: Config) -> None:
    with locked(tmp_path, "up"), pytest.raises(UserError, match="another `up` runs"):
        start_services(tmp_path, config, report=print)


def test_the_environment_names_prefect_only_when_it_answers(tmp_path: Path, config: Config) -> None:
    port = config.services.prefect_port
    assert "PREFECT_API_URL" not in service_environment(tmp_path, config)
    with HTTPServer(("127.0.0.1", port), AlwaysWell) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            assert service_environment(tmp_path, config)["PREFECT_API_URL"] == f"http://127.0.0.1:{port}/api"
        finally:
            server.shutdown()


class AlwaysWell(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_environment_keeps_other_servers_and_turns_telemetry_off(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        service_environment(tmp_path, config)["MLFLOW_TRACKING_URI"]
        == f"http://127.0.0.1:{config.services.mlflow_port}"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    monkeypatch.setenv("PREFECT_API_URL", "https://prefect.example/api")
    environment = service_environment(tmp_path, config)
    assert environment["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert environment["PREFECT_API_URL"] == "https://prefect.example/api"
    assert environment["PREFECT_HOME"] == str(tmp_path / ".ratchet" / "prefect")
    assert environment.items() >= NO_TELEMETRY.items()


def test_a_shell_set_up_for_another_server_does_not_reach_ours(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "postgresql://elsewhere")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://elsewhere")
    plans = plan_services(tmp_path, config)
    assert "MLFLOW_BACKEND_STORE_URI" not in plans["mlflow"].environment
    assert "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in plans["prefect"].environment


def test_importing_the_services_is_light() -> None:
    heavy = (
        "import sys, ratchet.services; print([m for m in ('prefect', 'mlflow', 'torch', 'dvc') if m in "
        "sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Config]]:
    """All services, in a folder whose name would break a URL, with flows that only sleep."""
    root = tmp_path_factory.mktemp("a root") / "100% odd"
    write_flows(root)
    config = make_config(*find_free_ports(3))
    write_params(root, config)
    try:
        start_services(root, config, report=print)
        yield root, config
    finally:
        stop_services(root, report=print)


@pytest.mark.e2e
def test_all_services_answer_and_a_second_start_keeps_them(started: tuple[Path, Config]) -> None:
    root, config = started
    before = running_services(root, config)
    assert [(service.name, service.answers) for service in before] == [
        ("mlflow", True),
        ("prefect", True),
        ("deployments", True),
        ("gateway", True),
    ]
    assert start_services(root, config, report=print) == before


@pytest.mark.e2e
def test_the_servers_keep_their_files_in_the_root_and_refuse_strangers(started: tuple[Path, Config]) -> None:
    root, config = started
    assert (root / ".ratchet" / "mlflow" / "mlflow.db").stat().st_size > 0
    assert (root / ".ratchet" / "prefect" / "prefect.db").stat().st_size > 0
    for port in (config.services.mlflow_port, config.services.prefect_port):
        seen = {
            host: ask(port, "GET", "/", headers={"Host": f"{host}:{port}"})[0]
            for host in ("127.0.0.1", "localhost", "evil.example", "10.evil.example")
        }
        assert seen == {"127.0.0.1": 200, "localhost": 200, "evil.example": 403, "10.evil.example": 403}
    rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
    token = ask(config.services.prefect_port, "GET", "/api/csrf-token?client=x", headers=rebound)
    assert token[0] == 403, "a page whose name was rebound to 127.0.0.1"
    assert ask(config.services.prefect_port, "POST", "/api/flows/filter", body={})[0] == 403, "no CSRF token"


@pytest.mark.e2e
def test_the_schedule_makes_runs(started: tuple[Path, Config]) -> None:
    """SQLAlchemy 2.1 breaks Prefect 3.8.8's scheduler: the deployment looks well, and never runs."""
    root, _ = started
    for _ in range(int(scaled(60))):
        planned = query(
            root, "select count(*) from flow_run where auto_scheduled = 1 and state_type = 'SCHEDULED'"
        )
        if planned:
            return
        time.sleep(1)
    pytest.fail(
        "Prefect planned no run of `retrain`\n"
        + (root / ".ratchet" / "logs" / "prefect.log").read_text()[-3000:]
    )


@pytest.mark.e2e
def test_the_event_of_drift_starts_a_retraining_with_its_topics(started: tuple[Path, Config]) -> None:
    root, config = started
    code = (
        "from pathlib import Path\nfrom flows.events import DRIFTED, tell\n"
        "from ratchet.config.params import load_config\n"
        "tell(DRIFTED, load_config(Path('params.yaml')), {'reason': 'drift', 'topics': [{'name': 'arrays'}]})"
    )
    environment = {**os.environ, **service_environment(root, config)}
    started_at = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
    told = time.monotonic()
    while (
        found := query(
            root, "select max(state_type) from flow_run where auto_scheduled = 0 and name = 'drift'"
        )
    ) != "RUNNING" and time.monotonic() - started_at < scaled(60):
        time.sleep(0.1)
    print(f"event told after {told - started_at:.1f} s, run {found} {time.monotonic() - told:.1f} s later")
    assert found == "RUNNING"
    assert json.loads(
        str(query(root, "select max(parameters) from flow_run where auto_scheduled = 0 and name = 'drift'"))
    )["topics"] == [{"name": "arrays"}]


@pytest.mark.e2e
def test_stopping_cancels_the_run_under_way_and_frees_the_ports(started: tuple[Path, Config]) -> None:
    root, config = started
    run = str(
        query(root, "select max(id) from flow_run where state_type = 'RUNNING' and name = 'drift'")
        or create_run(config.services.prefect_port)
    )
    wait_for_state(root, run, "RUNNING")
    assert stop_services(root, report=print) == ["gateway", "deployments", "prefect", "mlflow"]
    assert query(root, "select state_type from flow_run where id = ?", run) == "CANCELLED"
    assert running_services(root, config) == []
    assert [
        find_port_fault(port)
        for port in (config.services.mlflow_port, config.services.prefect_port, config.gateway.port)
    ] == [None] * 3


@pytest.mark.e2e
def test_one_that_cannot_start_takes_the_others_down_and_says_why(tmp_path: Path, config: Config) -> None:
    home = tmp_path / ".ratchet" / "mlflow"
    home.mkdir(parents=True)
    write_params(tmp_path, config)
    (home / "mlflow.db").write_text("this is no database, and long enough to be taken for one " * 40)
    with pytest.raises(ServiceError, match=r"(?s)mlflow ended before it answered.*file is not a database"):
        start_services(tmp_path, config, report=print)
    assert running_services(tmp_path, config) == []
    assert find_port_fault(config.services.prefect_port) is None


def create_run(port: int) -> str:
    token = json.loads(ask(port, "GET", "/api/csrf-token?client=test")[1])["token"]
    deployment = json.loads(ask(port, "GET", "/api/deployments/name/retrain/pydoc")[1])["id"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "test"}
    status, body = ask(
        port, "POST", f"/api/deployments/{deployment}/create_flow_run", body={}, headers=headers
    )
    assert status == 201, body
    return str(json.loads(body)["id"])


def wait_for_state(root: Path, run: str, state: str) -> None:
    for _ in range(int(scaled(60))):
        seen = query(root, "select state_type from flow_run where id = ?", run)
        if seen == state:
            return
        time.sleep(1)
    pytest.fail(
        f"the run is {seen}, not {state}\n"
        + (root / ".ratchet" / "logs" / "deployments.log").read_text()[-3000:]
    )


def query(root: Path, statement: str, *values: str) -> object:
    connection = sqlite3.connect(root / ".ratchet" / "prefect" / "prefect.db", timeout=scaled(20))
    try:
        return connection.execute(statement, values).fetchone()[0]
    finally:
        connection.close()


def ask(
    port: int, method: str, path: str, *, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=scaled(20))
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
