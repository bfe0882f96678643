"""Follow a retraining of the served deployment: print its log lines until Prefect reports its end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ratchet.config.params import load_config
from ratchet.errors import ServiceError, StageError
from ratchet.services.environment import service_environment

POLL_SECONDS, APPEAR_SECONDS, MAX_SECONDS = 0.5, 180.0, 3600.0
LAST_LINES_SECONDS = 3.0  # a run sends its lines every 2 s (PREFECT_LOGGING_TO_API_BATCH_INTERVAL)


def follow_retraining(root: Path, *, say: Callable[[str], object]) -> None:
    """Follow the newest run of the deployment `retrain` until it ends.

    Raises ServiceError if none appears within three minutes or it takes over an hour, StageError if it fails.
    """
    config = load_config(root / "params.yaml")
    os.environ.update(service_environment(root, config))
    project = config.project.name
    log = root / ".ratchet" / "logs" / "deployments.log"
    position: int | None = None  # number of printed lines of the run; None before there is a run
    started = time.monotonic()
    while time.monotonic() - started < MAX_SECONDS:
        run = _newest_run(project)
        if run is None and time.monotonic() - started > APPEAR_SECONDS:
            raise ServiceError(
                "no retraining was started",
                remedy=f"{log} and Prefect's page of events may say why; `ratchet retrain --drift` does the "
                "same by hand",
            )
        if run is not None:
            if position is None:
                say(f"run {run.name!r}: {_waited(run)}")
            position = _pass_on(run, position or 0, say)
            if run.state is not None and run.state.is_final():
                time.sleep(LAST_LINES_SECONDS)
                _pass_on(run, position, say)
                _check(run)
                return
        time.sleep(POLL_SECONDS)
    raise ServiceError(
        f"the retraining goes on for more than {MAX_SECONDS / 60:.0f} minutes", remedy=f"see {log}"
    )


def _newest_run(project: str) -> Any:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    begun = FlowRunFilter(
        state=FlowRunFilterState(name=FlowRunFilterStateName(not_any_=["Scheduled", "Late"]))
    )
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[project])),
            flow_run_filter=begun,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    return runs[0] if runs else None


def _waited(run: Any) -> str:
    if run.start_time is None or run.created is None:
        return "starts"
    return (
        f"runs {(run.start_time - run.created).total_seconds():.1f} s after the event's automation asked for "
        "it"
    )


def _pass_on(run: Any, position: int, say: Callable[[str], object]) -> int:
    """Print the log lines of `run` and its tasks from `position` on; return the position after the last."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    with get_client(sync_client=True) as client:
        while lines := client.read_logs(chosen, offset=position):  # at most 200 per call
            for line in lines:
                say("  " + line.message.partition("\n")[0])
            position += len(lines)
    return position


def _check(run: Any) -> None:
    if not run.state.is_completed():
        raise StageError(
            f"the retraining ended {run.state.name}: {run.state.message}",
            exit_code=1,
            remedy="Prefect's page shows its lines; `ratchet retrain` tries again",
        )
