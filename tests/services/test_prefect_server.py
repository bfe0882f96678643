"""Who may ask the Prefect server of `ratchet up`."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratchet.services.prefect_server import OwnPagesOnly

ORIGINS = ["http://127.0.0.1:4200", "http://localhost:4200"]


async def answer(_: Request) -> PlainTextResponse:
    return PlainTextResponse("in")


async def accept(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("in")
    await socket.close()


@pytest.fixture(scope="module")
def client() -> TestClient:
    inner = Starlette(routes=[Route("/", answer, methods=["GET", "POST"]), WebSocketRoute("/events", accept)])
    return TestClient(OwnPagesOnly(inner, ORIGINS))


LET_IN = [
    {"host": "127.0.0.1:4200"},  # a worker, which sends no origin
    {"host": "localhost:4200", "origin": "http://localhost:4200"},
    {"host": "127.0.0.1:4200", "origin": "http://localhost:4200"},  # the UI asks the API by one address
    {"host": "LOCALHOST:4200", "origin": "http://localhost:4200"},
    {"host": "localhost:9000", "origin": "http://localhost:9000"},  # through a tunnel from another port
]
KEPT_OUT = [
    {"host": "evil.example:4200", "origin": "http://evil.example:4200"},  # a rebound name
    {"host": "evil.example"},
    {"host": "127.0.0.1.evil.example:4200"},
    {"host": "127.0.0.1:4200@evil.example"},
    {"host": ""},
    {"host": "[::1"},
    {"host": "127.0.0.1:4200", "origin": "http://evil.example"},
    {"host": "127.0.0.1:4200", "origin": "null"},  # a page in a sandbox
    {"host": "127.0.0.1:4200", "origin": "http://localhost:8000"},  # another server's page on this machine
]


def enters(client: TestClient, headers: dict[str, str]) -> tuple[bool, bool, bool]:
    """Whether a GET, a POST and a websocket come through."""
    try:
        with client.websocket_connect("/events", headers=headers) as socket:
            opened = socket.receive_text() == "in"
    except WebSocketDisconnect:
        opened = False
    found = [client.request(method, "/", headers=headers).text == "in" for method in ("GET", "POST")]
    return found[0], found[1], opened


@pytest.mark.parametrize("headers", LET_IN, ids=str)
def test_programs_and_its_own_pages_are_let_in(client: TestClient, headers: dict[str, str]) -> None:
    assert enters(client, headers) == (True, True, True)


@pytest.mark.parametrize("headers", KEPT_OUT, ids=str)
def test_foreign_names_and_pages_are_kept_out(client: TestClient, headers: dict[str, str]) -> None:
    assert enters(client, headers) == (False, False, False)
