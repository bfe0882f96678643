"""MLflow gets a copy; the truth is the local file.

A training writes its curve to `history.jsonl`, each point with its time. A thread delivers the lines to MLflow while the
training runs; what it could not deliver is delivered again later, and a point that is already there changes nothing. A
run is found by its key (hash of data, params and code), never by an id, so a stage that DVC skipped has a run as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratchet.errors import ServiceError

KEY_TAG = "ratchet.run_key"
STATE_TAG = "ratchet.state"
PASSWORD = re.compile(r"//[^/@\s]*@")  # with its user, in an address


def log_report(run_id: str, folder: Path, metrics: dict[str, float]) -> str:
    """Copy a drift report to the run, one folder a report; the page to look at. Raises ServiceError."""
    client = mlflow_client()
    with mlflow_errors():
        client.log_artifacts(run_id, str(folder), f"monitor/{folder.name}")
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)
        experiment = client.get_run(run_id).info.experiment_id
    return f"{os.environ['MLFLOW_TRACKING_URI'].rstrip('/')}/#/experiments/{experiment}/runs/{run_id}/artifacts/monitor/{folder.name}"


def find_or_create_run(experiment: str, run_key: str, tags: dict[str, str]) -> str:
    """Id of the run with that key. Raises ServiceError when MLflow does not answer."""
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
    except MlflowException:  # somebody else was first
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


def mlflow_client() -> Any:
    """A client for MLFLOW_TRACKING_URI. Raises ServiceError when the variable is not set: MLflow would then write to ./mlruns."""
    from mlflow import MlflowClient

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ServiceError(
            "MLFLOW_TRACKING_URI is not set",
            remedy="run it through `ratchet`, which sets it, or name your server there",
        )
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


class mlflow_errors:
    """MLflow's and the network's faults as one ServiceError."""

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
    """(dotted key, value) of every knob."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from parameters(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
