"""Record trials in files, and deliver them to MLflow as runs nested in their study's run.

Runs are found by tags, so delivering twice changes nothing. If MLflow does not answer, the files are
delivered later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.params import Config
from ratchet.errors import ConfigError, RatchetError
from ratchet.files import write_json, write_text
from ratchet.tracking.curve import log_points
from ratchet.tracking.mlflow import STATE_TAG, create_experiment, mlflow_client, mlflow_errors, parameters
from ratchet.training.schedule import Points
from ratchet.training.search_space import Changes, with_changes

STUDY_TAG, TRIAL_TAG = "ratchet.sweep", "ratchet.trial"
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "fail": "FAILED"}
DELIVERED = ".delivered"


class TrialRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One trial as it ended: `trial-NNNN.json` in the study's folder. Times are in seconds since 1970."""

    number: int
    study: str
    state: str  # a key of STATUS
    value: float | None  # of the objective, for a complete trial
    reason: str  # why there is no value
    changes: Changes
    command: str
    commit: str
    began: float
    ended: float
    points: Points
    figures: dict[str, Any]  # reports/train/figures.json of a complete trial
    manifest: dict[str, Any] = {}  # of its candidate
    said: list[str] = []

    def write(self, folder: Path) -> None:
        write_json(folder / f"trial-{self.number:04d}.json", msgspec.to_builtins(self))


def read_record(path: Path) -> TrialRecord:
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrialRecord)
    except msgspec.MsgspecError as error:
        raise RatchetError(f"{path} is no record of a trial: {error}") from None


class Best(msgspec.Struct, frozen=True):
    """The trial with the lowest objective so far."""

    number: int
    value: float
    changes: Changes
    command: str


def deliver(folder: Path, config: Config) -> int:
    """Deliver the records in a study's folder that MLflow does not have yet, and return their number.

    Raises ServiceError: MLflow does not answer.
    """
    waiting = [
        path for path in sorted(folder.glob("trial-*.json")) if not path.with_suffix(DELIVERED).exists()
    ]
    for path in waiting:
        run_id = _record(read_record(path), config)
        write_text(path.with_suffix(DELIVERED), f"{run_id}\n")
    return len(waiting)


def close_study(study: str, config: Config, best: Best | None, *, trials: int) -> str:
    """Write the study's outcome into its run, and return the run's id."""
    client = mlflow_client()
    run_id = _find_or_create(study, "study", config, {"mlflow.runName": f"sweep-{study}"}, began=None)
    with mlflow_errors():
        if best:
            client.log_metric(run_id, "validation_loss", best.value)
            client.set_tag(run_id, "ratchet.best", best.command)
        client.set_tag(run_id, "ratchet.trials", str(trials))
        client.set_terminated(run_id, "FINISHED")
    return run_id


def _record(record: TrialRecord, config: Config) -> str:
    client = mlflow_client()
    parent = _find_or_create(
        record.study, "study", config, {"mlflow.runName": f"sweep-{record.study}"}, began=None
    )
    tags = {
        "mlflow.runName": f"trial-{record.number}",
        "mlflow.parentRunId": parent,
        "ratchet.reproduce": record.command,
        "ratchet.git_commit": record.commit,
    }
    run_id = _find_or_create(record.study, str(record.number), config, tags, began=record.began)
    log_points(run_id, record.points)
    with mlflow_errors():
        known = client.get_run(run_id).data.params
        for key, value in _params(record, config).items():
            if key not in known:
                client.log_param(run_id, key, value[:500])
        for key, value in record.figures.items():
            if isinstance(value, int | float):
                client.log_metric(run_id, f"train/{key}", float(value), timestamp=int(record.ended * 1000))
        if record.value is not None:
            client.log_metric(run_id, "objective", record.value, timestamp=int(record.ended * 1000))
        client.set_tag(run_id, STATE_TAG, record.state)
        if record.reason:
            client.set_tag(run_id, "ratchet.reason", record.reason)
        client.set_terminated(run_id, STATUS[record.state], end_time=int(record.ended * 1000))
    return run_id


def _params(record: TrialRecord, config: Config) -> dict[str, str]:
    try:
        trial = with_changes(config, record.changes)
    except ConfigError:  # the reason why this trial failed
        trial = config
    dump = trial.model_dump(mode="json", include={"base", "train", "adapter"})
    return {**dict(parameters(dump)), **{key: str(value) for key, value in record.changes.items()}}


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
