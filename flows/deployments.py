"""Serve this clone's flows as Prefect deployments, until SIGTERM.

    python -m flows.deployments [--end-lost-runs]        # `ratchet up` runs it

Runs that a schedule, an event or a person requests start here, each in a process of its own. Stages in
work pools: flows/execution.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.events import COMMITTED, DRIFTED, resource_of
from flows.rollout_watcher import Watcher
from ratchet.config.params import Config, load_config
from ratchet.errors import ConfigError, RatchetError, UserError
from ratchet.pipeline.stage import project_root
from ratchet.services.environment import service_environment

if TYPE_CHECKING:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.deployments.runner import RunnerDeployment
    from prefect.runner import Runner


def main(arguments: list[str]) -> int:
    root = project_root()
    try:
        config = load_config(root / "params.yaml")
        set_environment(root, config)
        deployments = [
            describe_retrain(root, config),
            describe_ingest(root, config),
            describe_synthesize(root, config),
            describe_monitor(root, config),
            describe_rollout(root, config),
        ]
    except RatchetError as error:
        print(error, file=sys.stderr)  # noqa: T201 the service's log is where people look
        return error.exit_code
    if "--end-lost-runs" in arguments:
        end_lost_runs([deployment.name for deployment in deployments])
    Watcher(root, config).start()
    serve_deployments(deployments)
    return 0


def set_environment(root: Path, config: Config) -> None:
    """Set the environment that the runs inherit, before Prefect is imported, because it reads its settings
    once.

    Raises UserError.
    """
    os.environ.update(service_environment(root, config), RATCHET_ROOT=str(root))
    if "PREFECT_API_URL" not in os.environ:
        port = config.services.prefect_port
        raise UserError(
            f"Prefect does not answer on 127.0.0.1:{port} (services.prefect_port)",
            remedy="start it with `ratchet up`, or set PREFECT_API_URL",
        )


def describe_retrain(root: Path, config: Config) -> RunnerDeployment:
    """Describe the retraining's deployment. Raises ConfigError for an invalid schedule."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.retrain import retrain

    return RunnerDeployment.from_flow(
        retrain,
        name="retrain",
        description="From the newest data to a verdict: prepare, tokenize, train, evaluate, gate, and "
        "promotion when the gate agrees. "
        "What did not change costs about a second. One run at a time, the others wait.",
        tags=["ratchet", config.project.name],
        parameters={"root": str(root)},
        schedules=[describe_schedule("retrain", config.retrain.cron, {"reason": "schedule"})],
        triggers=describe_triggers(config),
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
        ),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def describe_schedule(section: str, cron: str, parameters: dict[str, Any]) -> DeploymentScheduleCreate:
    """Describe when a deployment runs by itself. Raises ConfigError when `cron` is no cron schedule.

    `active` is left out and the slug is fixed, so that a schedule that a person paused in the UI stays paused
    after a restart.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    try:
        return DeploymentScheduleCreate(
            schedule=CronSchedule(cron=cron, timezone="UTC"), parameters=parameters, slug=f"{section}-cron"
        )
    except ValueError:
        raise ConfigError(
            f"{section}.cron is {cron!r}, which is no cron schedule",
            remedy="give five fields in params.yaml, such as `0 3 * * 1` (Mondays at 03:00 UTC)",
        ) from None


def describe_triggers(config: Config) -> list[Any]:
    """Describe which events start a retraining.

    These are drift, for the topics that drifted, and new data if `retrain.on_data` is set. The event's
    payload becomes the run's parameters.
    """
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

    chosen = {
        DRIFTED: ("drift", {"topics": _from_payload("topics")}),
        **({COMMITTED: ("new data", {})} if config.retrain.on_data else {}),
    }
    return [
        DeploymentEventTrigger(
            name=f"{config.project.name}: retrain on {what}",
            expect={event},
            match={"prefect.resource.id": resource_of(config)},
            parameters={"reason": "{{ event.payload.reason }}", **parameters},
        )
        for event, (what, parameters) in chosen.items()
    ]


def _from_payload(key: str) -> dict[str, Any]:
    """Insert a part of the payload as a value; a plain template would insert text.

    See prefect/utilities/schema_tools/hydration.py.
    """
    return {
        "__prefect_kind": "json",
        "value": {"__prefect_kind": "jinja", "template": f"{{{{ event.payload.{key} | tojson }}}}"},
    }


def describe_monitor(root: Path, config: Config) -> RunnerDeployment:
    """Describe the monitor's deployment. Raises ConfigError for an invalid schedule."""
    from flows.monitor import monitor

    return _describe(
        monitor,
        root,
        config,
        description="Compare the newest requests with what the champion was made for; drift that is worth "
        "it starts `retrain`.",
        schedules=[describe_schedule("monitor", config.monitor.cron, {})],
    )


def describe_rollout(root: Path, config: Config) -> RunnerDeployment:
    from flows.rollout import rollout

    return _describe(
        rollout,
        root,
        config,
        description="One look at the open rollout and at people's decisions in MLflow. Runs by itself each "
        "minute while a rollout is open, and when "
        "the registry changed.",
    )


def _describe(
    flow: Any, root: Path, config: Config, *, description: str, **settings: Any
) -> RunnerDeployment:
    """Describe a flow's deployment that runs once at a time.

    A second run waits and is not dropped, because its reason may have come after the first one read its
    inputs.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    return RunnerDeployment.from_flow(
        flow,
        name=flow.name,
        description=description,
        tags=["ratchet", config.project.name],
        parameters={"root": str(root)},
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
        ),
        entrypoint_type=EntrypointType.MODULE_PATH,
        **settings,
    )


def describe_ingest(root: Path, config: Config) -> RunnerDeployment:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType

    from flows.ingest import ingest

    return RunnerDeployment.from_flow(
        ingest,
        name="ingest",
        description="Pull new rows from a source into an immutable batch and commit it. Without parameters "
        "the source is the one in params.yaml.",
        tags=["ratchet", config.project.name],
        parameters={"root": str(root)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def describe_synthesize(root: Path, config: Config) -> RunnerDeployment:
    from flows.synthesize import synthesize

    return _describe(
        synthesize,
        root,
        config,
        description="A teacher model writes rows about documents, like known rows, or in other words; they "
        "wait in the review queue. "
        "The teacher's key comes from the environment of `ratchet up`, never from a parameter.",
    )


def end_lost_runs(names: list[str]) -> None:
    """Mark the runs that a killed predecessor left as running; they would hold its concurrency slot for
    minutes.

    Call it only where no other process serves `names`.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Crashed

    unfinished = FlowRunFilter(
        state=FlowRunFilterState(
            type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
        )
    )
    ours = DeploymentFilter(name=DeploymentFilterName(any_=names))
    with get_client(sync_client=True) as client:
        lost = client.read_flow_runs(
            deployment_filter=ours,
            flow_run_filter=unfinished,
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=200,
        )
        for run in lost:
            client.set_flow_run_state(
                run.id, Crashed(message="The process that ran it ended without a word."), force=True
            )


def serve_deployments(deployments: list[RunnerDeployment]) -> None:
    """Serve the deployments until SIGTERM."""
    runner = make_runner()
    for deployment in deployments:
        runner.add_deployment(deployment)
    asyncio.run(runner.start())


def make_runner() -> Runner:
    """Make a runner that cancels its runs at SIGTERM and then ends.

    `prefect.serve` in 3.8.8 drops the coroutine that cancels them, and kills their processes. The runs would
    stay RUNNING for ever, and keep the deployment's only slot until its lease ends after five minutes.
    Schedules are not paused at the end, because a restart would not run them then.
    """
    from prefect.runner import Runner

    class CancellingRunner(Runner):
        def handle_sigterm(self, *args: Any, **kwargs: Any) -> None:
            if not self.started:
                sys.exit(0)
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(
                self._end, loop
            )  # a plain call would not wake the loop before its next timer

        def _end(self, loop: asyncio.AbstractEventLoop) -> None:
            self._ending = loop.create_task(self.astop())  # the loop itself holds tasks weakly

    return CancellingRunner(pause_on_shutdown=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
