"""A flow whose Prefect goes away keeps what it made."""

from __future__ import annotations

import signal
from typing import Any

import httpx
import pytest
from prefect import Flow
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.exceptions import TerminationSignal
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.outage import keep_going, run_flow
from ratchet.errors import DataError, ServiceError
from ratchet.services.processes import free_port


class LosesItsServer(Flow[..., Any]):
    """A flow that runs its function, and whose server then does not take the last state."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            self.fn(*arguments, **named)
        finally:
            raise httpx.ConnectError("All connection attempts failed")


def double(number: int) -> int:
    if number < 0:
        raise DataError(f"{number} is negative")
    return 2 * number


def test_what_a_flow_returned_or_raised_outlives_its_server(capsys: pytest.CaptureFixture[str]) -> None:
    lost = LosesItsServer(double)
    assert run_flow(lost, number=2) == 4
    assert "Prefect was not told how the run ended" in capsys.readouterr().err
    with pytest.raises(DataError, match="-1 is negative"):
        run_flow(lost, number=-1)
    assert lost.fn is double, "the flow itself is as it was"


def test_the_events_of_a_flow_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect drops those of a client that it does not know, and returns nothing for them."""
    monkeypatch.setenv("PREFECT_API_URL", api := f"http://127.0.0.1:{free_port()}/api")
    sent: list[str] = []
    monkeypatch.setattr(EventsWorker, "send", lambda _, event: sent.append(event.event))
    monkeypatch.setattr(EventsWorker, "_client_override", None)

    def tell() -> None:
        emit_event("ratchet.drift.detected", {"prefect.resource.id": "ratchet.project.pydoc"})

    with temporary_settings({PREFECT_API_URL: api}):
        run_flow(LosesItsServer(tell))
    assert sent == ["ratchet.drift.detected"]


def test_a_flow_that_could_not_begin_says_which_server_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeverBegins(Flow[..., Any]):
        def __call__(self, *_: Any, **__: Any) -> Any:
            raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    with pytest.raises(ServiceError, match=r"127\.0\.0\.1:.*All connection attempts(?s:.*)ratchet up"):
        run_flow(NeverBegins(double), number=1)


@pytest.mark.parametrize("kind", [LosesItsServer, Flow])
def test_a_sigterm_is_an_interruption_whether_prefect_answers_or_not(
    kind: type[Flow[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        raise TerminationSignal(signal=signal.SIGTERM)

    if kind is Flow:
        monkeypatch.setattr(Flow, "__call__", lambda flow: flow.fn())
    with pytest.raises(KeyboardInterrupt):
        run_flow(kind(end))


def test_what_only_shows_something_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("flows.outage.say", said.append)

    def refuse() -> None:
        raise httpx.ReadTimeout("")

    keep_going(refuse, "the artifact pydoc-gate is left out")
    assert said == ["the artifact pydoc-gate is left out, because Prefect does not take it: ReadTimeout"]
