"""Clients that hold connections and say nothing keep nobody else out."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from served import wait_for
from servers import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ratchet.gateway.connections import Connection
from ratchet.gateway.limits import Gone, read_body
from ratchet.serving.faults import Fault

LONG = 3600.0
open_streams: list[str] = []


async def ready(_: Request) -> Response:
    return PlainTextResponse("ready")


async def take(request: Request) -> Response:
    try:
        return PlainTextResponse(str(len(await read_body(request.receive, "", 1 << 20))))
    except Fault as fault:
        return PlainTextResponse(fault.body(), fault.status)
    except Gone:
        return PlainTextResponse("")


async def flood(_: Request) -> Response:
    async def pieces() -> Iterator[bytes]:
        open_streams.append("open")
        try:
            while True:
                yield b"x" * 65_536
                await asyncio.sleep(0)
        finally:
            open_streams.remove("open")

    return StreamingResponse(pieces())


APP = Starlette(
    routes=[
        Route("/readyz", ready),
        Route("/", ready),
        Route("/take", take, methods=["POST"]),
        Route("/flood", flood),
    ]
)


def limited(*, most: int = 2048, header: float = LONG, read: float = LONG) -> type[Connection]:
    return type("Limited", (Connection,), {"most": most, "header_seconds": header, "read_seconds": read})


@contextlib.contextmanager
def half_open(url: str, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    address = urlsplit(url)
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=20))
            one.sendall(sent)
            one.setblocking(False)
            found.append(one)
        yield found


def is_closed(one: socket.socket) -> bool:
    try:
        return one.recv(4096) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HT",  # the second request of a connection
    ],
    ids=["nothing", "half a header", "half a second request"],
)
def test_connections_without_a_whole_request_are_closed(sent: bytes) -> None:
    with serving(APP, http=limited(header=0.2)) as url, half_open(url, 3, sent) as sockets:
        for one in sockets:
            wait_for(lambda one=one: is_closed(one))


def test_a_header_that_trickles_in_gets_no_more_time() -> None:
    with serving(APP, http=limited(header=0.3)) as url, half_open(url, 1, b"GET / HTTP/1.1\r\n") as (one,):

        def trickles() -> bool:
            with contextlib.suppress(OSError):
                one.sendall(b"x-a: b\r\n")
            return is_closed(one)

        wait_for(trickles)


def test_many_half_open_connections_keep_nobody_out_and_the_oldest_go() -> None:
    begun = b"GET / HTTP/1.1\r\nX-Slow: "
    with (
        serving(APP, http=limited(most=10)) as url,
        httpx.Client(base_url=url, trust_env=False) as kept,
        half_open(url, 100, begun) as sockets,
    ):
        assert kept.get("/readyz").text == "ready"
        with httpx.Client(base_url=url, trust_env=False) as other:
            assert [other.get(path).text for path in ("/readyz", "/")] == ["ready", "ready"]
        wait_for(lambda: sum(map(is_closed, sockets)) >= 80)
        assert not is_closed(sockets[-1])


def test_slow_bodies_end_and_leave_room_for_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet.gateway.limits.BODY_SECONDS", 1.0)
    begun = b"POST /take HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nab"
    with (
        serving(APP, http=limited(most=5)) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
        half_open(url, 8, begun) as sockets,
    ):
        wait_for(lambda: http.get("/").status_code == 503)
        assert http.get("/readyz").status_code == 200
        wait_for(lambda: http.get("/").status_code == 200)
        answers = [one.recv(4096).partition(b"\r\n")[0] for one in sockets if not one.setblocking(True)]
    assert sorted(set(answers)) == [b"HTTP/1.1 408 Request Timeout", b"HTTP/1.1 503 Service Unavailable"]


def test_a_client_that_stops_reading_is_cut_off() -> None:
    asked = b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(APP, http=limited(read=0.3)) as url, half_open(url, 1, asked):
        wait_for(lambda: bool(open_streams))
        wait_for(lambda: not open_streams)


def test_a_connection_stays_open_between_requests() -> None:
    """The limit of headers is not that of silence between two requests."""
    with serving(APP, http=limited(header=0.2)) as url, half_open(url, 1, b"") as (one,):
        for _ in range(2):
            one.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            one.settimeout(0.5)
            seen = b""
            with pytest.raises(TimeoutError):
                while piece := one.recv(4096):
                    seen += piece
            assert seen.startswith(b"HTTP/1.1 200") and seen.endswith(b"ready")


def test_requests_fit_below_the_limit_of_open_files() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))\n"
        "from ratchet.gateway.connections import most_requests\n"
        "print(most_requests(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 1024
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["384", "1024"]
