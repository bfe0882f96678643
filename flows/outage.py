"""Go on without Prefect: it holds a copy of what runs did, so its outage must not cost what a run made."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import httpx
from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from prefect.events.clients import PrefectEventsClient
from prefect.events.worker import EventsWorker
from prefect.exceptions import TerminationSignal

from flows.console import console, say
from flows.events import artifact_key
from ratchet.config.params import Config
from ratchet.errors import ServiceError

T = TypeVar("T")


def show_artifact(config: Config, name: str, markdown: str, description: str) -> None:
    """Publish Markdown as the project's artifact `name`; a failure is only reported."""
    keep_going(
        lambda: create_markdown_artifact(markdown, key=artifact_key(config, name), description=description),
        f"the artifact {artifact_key(config, name)} is left out",
    )


def keep_going(work: Callable[[], object], left_out: str) -> None:
    """Do what only shows something in Prefect; say what is left out where that fails."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  (whatever Prefect's client raises, the run's result is in files)
        say(f"{left_out}, because Prefect does not take it: {_first_line(error)}")


def run_flow(flow: Flow[..., T], **parameters: Any) -> T:
    """Run a flow and return or raise what its function does, even if Prefect goes away meanwhile.

    Prefect's own call raises its client's error when it cannot store the run's last state. Raises
    ServiceError when Prefect does not answer at the start, and KeyboardInterrupt after a SIGTERM, for which
    Prefect has an exception of its own.
    """
    ends: list[tuple[T | None, BaseException | None]] = []

    @wraps(flow.fn)
    def watched(*arguments: Any, **named: Any) -> T:
        try:
            value: T = flow.fn(*arguments, **named)
        except BaseException as error:
            ends.append((None, error))
            raise
        ends.append((value, None))
        return value

    if os.environ.get("PREFECT_API_URL"):
        # By default it tries each event ten times when the server is gone. No class of ours: of a client that
        # it does not know, Prefect drops every event without a word.
        EventsWorker.set_client_override(PrefectEventsClient, reconnection_attempts=2)
    twin = copy.copy(flow)
    twin.fn = watched
    try:
        found: T = twin(**parameters)
        return found
    except TerminationSignal:
        raise KeyboardInterrupt from None
    except Exception as error:
        if not ends and isinstance(error, httpx.HTTPError):
            raise _no_prefect(error) from None
        if not ends or ends[-1][1] is error:
            raise
        console.print(f"Prefect was not told how the run ended: {_first_line(error)}", markup=False)
    value, raised = ends[-1]
    if isinstance(raised, TerminationSignal):
        raise KeyboardInterrupt
    if raised is not None:
        raise raised
    return cast(T, value)


def _no_prefect(error: Exception) -> ServiceError:
    return ServiceError(
        f"Prefect does not answer at {os.environ.get('PREFECT_API_URL')}: {_first_line(error)}",
        remedy="`ratchet up` starts it here; otherwise mend or unset PREFECT_API_URL",
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
