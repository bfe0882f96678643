"""Start, stop and list MLflow, Prefect, the served deployments and the gateway on this machine.

Each service is a process group of its own, bound to 127.0.0.1, with a log in .ratchet/logs and a record in
.ratchet/run. A record holds the process id, that process's creation time and its machine or container, so
that another process with the same id is never killed. A service that dies stays down until the next
`ratchet up`.
Neither Prefect nor MLflow is imported here.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from ratchet.errors import RatchetError, ServiceError, UserError
from ratchet.files import write_bytes
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.processes import find_process
from ratchet.pipeline.workspace import running
from ratchet.services.environment import (
    HEALTH,
    HOST,
    fetch_body,
    fetch_from,
    given_address,
    page_of,
    prefect_headers,
)
from ratchet.services.processes import end_family, name_place, require_free_port
from ratchet.services.specs import GRACE_SECONDS, Plan, plan_services

if TYPE_CHECKING:
    from ratchet.config.params import Config
NAMES = ("mlflow", "prefect", "deployments", "gateway")
LAST_LINES = 15  # of a log, quoted in a message
POLLED = timedelta(seconds=60)  # after which Prefect itself takes a deployment's process for gone

Report = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """A service as seen now.

    `alive`: `ratchet up` started it here, and its process runs. `answers`: it replied within a second,
    whoever started it. `given`: its address is from the environment.
    """

    name: str
    url: str | None  # for a browser
    pid: int | None
    log: Path
    alive: bool
    answers: bool
    given: bool = False


class Record(msgspec.Struct, frozen=True):
    """What is remembered of a started process."""

    name: str
    pid: int
    created: float  # seconds since 1970
    port: int
    settings: str  # the params it was started with
    host: str = HOST
    grace: float = GRACE_SECONDS
    deployment: str = "retrain/retrain"  # as it was named when records did not have it
    place: str = ""  # `name_place()`; empty in records of older versions


def start_services(root: Path, config: Config, *, report: Report) -> list[Service]:
    """Start what does not run yet and wait until all of it answers.

    Raises UserError before anything starts: a port is taken, or settings changed. Raises ServiceError when
    one dies or does not answer in time; what this call started is then stopped again.
    """
    root = root.resolve()
    with locked(
        root, "up", wait=False
    ):  # two at once would both start the servers, and the records of one would be lost
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
                    stop_service(root, name)
            raise
        return list_services(root, config)


def start_service(
    root: Path,
    plan: Plan,
    is_ready: Callable[[], bool],
    timeout: float,
    report: Report,
    before: Callable[[], object],
) -> None:
    """Start one service that is not among those of `ratchet up`, and wait until it is ready.

    `before` ends what an earlier process left, where it does not run. Raises ServiceError when it dies or
    takes too long; it is stopped then.
    """
    root, began = root.resolve(), time.monotonic()
    with locked(root, "up", wait=False):
        if _is_kept(root, plan):
            report(f"{plan.name}: runs already")
            return
        before()
        if plan.key:
            require_free_port(plan.port, plan.key)
        _start(root, plan, report)
        try:
            while not _is_ready(root, plan, time.monotonic() - began, timeout, lambda _: is_ready()):
                time.sleep(0.3)
        except BaseException:
            stop_service(root, plan.name)
            raise


def is_running(root: Path, name: str) -> bool:
    """Return whether the process of a service runs."""
    record = _read_record(root.resolve(), name)
    return bool(record and _find_process(record))


def require_no_runs(root: Path, *, wait: bool, report: Report) -> None:
    """Raise UserError when a run is under way in a workspace of this checkout, or wait until none is."""
    told = ""
    while runs := running(root.resolve()):
        line = ", ".join(f"`{purpose}` since {start:%H:%M} UTC" for purpose, start in runs)
        if not wait:
            raise UserError(
                f"a run is under way, which would lose its services: {line}",
                remedy="`ratchet down --wait` stops them after it; with --force, a run that Prefect started "
                "is cancelled, and one that a command started goes on without MLflow and Prefect",
            )
        if line != told:
            report(f"waits for {line}")
        told = line
        time.sleep(1.0)


def stop_services(root: Path, *, report: Report) -> list[str]:
    """End what `start_services` recorded and return the names of what ran.

    The deployments end before Prefect, so that Prefect still learns how their runs ended.
    """
    root = root.resolve()
    stopped = []
    for name in reversed(NAMES):
        record = _read_record(root, name)
        if record and not _is_of_here(record):
            report(
                f"{name}: nothing ended, since it was started before a restart of this machine, on another "
                "machine or in a container"
            )
        elif stop_service(root, name):
            report(f"{name}: stopped")
            stopped.append(name)
    return stopped


def list_services(root: Path, config: Config) -> list[Service]:
    """List all services, running or not, in under a second."""
    root = root.resolve()
    with ThreadPoolExecutor(len(NAMES)) as pool:
        return list(pool.map(lambda name: _see_service(root, name, config), NAMES))


def running_services(root: Path, config: Config) -> list[Service]:
    """List the services of `root` whose process runs."""
    return [service for service in list_services(root, config) if service.alive]


def _is_kept(root: Path, plan: Plan) -> bool:
    """Say whether the service runs already. Raises UserError when it does, but with other settings.

    Restarting it here could cut a training short.
    """
    record = _read_record(root, plan.name)
    if record is None or _find_process(record) is None:
        return False
    if record.settings != plan.settings:
        raise UserError(
            f"{plan.name} was started with {record.settings}; params.yaml now says {plan.settings}",
            remedy="ratchet down, then ratchet up",
        )
    return True


def _start_and_wait(
    root: Path, plans: dict[str, Plan], kept: set[str], timeout: float, report: Report
) -> None:
    """Start the servers together, since each takes 10 to 30 s on two cores, then wait.

    The deployments start as soon as Prefect answers.
    """
    since = dict.fromkeys(plans, time.monotonic())
    waiting = {"mlflow", "prefect", "gateway"} | kept
    for name in sorted(waiting - kept):
        _start(root, plans[name], report)
    while waiting:
        for name in sorted(waiting):
            if _is_ready(root, plans[name], time.monotonic() - since[name], timeout):
                waiting.remove(name)
                report(
                    f"{name}: answers after {time.monotonic() - since[name]:.0f} s on "
                    f"{_page(name, plans[name].port)}"
                )
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
        log.replace(log.with_suffix(".log.1"))  # the log of the process before
    environment = {**plan.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            plan.command,
            cwd=plan.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.returncode = 0  # it outlives us by design; Popen would warn of a child that was left behind
    record = Record(
        plan.name,
        process.pid,
        psutil.Process(process.pid).create_time(),
        plan.port,
        plan.settings,
        plan.host,
        plan.grace,
        plan.deployment,
        name_place(),
    )
    write_bytes(_record_path(root, plan.name), [msgspec.json.encode(record)])
    report(f"{plan.name}: starts, process {process.pid}, log {log}")


def _is_ready(
    root: Path,
    plan: Plan,
    waited: float,
    timeout: float,
    answers: Callable[[Record], bool] | None = None,
) -> bool:
    """Ask the service, by `answers` where it is not asked over HTTP.

    Raises ServiceError with the log's last lines when it died or took too long.
    """
    record = _read_record(root, plan.name)
    if record is None or _find_process(record) is None:
        raise ServiceError(
            f"{plan.name} ended before it answered\n{_quote_log(root, plan.name)}",
            remedy="the log says why; ratchet doctor looks for known causes",
        )
    if (answers or _answers)(record):
        return True
    if waited > timeout:
        raise ServiceError(
            f"{plan.name} does not answer after {timeout:.0f} s\n{_quote_log(root, plan.name)}",
            remedy="set services.start_timeout higher in params.yaml if the machine is only slow",
        )
    return False


def _quote_log(root: Path, name: str) -> str:
    log = _log(root, name)
    lines = (
        log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.exists() else []
    )
    return "\n".join([f"the last lines of {log}:", *(f"  | {line}" for line in lines)])


def stop_service(root: Path, name: str) -> bool:
    """End the service and drop its record; say whether it ran."""
    record = _read_record(root, name)
    if record and not _is_of_here(record):
        return False
    process = _find_process(record) if record else None
    if process is not None:
        end_family(process, record.grace if record else GRACE_SECONDS)
    _record_path(root, name).unlink(missing_ok=True)
    return process is not None


def _see_service(root: Path, name: str, config: Config) -> Service:
    record = _read_record(root, name)
    process = _find_process(record) if record else None
    ports = {"mlflow": config.services.mlflow_port, "gateway": config.gateway.port}
    port = record.port if record and process else ports.get(name, config.services.prefect_port)
    given = given_address(name)
    if record and process and not given:
        page, answers = _page(name, port), _answers(record)
    else:
        address = given or f"http://{HOST}:{port}"
        page, answers = page_of(name, address), _answers_at(name, address, config)
    return Service(
        name,
        page,
        process.pid if process else None,
        _log(root, name),
        process is not None,
        answers,
        given is not None,
    )


def _answers_at(name: str, address: str, config: Config) -> bool:
    """Ask a service that may be another machine's or container's."""
    if name != "deployments":
        return fetch_from(address, HEALTH[name]) is not None
    asked = f"/api/deployments/name/retrain/{config.project.name}"
    body = fetch_from(address, asked, prefect_headers())
    return _is_polled(body, since=datetime.now(UTC) - POLLED)


def _read_record(root: Path, name: str) -> Record | None:
    """Read a service's record. Raises RatchetError for a broken file: the process it named may still run."""
    path = _record_path(root, name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise RatchetError(
            f"{path} is no record of a service: {error}",
            remedy=f"end the process of {name} by hand if it runs, then remove the file",
        ) from None


def _find_process(record: Record) -> psutil.Process | None:
    return find_process(record.pid, record.created) if _is_of_here(record) else None


def _is_of_here(record: Record) -> bool:
    return record.place in ("", name_place())


def _answers(record: Record) -> bool:
    return _has_polled(record) if record.name == "deployments" else _answers_health(record)


def _answers_health(record: Record) -> bool:
    return fetch_body(record.host, record.port, HEALTH[record.name]) is not None


def _has_polled(record: Record) -> bool:
    """Say whether the recorded process has asked Prefect for work.

    A registered deployment does not prove it: it stays registered when its process is gone.
    """
    # One stands for all: the process polls for all of them together.
    body = fetch_body(record.host, record.port, f"/api/deployments/name/{record.deployment}")
    return _is_polled(body, since=datetime.fromtimestamp(record.created, UTC))


def _is_polled(body: bytes | None, since: datetime) -> bool:
    deployment = json.loads(body) if body else {}
    polled = deployment.get("last_polled") or "1970-01-01T00:00:00Z"
    return deployment.get("status") == "READY" and datetime.fromisoformat(polled) >= since


def _log(root: Path, name: str) -> Path:
    return root / ".ratchet" / "logs" / f"{name}.log"


def _record_path(root: Path, name: str) -> Path:
    return root / ".ratchet" / "run" / f"{name}.json"


def _page(name: str, port: int) -> str:
    return f"http://{HOST}:{port}" + ("/deployments" if name == "deployments" else "")
