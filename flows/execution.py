"""Run a stage where params.yaml says: on this machine, or by a worker of a Prefect work pool."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx

from flows.remote_stage import LOGGER
from flows.remote_stage import stage as stage_flow
from ratchet.config.params import Config
from ratchet.config.training import Place
from ratchet.errors import ServiceError, StageError
from ratchet.pipeline.checkout import Say
from ratchet.pipeline.dvc import Workspace, run_stage, stale_stages
from ratchet.pipeline.work_branch import DONE, Attempt, begin, forget, read, take

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_SECONDS = 2.0
REMIND_SECONDS = 600.0  # between two lines that say that no worker has come
HEARTBEAT = "prefect.flow-run.heartbeat"
OVERLAP = timedelta(seconds=60)  # logs of one run may arrive out of order


class Execution:
    """Runs the stages of one retraining, each in its place."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._branches: list[str] = []

    def run(self, workspace: Workspace, stage: str, say: Say) -> bool:
        """Run one stage, and return whether it ran. Raises StageError, CheckoutError, ServiceError."""
        place = self._config.execution.get(stage)  # type: ignore[call-overload]  # its keys are literals
        if place is None:
            return run_stage(workspace, stage, say)
        if stage not in stale_stages(workspace):
            return False
        done = self._run_elsewhere(workspace, stage, place, say)
        take(workspace, stage, done, say)
        self._branches.append(done.branch)
        return True

    def forget(self, workspace: Workspace) -> None:
        """Delete the branches of stages whose outputs have landed."""
        forget(workspace, self._branches)
        self._branches = []

    def _run_elsewhere(self, workspace: Workspace, stage: str, place: Place, say: Say) -> Attempt:
        if "PREFECT_API_URL" not in os.environ:
            raise ServiceError(
                f"{stage} is to run in the work pool {place.pool}, and no Prefect server runs that its "
                "worker could reach",
                remedy="ratchet up, or set PREFECT_API_URL",
            )
        for tries_left in reversed(range(place.attempts)):
            attempt = begin(workspace, stage, say)
            if attempt.state == DONE:
                say(f"{stage}: an earlier run has had it done at {attempt.branch}")
                return attempt
            told = _ask(self._config, stage, attempt, place, say)
            tip = read(workspace, attempt.branch)
            if tip and tip.state == DONE and tip.number == attempt.number:
                return tip
            told = told or f"the run ended, and {attempt.branch} has no result"
            say(f"{stage}: attempt {attempt.number} is lost: {told}")
            if not tries_left:
                raise StageError(
                    f"stage {stage} was lost {place.attempts} times in the pool {place.pool}; last: {told}",
                    exit_code=1,
                    remedy="`ratchet retrain` goes on from the newest checkpoint",
                )
        raise AssertionError("unreachable: the loop returns or raises")


def _ask(config: Config, stage: str, attempt: Attempt, place: Place, say: Say) -> str:
    """Let a worker make the attempt, and return why it was lost, or "". Raises StageError."""
    from prefect.client.orchestration import get_client

    run = _submit(config, stage, attempt, place)
    say(f"{stage}: attempt {attempt.number} in the work pool {place.pool}")
    with get_client(sync_client=True) as client, _cancelled_with_us(client, run):
        state = _Followed(client, run, place, say).until_its_end()
    message = (state.message or state.name or "").removeprefix("Flow run encountered an exception: ")
    if state.is_completed():
        return ""
    if state.is_failed():
        code = (state.name or "").removeprefix("Exit ")
        raise StageError(message, exit_code=int(code) if code.isdigit() else 1)
    if state.is_cancelled() and "attempt" not in message:
        raise StageError(f"stage {stage} was cancelled: {message}", exit_code=1)
    return message


def _submit(config: Config, stage: str, attempt: Attempt, place: Place) -> FlowRun:
    """Make pool and deployment where they are missing, and start a run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.deployments import run_deployment
    from prefect.deployments.runner import RunnerDeployment
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.types.entrypoint import EntrypointType

    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(WorkPoolCreate(name=place.pool, type="process"))
    deployment: Any = RunnerDeployment.from_flow(
        stage_flow,
        name=f"{config.project.name}-{place.pool}",
        description="One stage of a retraining on another machine.",
        tags=["ratchet", config.project.name],
        work_pool_name=place.pool,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    deployment.apply()
    parameters = {
        "branch": attempt.branch,
        "commit": attempt.commit,
        "number": attempt.number,
        "stage": stage,
    }
    run: Any = run_deployment(f"stage/{deployment.name}", parameters=parameters, timeout=0)
    return run  # type: ignore[no-any-return]


@contextmanager
def _cancelled_with_us(client: SyncPrefectClient, run: FlowRun) -> Iterator[None]:
    """Cancel the run when this one is interrupted."""
    from prefect.states import Cancelling

    try:
        yield
    except BaseException:
        with suppress(Exception):
            client.set_flow_run_state(run.id, Cancelling())
        raise


class _Followed:
    """A run on another machine: its lines are said as they come, and its signs of life are watched."""

    def __init__(self, client: SyncPrefectClient, run: FlowRun, place: Place, say: Say) -> None:
        self._client, self._run, self._place, self._say = client, run, place, say
        self._told: set[Any] = set()
        self._since = datetime.now(UTC) - timedelta(days=1)
        self._sign: object = None
        self._alive = self._begun = time.monotonic()
        self._reminded = self._begun - REMIND_SECONDS + 15.0

    def until_its_end(self) -> State:
        """Return the run's last state; a run without a sign of life is made Crashed. Raises StageError."""
        while True:
            try:
                state = self._client.read_flow_run(self._run.id).state
                self._say_new_lines()
                if state and state.is_final():
                    return state
                if state and (state.is_running() or state.is_cancelling()):
                    if self._is_lost():
                        return self._give_up()
                else:
                    self._wait_for_worker()
            except httpx.HTTPError as error:  # the server is away: the worker goes on without it
                self._say(f"Prefect does not answer: {type(error).__name__}; asked again")
                time.sleep(10 * POLL_SECONDS)
                self._alive = time.monotonic()
            time.sleep(POLL_SECONDS)

    def _say_new_lines(self) -> None:
        from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp

        wanted = LogFilter(
            flow_run_id=LogFilterFlowRunId(any_=[self._run.id]),
            timestamp=LogFilterTimestamp.model_validate({"after_": self._since - OVERLAP}),
        )
        while lines := self._client.read_logs(wanted, limit=200, offset=0):
            new = [line for line in lines if line.id not in self._told]
            for line in new:
                self._told.add(line.id)
                if line.name.endswith(f".{LOGGER}"):
                    self._say(line.message)
            self._since = lines[-1].timestamp
            self._alive = time.monotonic() if new else self._alive
            if len(lines) < 200 or not new:
                return
            wanted.timestamp = LogFilterTimestamp.model_validate({"after_": self._since})

    def _is_lost(self) -> bool:
        """Return whether the lease is over. The time is this machine's, so clocks need not agree."""
        from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter

        wanted = EventFilter(
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=[f"prefect.flow-run.{self._run.id}"]),
        )
        events = self._client.read_events(wanted, limit=1).events
        if events and events[0].id != self._sign:
            self._sign, self._alive = events[0].id, time.monotonic()
        return time.monotonic() - self._alive > self._place.lease_minutes * 60

    def _give_up(self) -> State:
        from prefect.states import Crashed

        state: State = Crashed(message=f"no sign of life for {self._place.lease_minutes:g} minutes")
        self._client.set_flow_run_state(self._run.id, state, force=True)
        return state

    def _wait_for_worker(self) -> None:
        from prefect.states import Cancelled

        now = self._alive = time.monotonic()
        if now - self._begun > self._place.wait_minutes * 60:
            self._client.set_flow_run_state(self._run.id, Cancelled(message="no worker came"), force=True)
            raise StageError(
                f"no worker of the pool {self._place.pool} came in {self._place.wait_minutes:g} minutes",
                exit_code=1,
                remedy=f"start one: ratchet worker --pool {self._place.pool}",
            )
        if now - self._reminded > REMIND_SECONDS:
            self._reminded = now
            self._say(
                f"waits for a worker of the pool {self._place.pool}: on a machine with a checkout of this "
                f"project, ratchet worker --pool {self._place.pool}"
            )
