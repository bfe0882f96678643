"""The variables under which flows run in this process; they have to stand before Prefect or MLflow is imported."""

from __future__ import annotations

import http.client
import os
from pathlib import Path

from ratchet.config.params import Config

# Flows print their own lines (flows/console.py); of Prefect's console log people get what is wrong, and MLflow's stays out of stdout.
CONSOLE = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RATCHET_CONSOLE": "1",
}
HOST = "127.0.0.1"
HEALTH = {"mlflow": "/health", "prefect": "/api/health", "gateway": "/healthz"}
PROBE_SECONDS = 0.8
NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def enter(root: Path, config: Config) -> None:
    """Set them. A variable of the user's that names another server wins."""
    for name, value in CONSOLE.items():
        os.environ.setdefault(name, value)
    os.environ.update(service_environment(root, config), RATCHET_ROOT=str(root))
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only


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
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")
        or f"http://{HOST}:{services.mlflow_port}",
        # With the defaults, 7 retries and 120 s, a call stalls for four minutes when the server is away.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": os.environ.get("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1"),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    api = os.environ.get("PREFECT_API_URL") or (
        _prefect_api(services.prefect_port)
        if _get(HOST, services.prefect_port, HEALTH["prefect"]) is not None
        else None
    )
    return environment | ({"PREFECT_API_URL": api} if api else {})


def _reach_loopback_directly() -> dict[str, str]:
    """A company's proxy cannot reach this machine's 127.0.0.1."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    value = ",".join(filter(None, [known, HOST, "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


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


def _home(root: Path, name: str) -> Path:
    return root / ".ratchet" / name


def _prefect_api(port: int) -> str:
    return f"http://{HOST}:{port}/api"
