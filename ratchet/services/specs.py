"""Plan the services that `ratchet up` starts: command, port and environment of each."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ratchet.errors import UserError
from ratchet.services.environment import HOST, NO_TELEMETRY, prefect_api, service_environment, service_folder

if TYPE_CHECKING:
    from ratchet.config.params import Config

FEDERATION = "federation"  # the service's name
GRACE_SECONDS = 8.0  # from SIGTERM to the next signal
KEEP_RUNS_DAYS, KEEP_EVENTS_DAYS = 30, 2  # in Prefect's database
LAST_WORDS_SECONDS = 20.0  # for the gateway to close its engine and write its log, after its last answer


@dataclass(frozen=True)
class Plan:
    """How one service is started. Its health is asked on `port`, which `key` names in params.yaml."""

    name: str
    port: int
    key: str | None  # None where the service listens on no port of its own
    settings: str  # the params that it depends on: when they change, the service has to be restarted
    command: list[str]
    folder: Path
    environment: dict[str, str]
    host: str = HOST  # on which its health is asked
    grace: float = GRACE_SECONDS
    deployment: str = ""  # of Prefect, that shows whether this service polls for work


def plan_services(root: Path, config: Config) -> dict[str, Plan]:
    """Plan every service. Raises UserError when two servers are to listen on one port."""
    services = config.services
    plans = (
        _plan_mlflow(root, services.mlflow_port),
        _plan_prefect(root, services.prefect_port),
        _plan_deployments(root, config),
        _plan_gateway(root, config),
    )
    keys: dict[int, str] = {}
    for plan in plans:
        if plan.key and keys.setdefault(plan.port, plan.key) != plan.key:
            raise UserError(
                f"{keys[plan.port]} and {plan.key} are both {plan.port}",
                remedy="give them different ports in params.yaml",
            )
    return {plan.name: plan for plan in plans}


def _plan_mlflow(root: Path, port: int) -> Plan:
    # Paths are relative to the service's folder: spaces and percent signs in a root would break a database
    # URL, and the folder can move.
    storage = [
        *("--backend-store-uri", "sqlite:///mlflow.db"),
        *("--artifacts-destination", "./artifacts", "--serve-artifacts"),
    ]
    # By default MLflow takes `10.*` for an address, so a page of 10.evil.example could ask it after rebinding
    # its name to 127.0.0.1.
    names = ",".join(f"{name}{place}" for name in (HOST, "localhost") for place in ("", ":*"))
    listen = [
        *("--host", HOST, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--no-access-log"),
        *("--allowed-hosts", names),
    ]
    environment = _drop(os.environ, "MLFLOW_") | {
        **NO_TELEMETRY,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    return Plan(
        "mlflow",
        port,
        "services.mlflow_port",
        f"services.mlflow_port: {port}",
        [sys.executable, "-m", "mlflow", "server", *storage, *listen],
        service_folder(root, "mlflow"),
        environment,
    )


def _plan_prefect(root: Path, port: int) -> Plan:
    environment = _drop(os.environ, "PREFECT_") | {
        **NO_TELEMETRY,
        "PREFECT_HOME": str(service_folder(root, "prefect")),
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
        # In memory, a restart would leave the slot of a crashed run taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # By default runs are kept for ever, and events for a week.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(KEEP_RUNS_DAYS * 86_400),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{KEEP_EVENTS_DAYS}D",
        "PREFECT_SERVER_UI_API_URL": prefect_api(port),
        # By default it writes into the installed package.
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(service_folder(root, "prefect") / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    # `prefect server start` in other words, with our guard around the app.
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "ratchet.services.prefect_server:create_app"),
        *("--host", HOST, "--port", str(port), "--log-level", "warning", "--no-server-header"),
    ]
    return Plan(
        "prefect",
        port,
        "services.prefect_port",
        f"services.prefect_port: {port}",
        command,
        service_folder(root, "prefect"),
        environment,
    )


def _plan_deployments(root: Path, config: Config) -> Plan:
    port = config.services.prefect_port
    environment = {
        **os.environ,
        **service_environment(root, config),
        "PREFECT_API_URL": prefect_api(port),
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
        "RATCHET_ROOT": str(root),
    }
    settings = (
        f"project.name: {config.project.name}, storage.url: {config.storage.url}, "
        f"services.prefect_port: {port}, retrain.cron: {config.retrain.cron}, "
        f"monitor.cron: {config.monitor.cron}"
    )
    return Plan(
        "deployments",
        port,
        None,
        settings,
        [sys.executable, "-m", "flows.deployments", "--end-lost-runs"],
        root,
        environment,
        deployment=f"retrain/{config.project.name}",
    )


def _plan_gateway(root: Path, config: Config) -> Plan:
    gateway = config.gateway
    # OMP_WAIT_POLICY: the gateway answers people while a training uses every core, so waiting threads sleep.
    # The training's own policy is in pipeline.checkout.child_environment.
    environment = {
        **_drop(os.environ, "MLFLOW_"),
        **NO_TELEMETRY,
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RATCHET_ROOT": str(root),
    }
    settings = (
        f"gateway: {gateway.model_dump(mode='json')}, request_log: "
        f"{config.request_log.model_dump(mode='json')}, storage.url: {config.storage.url}"
    )
    asked = {"0.0.0.0": HOST, "::": "::1", "localhost": HOST}  # noqa: S104 (asked, not listened on)
    host = asked.get(gateway.host, gateway.host)
    grace = gateway.drain_seconds + LAST_WORDS_SECONDS
    return Plan(
        "gateway",
        gateway.port,
        "gateway.port",
        settings,
        [sys.executable, "-m", "ratchet.gateway.server"],
        root,
        environment,
        host,
        grace,
    )


def _drop(environment: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Drop the variables with `prefix`, which may name the database or the address of another server."""
    return {name: value for name, value in environment.items() if not name.startswith(prefix)}


def plan_federation(root: Path, side: str, settings: str, config: Config) -> Plan:
    """Plan one side of a federation: "coordinator" or "node" (`ratchet.federation.link.party`)."""
    coordinator = side == "coordinator"
    environment = {
        **_drop(_drop(os.environ, "MLFLOW_"), "PREFECT_"),
        **NO_TELEMETRY,
        "RATCHET_ROOT": str(root),
    }
    return Plan(
        FEDERATION,
        config.federate.port,
        "federate.port" if coordinator else None,
        f"{side}: {settings}",
        [sys.executable, "-m", "ratchet.federation.link.party", side],
        root,
        environment,
    )
