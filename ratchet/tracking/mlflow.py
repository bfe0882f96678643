"""Copy runs to MLflow; the local files remain authoritative.

A training writes its curve to `history.jsonl`, each point with its time. A thread delivers the points to
MLflow while the training runs. Undelivered points are sent again later; sending a point twice changes
nothing. A run is found by its key (the hash of data, params and code), never by an id, so a stage that DVC
skipped also finds its run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratchet.errors import ServiceError

KEY_TAG = "ratchet.run_key"
PAGE = "RATCHET_MLFLOW_PAGE"  # MLflow's address for a browser, where MLFLOW_TRACKING_URI is none
STATE_TAG = "ratchet.state"
PASSWORD = re.compile(r"//[^/@\s]*@")  # user and password in a URL


def log_report(run_id: str, folder: Path, metrics: dict[str, float]) -> str:
    """Copy a drift report into its own folder of the run; return the URL of its page. Raises ServiceError."""
    client = mlflow_client()
    with mlflow_errors():
        client.log_artifacts(run_id, str(folder), f"monitor/{folder.name}")
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        experiment = client.get_run(run_id).info.experiment_id
    server = (os.environ.get(PAGE) or os.environ["MLFLOW_TRACKING_URI"]).rstrip("/")
    return f"{server}/#/experiments/{experiment}/runs/{run_id}/artifacts/monitor/{folder.name}"


def find_or_create_run(experiment: str, run_key: str, tags: dict[str, str]) -> str:
    """Return the id of the run with `run_key`; create the run if there is none. Raises ServiceError."""
    client = mlflow_client()
    with mlflow_errors():
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else create_experiment(client, experiment)
        run_id = find_run(experiment, run_key)
        if run_id:
            return run_id
        name = tags.get("mlflow.runName", run_key[:8])
        return str(
            client.create_run(experiment_id, tags={**tags, KEY_TAG: run_key}, run_name=name).info.run_id
        )


def create_experiment(client: Any, name: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return str(client.create_experiment(name))
    except MlflowException:  # another process created it first
        return str(client.get_experiment_by_name(name).experiment_id)


def find_run(experiment: str, run_key: str) -> str | None:
    client = mlflow_client()
    with mlflow_errors():
        found = client.get_experiment_by_name(experiment)
        runs = (
            client.search_runs(
                [found.experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{run_key}'", max_results=1
            )
            if found
            else []
        )
        return str(runs[0].info.run_id) if runs else None


def running_runs(experiment: str) -> list[Any]:
    """Return MLflow's runs of an experiment that are RUNNING. Raises ServiceError."""
    client = mlflow_client()
    with mlflow_errors():
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return []
        wanted = "attributes.status = 'RUNNING'"
        return list(client.search_runs([found.experiment_id], filter_string=wanted))


def mlflow_client() -> Any:
    """Return a client for MLFLOW_TRACKING_URI.

    Raises ServiceError if the variable is not set, because MLflow would then write to ./mlruns.
    """
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ServiceError(
            "MLFLOW_TRACKING_URI is not set",
            remedy="run it through `ratchet`, which sets it, or name your server there",
        )
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def find_outage() -> str:
    """Ask MLflow for one experiment, and return in one line why it cannot answer; empty if it does."""
    try:
        client = mlflow_client()
        with mlflow_errors():
            client.search_experiments(max_results=1)
    except ServiceError as error:
        return str(error).partition("\n")[0]
    return ""


class mlflow_errors:
    """Context manager that turns errors of MLflow and the network into ServiceError, without passwords."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        if isinstance(error, MlflowException | RequestException | ConnectionError):
            first = (str(error).splitlines() or [type(error).__name__])[0][:300]
            message = PASSWORD.sub("//", f"MLflow at {os.environ.get('MLFLOW_TRACKING_URI')}: {first}")
            raise ServiceError(
                message,
                remedy="`ratchet up` starts it; what was not delivered is delivered by the next `ratchet "
                "retrain`",
            ) from error


def parameters(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value, as text, of every setting."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from parameters(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
