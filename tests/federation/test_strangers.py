"""Only nodes that are registered now are answered, and one coordinator works in a checkout."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import Live, wait_until
from parties import make_node
from patience import scaled

from flows.federate import federate
from ratchet.config.params import Config
from ratchet.errors import CheckoutError
from ratchet.federation.link import certificates
from ratchet.federation.link.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates, node_key
from ratchet.federation.link.flower import FOLDER, FlowerLink, flower, flower_environment
from ratchet.federation.link.invitations import Limits, accept, remove
from ratchet.federation.link.party import NODE_AUTHORITY, NODE_KEY
from ratchet.federation.records import NODE
from ratchet.files import read_json, write_bytes, write_json
from ratchet.pipeline.checkout import locked
from ratchet.services.processes import free_port
from tasks.federate import RUN, forget_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def live(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    live = Live(tmp_path_factory.mktemp("strangers") / "coordinator", tiny_config)
    try:
        live.up()
        yield live
    finally:
        live.stop()


@contextmanager
def supernode(folder: Path, address: str, authority: Path, key: Path) -> Iterator[subprocess.Popen[str]]:
    """Run Flower's SuperNode alone, without the link that would start it again."""
    with (folder / "supernode.log").open("w") as log:
        port = free_port()
        command = [
            flower("flower-supernode"),
            *("--superlink", address, "--root-certificates", str(authority)),
            *("--auth-supernode-private-key", str(key), "--isolation", "process"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ]
        process = subprocess.Popen(
            command, env=flower_environment(folder), stdout=log, stderr=subprocess.STDOUT, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def listening(tls: Path) -> Iterator[tuple[str, list[bytes]]]:
    """A coordinator's address, and the first line of each request that came over TLS."""
    context, heard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(tls / CERTIFICATE, tls / KEY)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(connection, server_side=True) as secured:
                    heard.append(secured.recv(100).partition(b"\r\n")[0])
                    secured.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            except OSError:
                heard.append(b"no handshake")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", heard
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(("days", "heard_first"), [(0, b"no handshake"), (800, b"POST /v1/fleet/")])
def test_a_node_sends_nothing_to_an_expired_certificate(tmp_path, monkeypatch, days, heard_first):
    tls, key = tmp_path / "tls", tmp_path / "key"
    make_certificates(tls, ["other.example"])
    monkeypatch.setattr(certificates, "DAYS", days)
    make_certificates(tls, ["127.0.0.1"])
    node_key(key)
    with (
        listening(tls) as (address, heard),
        supernode(tmp_path, address, tls / AUTHORITY, key) as process,
    ):
        assert process.wait(scaled(60)) != 0
    assert heard and heard[0].startswith(heard_first), (heard, (tmp_path / "supernode.log").read_text())


def test_a_second_coordinator_in_a_checkout_is_refused(live: Live) -> None:
    said = live.up()
    assert "federation: runs already" in said.stdout + said.stderr
    done = subprocess.run(
        live.command("coordinator"), env=live.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode and "another `federation` runs in" in done.stdout + done.stderr
    assert read_json(live.root / FOLDER / "ready.json") and not live.connected()


def test_a_second_run_in_a_checkout_is_refused(tmp_path: Path, tiny_config: Config) -> None:
    make_node(tmp_path, tiny_config, [])
    with locked(tmp_path, "federate"), pytest.raises(CheckoutError, match="another `federate` runs in"):
        federate.fn(root=str(tmp_path))


def test_a_stranger_and_a_removed_node_get_nothing(live: Live, tmp_path: Path) -> None:
    """The stranger has the authority and the address, as whoever reads an invitation without a key."""
    home = tmp_path / "guest"
    accept(home, live.invite(home), Limits())
    address, authority = f"127.0.0.1:{live.config.federate.port}", home / NODE / NODE_AUTHORITY
    node_key(tmp_path / "stranger")
    with supernode(tmp_path, address, authority, tmp_path / "stranger") as process:
        process.wait(scaled(60))
        assert not live.connected(), (tmp_path / "supernode.log").read_text()
    with supernode(tmp_path, address, authority, home / NODE / NODE_KEY) as process:
        wait_until(lambda: live.connected() == {"guest"}, 60, "the invited node does not connect")
        remove(live.root, live.config, "guest")
        process.wait(scaled(60))
    with supernode(tmp_path, address, authority, home / NODE / NODE_KEY) as process:
        process.wait(scaled(60))
    wait_until(lambda: read_json(live.root / FOLDER / "exchange/nodes.json") == [], 60, "it is still there")
    live.nodes.pop("guest")


def test_join_tells_whether_the_coordinator_lets_the_node_in(
    live: Live, tmp_path: Path, tiny_config: Config
) -> None:
    home = make_node(tmp_path / "told", tiny_config, [])
    said = live.join(home, live.invite(home))
    assert f"told is connected to 127.0.0.1:{live.config.federate.port}" in said.stdout
    assert "is connected" in live.join(home).stdout  # it runs already
    remove(live.root, live.config, "told")
    live.ratchet(home, "federate", "down")
    refused = live.ratchet(home, "federate", "join")
    assert refused.returncode == 1 and "did not let this node in" in refused.stderr
    assert "does not run" in live.ratchet(home, "federate", "status").stdout
    live.nodes.pop("told")


def test_what_was_sent_in_a_run_is_removed_while_the_relay_waits(live: Live) -> None:
    """A node that never answers holds up nothing: the run is forgotten, and the next one goes on at once."""
    exchange, link = live.root / FOLDER / "exchange", FlowerLink(live.root)
    for name in ("first-1-train", "second-1-train"):
        write_bytes(exchange / f"ask-{name}/1.request", [b"request"])
        write_json(exchange / f"ask-{name}/request.json", {"seconds": 3600})
    time.sleep(3)  # the relay has begun with the first
    write_json(live.root / RUN / "run.json", {"run": "first", "inputs": {}})
    forget_run(live.root)
    assert not list(exchange.glob("*first*")) and not (live.root / RUN).exists()
    assert (exchange / "ask-second-1-train").exists()
    link.forget("second-")
    assert link.ask({}, 60, "third-1-train") == {}
    link.forget("third-")
    assert not list(exchange.glob("ask-*"))
