"""Trials as MLflow runs, nested in one of their study.

Found by tags, so doing it twice changes nothing; a tracker that is away costs the sweep nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.config.params import Config
from ratchet.errors import ConfigError
from ratchet.files import read_json, write_text
from ratchet.tracking.curve import log_points
from ratchet.tracking.mlflow import STATE_TAG, create_experiment, mlflow_client, mlflow_errors, parameters
from ratchet.training.search_space import with_changes

STUDY_TAG, TRIAL_TAG = "ratchet.sweep", "ratchet.trial"
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "fail": "FAILED"}
DELIVERED = ".delivered"


def deliver(folder: Path, config: Config) -> int:
    """Every record of a study's folder that MLflow does not have yet; how many.

    Raises ServiceError when it does not answer.
    """
    waiting = [
        path for path in sorted(folder.glob("trial-*.json")) if not path.with_suffix(DELIVERED).exists()
    ]
    for path in waiting:
        run_id = _record(read_json(path), config)
        write_text(path.with_suffix(DELIVERED), f"{run_id}\n")
    return len(waiting)


def close_study(study: str, config: Config, summary: dict[str, Any]) -> str:
    """Id of the study's run, which tells its outcome."""
    client = mlflow_client()
    run_id = _find_or_create(study, "study", config, {"mlflow.runName": f"sweep-{study}"}, began=None)
    with mlflow_errors():
        if summary["best"]:
            client.log_metric(run_id, "validation_loss", summary["best"]["value"])
            client.set_tag(run_id, "ratchet.best", summary["best"]["command"])
        client.set_tag(run_id, "ratchet.trials", str(summary["trials"]))
        client.set_terminated(run_id, "FINISHED")
    return run_id


def _record(record: dict[str, Any], config: Config) -> str:
    client = mlflow_client()
    parent = _find_or_create(
        record["study"], "study", config, {"mlflow.runName": f"sweep-{record['study']}"}, began=None
    )
    tags = {
        "mlflow.runName": f"trial-{record['number']}",
        "mlflow.parentRunId": parent,
        "ratchet.reproduce": record["command"],
        "ratchet.git_commit": record["commit"],
    }
    run_id = _find_or_create(record["study"], str(record["number"]), config, tags, began=record["began"])
    log_points(run_id, record["points"])
    with mlflow_errors():
        known = client.get_run(run_id).data.params
        for key, value in _params(record, config).items():
            if key not in known:
                client.log_param(run_id, key, value[:500])
        for key, value in record["figures"].items():
            if isinstance(value, int | float):
                client.log_metric(run_id, f"train/{key}", float(value), timestamp=int(record["ended"] * 1000))
        if record["value"] is not None:
            client.log_metric(run_id, "objective", record["value"], timestamp=int(record["ended"] * 1000))
        client.set_tag(run_id, STATE_TAG, record["state"])
        if record["reason"]:
            client.set_tag(run_id, "ratchet.reason", record["reason"])
        client.set_terminated(run_id, STATUS[record["state"]], end_time=int(record["ended"] * 1000))
    return run_id


def _params(record: dict[str, Any], config: Config) -> dict[str, str]:
    try:
        trial = with_changes(config, record["changes"])
    except ConfigError:  # that is why it failed
        trial = config
    dump = trial.model_dump(mode="json", include={"base", "train", "adapter"})
    return {**dict(parameters(dump)), **{key: str(value) for key, value in record["changes"].items()}}


def _find_or_create(
    study: str, trial: str, config: Config, tags: dict[str, str], *, began: float | None
) -> str:
    client = mlflow_client()
    with mlflow_errors():
        found = client.get_experiment_by_name(config.project.name)
        experiment = found.experiment_id if found else create_experiment(client, config.project.name)
        wanted = f"tags.`{STUDY_TAG}` = '{study}' and tags.`{TRIAL_TAG}` = '{trial}'"
        if runs := client.search_runs([experiment], filter_string=wanted, max_results=1):
            return str(runs[0].info.run_id)
        start = None if began is None else int(began * 1000)
        return str(
            client.create_run(
                experiment,
                start_time=start,
                tags={**tags, STUDY_TAG: study, TRIAL_TAG: trial},
                run_name=tags["mlflow.runName"],
            ).info.run_id
        )
