"""Serve this clone's flows as Prefect deployments, until SIGTERM.

    python -m flows.deployments [--end-lost-runs]        # `ratchet up` runs it

A deployment has its flow's name and the project's (`retrain/claims`), so projects can share a server.

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
from ratchet.errors import ConfigError, RatchetError, ServiceError, UserError
from ratchet.pipeline.stage import project_root
from ratchet.services.environment import service_environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.deployments.runner import RunnerDeployment
    from prefect.runner import Runner

FLOWS = ("retrain", "ingest", "synthesize", "monitor", "rollout")


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
        end_lost_runs(config.project.name)
    keep_pauses(deployments, config.project.name)
    runner = make_runner()
    for deployment in deployments:
        runner.add_deployment(deployment)
    remove_old(config.project.name)
    Watcher(root, config).start()
    asyncio.run(runner.start())
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
        name=config.project.name,
        description="From the newest data to a verdict: prepare, tokenize, train, evaluate, gate, and "
        "promotion when the gate agrees. "
        "What did not change costs about a second. One run at a time, the others wait.",
        tags=tags_of(config.project.name),
        parameters={"root": str(root)},
        schedules=[describe_schedule("retrain", config.retrain.cron, {"reason": "schedule"})],
        triggers=describe_triggers(config),
        concurrency_limit=ConcurrencyLimitConfig(
            limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE
        ),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def tags_of(project: str) -> list[str]:
    """Return the tags by which the project's deployments are found, in the UI and by `find_ours`."""
    return ["ratchet", project]


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
        name=config.project.name,
        description=description,
        tags=tags_of(config.project.name),
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
        name=config.project.name,
        description="Pull new rows from a source into an immutable batch and commit it. Without parameters "
        "the source is the one in params.yaml.",
        tags=tags_of(config.project.name),
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


def request_retraining(config: Config, reason: str) -> str:
    """Ask the served deployment of this project for a retraining, and return the run's address.

    It takes in the commits of its checkout's git remote first, and pushes at the end. Raises UserError: no
    deployment of this project is served; ServiceError: Prefect does not answer.
    """
    import httpx

    try:
        return _request_retraining(config, reason)
    except (httpx.HTTPError, RuntimeError) as error:  # Prefect's own error for an address that is silent
        raise ServiceError(
            f"Prefect does not answer at {os.environ.get('PREFECT_API_URL')}: {error}",
            remedy="PREFECT_API_URL ends with /api; PREFECT_API_AUTH_STRING holds USER:PASSWORD",
        ) from None


def _request_retraining(config: Config, reason: str) -> str:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.utilities.urls import url_for

    with get_client(sync_client=True) as client:
        try:
            found = client.read_deployment_by_name(f"retrain/{config.project.name}")
        except ObjectNotFound:
            raise UserError(
                f"Prefect serves no retraining of the project {config.project.name!r}",
                remedy="`ratchet up` on the machine that trains, and PREFECT_API_URL of its Prefect here",
            ) from None
        run = client.create_flow_run_from_deployment(found.id, parameters={"reason": reason, "sync": True})
        return url_for("flow-run", obj_id=run.id) or str(run.id)


def end_lost_runs(project: str) -> None:
    """Mark the runs that a killed predecessor left as running; they would hold its concurrency slot for
    minutes.

    Call it only where no other process serves the project.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
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
    with get_client(sync_client=True) as client:
        ours = DeploymentFilter(
            id=DeploymentFilterId(any_=[deployment.id for deployment in find_ours(client, project)])
        )
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


def find_ours(client: SyncPrefectClient, project: str) -> list[DeploymentResponse]:
    """Return the project's deployments on the server, those with old names included.

    Before deployments had the project's name, each had its flow's: `retrain/retrain`. Such a one belongs to
    the project whose tag it has; another project on the server may have taken it over.
    """
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName

    named = DeploymentFilter(name=DeploymentFilterName(any_=[project, *FLOWS]))
    return [
        deployment
        for deployment in client.read_deployments(deployment_filter=named)
        if set(deployment.tags) == set(tags_of(project))
    ]


def keep_pauses(deployments: list[RunnerDeployment], project: str) -> None:
    """Pause the schedules that a person paused while the project's deployments had their old names."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        old = [deployment for deployment in find_ours(client, project) if deployment.name != project]
    paused = {schedule.slug for one in old for schedule in one.schedules if one.paused or not schedule.active}
    for schedule in [schedule for deployment in deployments for schedule in deployment.schedules or []]:
        if schedule.slug in paused:
            schedule.active = False


def remove_old(project: str) -> None:
    """Remove the project's deployments with old names, and their automations."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for old in find_ours(client, project):
            if old.name != project:
                client.delete_resource_owned_automations(f"prefect.deployment.{old.id}")
                client.delete_deployment(old.id)


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
