"""MLflow, Prefect, the served deployments and the gateway on this machine: what `ratchet up`, `down` and `status` do.

Each service is a process group of its own, bound to 127.0.0.1, with a log in .ratchet/logs and a record in .ratchet/run. A record
holds the process id and the time at which that process was made, so that an id which the system gave away again is never killed.
Nobody watches over a service: one that dies stays dead until the next `ratchet up`. Neither Prefect nor MLflow is imported here.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from ratchet.errors import RatchetError, ServiceError, UserError
from ratchet.files import write_bytes

if TYPE_CHECKING:
    from ratchet.config.params import Config

HOST = "127.0.0.1"
HEALTH = {"mlflow": "/health", "prefect": "/api/health", "gateway": "/healthz"}
NAMES = ("mlflow", "prefect", "deployments", "gateway")
PROBE_SECONDS = 0.8
# Two processes made this near to each other cannot have had the same id; a clock set right by more than this hides our own.
SAME_START_SECONDS = 2.0
LAST_LINES = 15
GRACE_SECONDS = 8.0  # from SIGTERM to the next signal
LAST_WORDS_SECONDS = 20.0  # after its answers have ended the gateway lets go of its engine and writes its log
NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """A service as seen now. `alive`: its process runs; `answers`: and it said so within a second. `url` is for a browser."""

    name: str
    url: str | None
    pid: int | None
    log: Path
    alive: bool
    answers: bool


class Record(msgspec.Struct, frozen=True):
    """What is remembered of a started process. `created` is in seconds since 1970, `settings` the params it was started with."""

    name: str
    pid: int
    created: float
    port: int
    settings: str
    host: str = HOST
    grace: float = GRACE_SECONDS


@dataclass(frozen=True)
class Plan:
    """How one service is started. `port` is the one it is asked about on; `key` names it in params.yaml where the service listens on it."""

    name: str
    port: int
    key: str | None
    settings: str
    command: list[str]
    folder: Path
    environment: dict[str, str]
    host: str = HOST  # where it is asked
    grace: float = GRACE_SECONDS


def start_services(root: Path, config: Config, *, report: Report) -> list[Service]:
    """Start what does not run yet and wait until all of it answers. Raises UserError (a port is taken, settings changed) before anything starts.

    Raises ServiceError when one dies or does not answer in time; what this call started is then stopped again.
    """
    root = root.resolve()
    with _hold_lock(root):
        plans = plan_services(root, config)
        kept = {name for name, plan in plans.items() if _is_kept(root, plan)}
        for plan in plans.values():
            if plan.name not in kept and plan.key:
                require_free_port(plan.port, plan.key)
        for name in kept:
            report(f"{name}: runs already")
        try:
            _start_and_wait(root, plans, kept, config.services.start_timeout, report)
        except BaseException:
            for name in reversed(NAMES):
                if name not in kept:
                    _stop(root, name)
            raise
        return list_services(root, config)


def stop_services(root: Path, *, report: Report) -> list[str]:
    """End what `start_services` recorded, the deployments first, so that Prefect still hears how their runs ended. The names of what ran."""
    root = root.resolve()
    stopped = []
    for name in reversed(NAMES):
        if _stop(root, name):
            report(f"{name}: stopped")
            stopped.append(name)
    return stopped


def list_services(root: Path, config: Config) -> list[Service]:
    """All services, running or not, in under a second."""
    root = root.resolve()
    with ThreadPoolExecutor(len(NAMES)) as pool:
        return list(pool.map(lambda name: _see_service(root, name, config), NAMES))


def running_services(root: Path, config: Config) -> list[Service]:
    """The services of `root` whose process runs."""
    return [service for service in list_services(root, config) if service.alive]


def service_environment(root: Path, config: Config) -> dict[str, str]:
    """Variables for flows and stages; they have to stand before Prefect or MLflow is imported.

    PREFECT_API_URL is among them only when it is set already or our server answers; MLFLOW_TRACKING_URI always is.
    """
    services = config.services
    environment = {
        **NO_TELEMETRY,
        **_reach_loopback_directly(),
        "PREFECT_HOME": str(_home(root.resolve(), "prefect")),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the default is pickle
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # Without `ratchet up` a flow brings a server of its own, for as long as it runs; 20 s are too few on a busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(services.start_timeout),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds, the lowest that it takes; 180 is the default
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI") or f"http://{HOST}:{services.mlflow_port}",
        # With the defaults, 7 retries and 120 s, a call stalls for four minutes when the server is away.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": os.environ.get("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1"),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    api = os.environ.get("PREFECT_API_URL") or (_prefect_api(services.prefect_port) if _get(HOST, services.prefect_port, HEALTH["prefect"]) is not None else None)
    return environment | ({"PREFECT_API_URL": api} if api else {})


def plan_services(root: Path, config: Config) -> dict[str, Plan]:
    """Raises UserError when two servers are to listen on one port."""
    services = config.services
    plans = (_plan_mlflow(root, services.mlflow_port), _plan_prefect(root, services.prefect_port), _plan_deployments(root, config), _plan_gateway(root, config))
    keys: dict[int, str] = {}
    for plan in plans:
        if plan.key and keys.setdefault(plan.port, plan.key) != plan.key:
            raise UserError(f"{keys[plan.port]} and {plan.key} are both {plan.port}", remedy="give them different ports in params.yaml")
    return {plan.name: plan for plan in plans}


def _plan_mlflow(root: Path, port: int) -> Plan:
    # Relative to the folder that it runs in: a root with spaces or percent signs is no trouble in a database URL, and the folder can move.
    storage = ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "./artifacts", "--serve-artifacts"]
    listen = ["--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--no-access-log"]
    environment = _drop(os.environ, "MLFLOW_") | {
        **NO_TELEMETRY,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    return Plan(
        "mlflow", port, "services.mlflow_port", f"services.mlflow_port: {port}", [sys.executable, "-m", "mlflow", "server", *storage, *listen], _home(root, "mlflow"), environment
    )


def _plan_prefect(root: Path, port: int) -> Plan:
    environment = _drop(os.environ, "PREFECT_") | {
        **NO_TELEMETRY,
        "PREFECT_HOME": str(_home(root, "prefect")),
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        # In memory, a restart would leave the slot of a crashed run taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_UI_API_URL": _prefect_api(port),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(_home(root, "prefect") / "ui"),  # by default it writes into the installed package
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return Plan("prefect", port, "services.prefect_port", f"services.prefect_port: {port}", command, _home(root, "prefect"), environment)


def _plan_deployments(root: Path, config: Config) -> Plan:
    port = config.services.prefect_port
    environment = {**os.environ, **service_environment(root, config), "PREFECT_API_URL": _prefect_api(port), "PREFECT_RUNNER_POLL_FREQUENCY": "1", "RATCHET_ROOT": str(root)}
    settings = f"services.prefect_port: {port}, retrain.cron: {config.retrain.cron}, monitor.cron: {config.monitor.cron}"
    return Plan("deployments", port, None, settings, [sys.executable, "-m", "flows.deployments", "--end-lost-runs"], root, environment)


def _plan_gateway(root: Path, config: Config) -> Plan:
    gateway = config.gateway
    # It answers people while a training takes every core: the training's threads are told to sleep when they wait (workspace.child_environment).
    environment = {**_drop(os.environ, "MLFLOW_"), **NO_TELEMETRY, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RATCHET_ROOT": str(root)}
    settings = f"gateway: {gateway.model_dump(mode='json')}, request_log: {config.request_log.model_dump(mode='json')}"
    host = {"0.0.0.0": HOST, "::": "::1", "localhost": HOST}.get(gateway.host, gateway.host)  # noqa: S104 (asked, not listened on)
    grace = gateway.drain_seconds + LAST_WORDS_SECONDS
    return Plan("gateway", gateway.port, "gateway.port", settings, [sys.executable, "-m", "ratchet.gateway.server"], root, environment, host, grace)


def _drop(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    """A shell set up for another server (its database, its address) must not reach into ours."""
    return {name: value for name, value in environment.items() if not name.startswith(prefix)}


def _reach_loopback_directly() -> dict[str, str]:
    """A company's proxy cannot reach this machine's 127.0.0.1."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    value = ",".join(filter(None, [known, HOST, "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def require_free_port(port: int, key: str) -> None:
    """Raises UserError with what holds the port, as far as the system tells, and the key in params.yaml to change."""
    fault = find_port_fault(port)
    if fault:
        raise UserError(f"{key} is {port}: {fault}", remedy=f"stop that, or set {key} in params.yaml to another port")


def find_port_fault(port: int) -> str | None:
    """Why nothing of ours could listen on 127.0.0.1:port, or None."""
    with socket.socket() as probe:
        probe.settimeout(PROBE_SECONDS)
        # Where another process listens on all addresses, macOS lets us bind to one of them; its AirPlay receiver takes 5000 in that way.
        taken = probe.connect_ex((HOST, port)) == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "the system does not let this user listen on it"
        except OSError:
            taken = True
    return f"it is in use by {find_port_holder(port) or 'a process that the system does not name'}" if taken else None


def find_port_holder(port: int) -> str | None:
    """Such as `process 4242 (python in /some/folder)`; None where the system does not tell."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN and connection.pid:
                process = psutil.Process(connection.pid)
                # Its name and folder; its arguments may hold secrets.
                return f"process {process.pid} ({process.name()} in {process.cwd()})"
    return None


def _is_kept(root: Path, plan: Plan) -> bool:
    """Raises UserError when it runs, but with other settings: a restart by itself could cut a training short."""
    record = _read_record(root, plan.name)
    if record is None or _find_process(record) is None:
        return False
    if record.settings != plan.settings:
        raise UserError(f"{plan.name} was started with {record.settings}; params.yaml now says {plan.settings}", remedy="ratchet down, then ratchet up")
    return True


def _start_and_wait(root: Path, plans: dict[str, Plan], kept: set[str], timeout: float, report: Report) -> None:
    """The servers at once, since each takes 10 to 30 s on two cores; the deployments as soon as Prefect answers."""
    since = dict.fromkeys(plans, time.monotonic())
    waiting = {"mlflow", "prefect", "gateway"} | kept
    for name in sorted(waiting - kept):
        _start(root, plans[name], report)
    while waiting:
        for name in sorted(waiting):
            if _is_ready(root, plans[name], time.monotonic() - since[name], timeout):
                waiting.remove(name)
                report(f"{name}: answers after {time.monotonic() - since[name]:.0f} s on {_page(name, plans[name].port)}")
                if name == "prefect" and "deployments" not in kept:
                    _start(root, plans["deployments"], report)
                    since["deployments"] = time.monotonic()
                    waiting.add("deployments")
        time.sleep(0.3)


def _start(root: Path, plan: Plan, report: Report) -> None:
    log = _log(root, plan.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    plan.folder.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))  # the last words of the one before
    environment = {**plan.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(plan.command, cwd=plan.folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    process.returncode = 0  # it outlives us by design; Popen would warn of a child that was left behind
    record = Record(plan.name, process.pid, psutil.Process(process.pid).create_time(), plan.port, plan.settings, plan.host, plan.grace)
    write_bytes(_record_path(root, plan.name), [msgspec.json.encode(record)])
    report(f"{plan.name}: starts, process {process.pid}, log {log}")


def _is_ready(root: Path, plan: Plan, waited: float, timeout: float) -> bool:
    """Raises ServiceError with the log's last lines when the process died or took too long."""
    record = _read_record(root, plan.name)
    if record is None or _find_process(record) is None:
        raise ServiceError(f"{plan.name} ended before it answered\n{_quote_log(root, plan.name)}", remedy="the log says why; ratchet doctor looks for known causes")
    if _answers(record):
        return True
    if waited > timeout:
        raise ServiceError(
            f"{plan.name} does not answer after {timeout:.0f} s\n{_quote_log(root, plan.name)}",
            remedy="set services.start_timeout higher in params.yaml if the machine is only slow",
        )
    return False


def _quote_log(root: Path, name: str) -> str:
    log = _log(root, name)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []
    return "\n".join([f"the last lines of {log}:", *(f"  | {line}" for line in lines)])


def _stop(root: Path, name: str) -> bool:
    """Whether there was something to stop."""
    record = _read_record(root, name)
    process = _find_process(record) if record else None
    if process is not None:
        _end_family(process, record.grace if record else GRACE_SECONDS)
    _record_path(root, name).unlink(missing_ok=True)
    return process is not None


def _end_family(leader: psutil.Process, grace: float) -> None:
    """SIGTERM to the leader, which ends its own children best; after `grace` seconds at most to all that is left of them; 2 s later SIGKILL.

    A flow run that gets SIGTERM before its runner has told it why would report a crash instead of a cancellation.
    """
    family = _find_family(leader)
    _signal([leader], signal.SIGTERM, seconds=grace)
    left = _signal(family, signal.SIGTERM, seconds=2)
    _signal(left, signal.SIGKILL, seconds=5)


def _signal(processes: list[psutil.Process], number: signal.Signals, *, seconds: float) -> list[psutil.Process]:
    """Returns those that still run when all have ended or the time is up."""
    for process in processes:
        with suppress(psutil.Error):  # psutil compares the time of creation first
            process.send_signal(number)
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return list(left)


def _find_family(leader: psutil.Process) -> list[psutil.Process]:
    """The leader, its process group, and its descendants, who may have made groups of their own."""
    found = {leader.pid: leader}
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.getpgid(process.pid) == leader.pid:
                found[process.pid] = process
    with suppress(psutil.Error):
        found |= {process.pid: process for process in leader.children(recursive=True)}
    return list(found.values())


def _see_service(root: Path, name: str, config: Config) -> Service:
    record = _read_record(root, name)
    process = _find_process(record) if record else None
    ports = {"mlflow": config.services.mlflow_port, "gateway": config.gateway.port}
    port = record.port if record and process else ports.get(name, config.services.prefect_port)
    return Service(name, _page(name, port), process.pid if process else None, _log(root, name), process is not None, bool(process and record and _answers(record)))


def _read_record(root: Path, name: str) -> Record | None:
    """Raises RatchetError for a file that is no record: what it spoke of may still run."""
    path = _record_path(root, name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RatchetError(f"{path} is no record of a service: {error}", remedy=f"end the process of {name} by hand if it runs, then remove the file") from None


def _find_process(record: Record) -> psutil.Process | None:
    """The process that was recorded, or None when it ended, whoever has its id now."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.created) < SAME_START_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _answers(record: Record) -> bool:
    return _has_polled(record) if record.name == "deployments" else _answers_health(record)


def _answers_health(record: Record) -> bool:
    return _get(record.host, record.port, HEALTH[record.name]) is not None


def _has_polled(record: Record) -> bool:
    """Whether this very process asked Prefect for work: the deployment itself stays registered when its process is gone."""
    body = _get(record.host, record.port, "/api/deployments/name/retrain/retrain")  # one for all: they are asked about together
    deployment = json.loads(body) if body else {}
    polled = deployment.get("last_polled") or "1970-01-01T00:00:00Z"
    return deployment.get("status") == "READY" and datetime.fromisoformat(polled).timestamp() >= record.created


def _get(host: str, port: int, path: str) -> bytes | None:
    """The body of a 200, past any proxy; None for everything else."""
    connection = http.client.HTTPConnection(host, port, timeout=PROBE_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        return body if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@contextmanager
def _hold_lock(root: Path) -> Iterator[None]:
    """Two `ratchet up` at once would each start the servers, and one of them would be forgotten. Raises UserError."""
    path = root / ".ratchet" / "run" / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `ratchet up` is at work in {root}", remedy="wait for it") from None
        yield


def _home(root: Path, name: str) -> Path:
    return root / ".ratchet" / name


def _log(root: Path, name: str) -> Path:
    return root / ".ratchet" / "logs" / f"{name}.log"


def _record_path(root: Path, name: str) -> Path:
    return root / ".ratchet" / "run" / f"{name}.json"


def _prefect_api(port: int) -> str:
    return f"http://{HOST}:{port}/api"


def _page(name: str, port: int) -> str:
    return f"http://{HOST}:{port}" + ("/deployments" if name == "deployments" else "")
