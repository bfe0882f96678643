"""Environment variables of flows on this machine; Prefect and MLflow read them when they are imported."""

from __future__ import annotations

import base64
import http.client
import logging
import os
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from ratchet.config.params import Config
from ratchet.tracking.mlflow import PAGE, PASSWORD

# Flows print their own lines (flows/console.py), so Prefect's console log shows only faults.
# MLflow's lines stay out of stdout, which holds a command's result.
CONSOLE = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # else each event that it cannot send is 30 lines on stderr
    "PREFECT_CLIENT_MAX_RETRIES": "3",  # with 5, each call took 75 s when the server had gone away
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "RATCHET_CONSOLE": "1",
}
HOST = "127.0.0.1"
HEALTH = {"mlflow": "/health", "prefect": "/api/health", "gateway": "/healthz"}
# Variables that name a server of one's own: how a process reaches it, and how a browser does.
ADDRESSES = {
    "mlflow": "MLFLOW_TRACKING_URI",
    "prefect": "PREFECT_API_URL",
    "deployments": "PREFECT_API_URL",
    "gateway": "RATCHET_GATEWAY_URL",
}
PAGES = {
    "mlflow": PAGE,
    "prefect": "PREFECT_UI_URL",
    "deployments": "PREFECT_UI_URL",
    "gateway": "RATCHET_GATEWAY_PAGE",
}
PROBE_SECONDS = 0.8  # `status` asks four services at once and answers within a second
# How long a flow waits for its server. A closed port refuses at once, so the wait costs time only where a
# busy server answers late. With 0.8 s, a flow on a busy machine missed its server and started another.
ANSWER_SECONDS = 20.0
NO_TELEMETRY = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def enter(root: Path, config: Config) -> None:
    """Set the variables in this process; server addresses that the user has set are kept."""
    for name, value in CONSOLE.items():
        os.environ.setdefault(name, value)
    os.environ.update(service_environment(root, config), RATCHET_ROOT=str(root))
    logging.raiseExceptions = False  # else each line that Prefect does not take is an error on stderr
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only


def service_environment(root: Path, config: Config) -> dict[str, str]:
    """Return the variables for flows and stages.

    PREFECT_API_URL is among them only when it is set already or our server answers; MLFLOW_TRACKING_URI
    always is.
    """
    services = config.services
    environment = {
        **NO_TELEMETRY,
        **_reach_loopback_directly(),
        "PREFECT_HOME": str(service_folder(root.resolve(), "prefect")),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # the default is pickle
        "PREFECT_LOGGING_LEVEL": os.environ.get("PREFECT_LOGGING_LEVEL", "INFO"),
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # Without `ratchet up` a flow starts a server for as long as it runs. Prefect's default wait of 20 s
        # is too short on a busy machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(services.start_timeout),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds, the least Prefect takes; 180 is the default
        "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI")
        or f"http://{HOST}:{services.mlflow_port}",
        # With the defaults, 7 retries and 120 s, a call stalls for four minutes when the server is away.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": os.environ.get("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1"),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    api = os.environ.get("PREFECT_API_URL") or (
        prefect_api(services.prefect_port)
        if fetch_body(HOST, services.prefect_port, HEALTH["prefect"], seconds=ANSWER_SECONDS) is not None
        else None
    )
    return environment | ({"PREFECT_API_URL": api} if api else {})


def _reach_loopback_directly() -> dict[str, str]:
    """Exclude loopback from any proxy: a company's proxy cannot reach this machine's 127.0.0.1."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    value = ",".join(filter(None, [known, HOST, "localhost"]))
    return {"NO_PROXY": value, "no_proxy": value}


def given_address(name: str) -> str | None:
    """Return the address of a service that the environment names, without path and password; else None."""
    given = os.environ.get(ADDRESSES[name])
    return PASSWORD.sub("//", given).rstrip("/").removesuffix("/api") if given else None


def page_of(name: str, address: str) -> str:
    """Return the address of a service's page for a browser."""
    page = (os.environ.get(PAGES[name]) or address).rstrip("/")
    return f"{page}/deployments" if name == "deployments" else page


def mlflow_answers() -> bool:
    """Return whether MLflow answers where MLFLOW_TRACKING_URI says; a database needs no server to."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    return bool(server) and (
        not server.startswith("http") or fetch_from(server, HEALTH["mlflow"]) is not None
    )


def fetch_from(address: str, path: str, headers: dict[str, str] | None = None) -> bytes | None:
    """Return the body of a 200 response of an address such as http://mlflow:5000; None for anything else."""
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    secure = parts.scheme == "https"
    return fetch_body(
        parts.hostname,
        port or (443 if secure else 80),
        f"{parts.path.rstrip('/')}{path}",
        headers=headers,
        secure=secure,
    )


def prefect_headers() -> dict[str, str]:
    """Return the header with which Prefect's API lets this process in, as Prefect's own client finds it.

    PREFECT_API_AUTH_STRING may stand in the environment or in the active profile of PREFECT_PROFILES_PATH.
    """
    secret, profiles = os.environ.get("PREFECT_API_AUTH_STRING"), os.environ.get("PREFECT_PROFILES_PATH")
    if not secret and profiles:
        try:
            found = tomllib.loads(Path(profiles).read_text(encoding="utf-8"))
            secret = found["profiles"][found["active"]]["PREFECT_API_AUTH_STRING"]
        except (OSError, KeyError, TypeError, ValueError):
            return {}
    if not secret:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


def fetch_body(
    host: str,
    port: int,
    path: str,
    *,
    seconds: float = PROBE_SECONDS,
    headers: dict[str, str] | None = None,
    secure: bool = False,
) -> bytes | None:
    """Return the body of a 200 response, without any proxy; None for every other outcome."""
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(host, port, timeout=seconds)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        body = response.read()
        return body if response.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def service_folder(root: Path, name: str) -> Path:
    """Return the folder in which a service keeps its database and files."""
    return root / ".ratchet" / name


def prefect_api(port: int) -> str:
    return f"http://{HOST}:{port}/api"
