"""Run one side of a federation until SIGTERM: `python -m ratchet.federation.link.party coordinator|node`.

It starts Flower's processes, and ends when one of them ends, so that the service is seen to be down.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from ratchet.config.params import Config, load_config
from ratchet.errors import RatchetError, ServiceError
from ratchet.federation import records
from ratchet.federation.link import flower
from ratchet.federation.link.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates
from ratchet.federation.link.flower import LINK, Control, flower_environment
from ratchet.files import write_json
from ratchet.pipeline.stage import project_root, say
from ratchet.services.environment import HOST
from ratchet.services.processes import end_family

READY = "ready.json"  # in the side's folder, while its processes run and answer
START_SECONDS = 90.0
NODE_KEY, NODE_AUTHORITY = "key", "authority.pem"


class Children:
    """The processes of one side, which end together."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self._running[name] = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL)

    def check(self) -> None:
        """Raise ServiceError when one of them has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise ServiceError(f"{name} ended with code {process.returncode}; the lines above say why")

    def wait_for_port(self, host: str, port: int) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            self.check()
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((host, port)) == 0:
                    return
            time.sleep(0.2)
        raise ServiceError(f"nothing answers on {host}:{port} after {START_SECONDS:.0f} s")

    def end(self) -> None:
        for process in reversed(self._running.values()):
            with contextlib.suppress(psutil.Error):
                end_family(psutil.Process(process.pid), 5.0)


@contextlib.contextmanager
def _children(folder: Path) -> Iterator[Children]:
    ready, children = folder / READY, Children()
    ready.unlink(missing_ok=True)
    try:
        yield children
    finally:
        ready.unlink(missing_ok=True)
        children.end()


def run_coordinator(root: Path, config: Config) -> None:
    """Run SuperLink, proxy and relay. Raises ServiceError when one of them ends."""
    settings, folder = config.federate, root / flower.FOLDER
    tls, exchange = folder / "tls", folder / "exchange"
    if make_certificates(tls, settings.names):
        say(f"made a certificate for {', '.join(settings.names)}")
    exchange.mkdir(parents=True, exist_ok=True)
    with _children(folder) as children:
        control = Control(folder, settings.superlink_port)
        children.start(
            "the SuperLink",
            [
                flower.flower("flower-superlink"),
                *("--host", HOST, "--port", str(settings.superlink_port)),
                *("--ssl-certfile", str(tls / CERTIFICATE), "--ssl-keyfile", str(tls / KEY)),
                *("--ssl-ca-certfile", str(tls / AUTHORITY), "--enable-supernode-auth"),
                *("--database", str(folder / "superlink/state.db")),
                "--disable-runtime-dependency-installation",
            ],
            flower_environment(folder / "superlink", RATCHET_EXCHANGE=str(exchange)),
            folder / "superlink",
        )
        children.wait_for_port(HOST, settings.superlink_port)
        proxy = folder / "proxy.json"
        write_json(
            proxy,
            {
                "host": settings.host,
                "port": settings.port,
                "certificate": str(tls / CERTIFICATE),
                "key": str(tls / KEY),
                "authority": str(tls / AUTHORITY),
                "superlink": f"https://{HOST}:{settings.superlink_port}",
            },
        )
        command = [flower.flower("python"), str(LINK / "fleet_proxy.py"), str(proxy)]
        children.start("the proxy", command, flower_environment(folder / "proxy"), folder)
        children.wait_for_port(HOST if settings.host == "0.0.0.0" else settings.host, settings.port)  # noqa: S104
        control.start_relay()
        say(f"nodes reach this coordinator on {settings.names[0]}:{settings.port}")
        write_json(folder / READY, {"port": settings.port})
        while True:
            children.check()
            time.sleep(1)


def run_node(root: Path) -> None:
    """Run SuperNode and loop. Raises ServiceError when one of them ends."""
    folder, settings = root / records.NODE, records.read_node(root)
    with _children(folder) as children, socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = flower_environment(
            folder / "supernode",
            RATCHET_NODE_COMMAND=json.dumps([sys.executable, "-m", "ratchet.federation.node"]),
        )
        (folder / "supernode").mkdir(exist_ok=True)
        children.start(
            "the SuperNode",
            [
                flower.flower("flower-supernode"),
                *("--superlink", settings.url, "--root-certificates", str(folder / NODE_AUTHORITY)),
                *("--auth-supernode-private-key", str(folder / NODE_KEY)),
                *("--isolation", "process", "--host", HOST, "--port", str(port)),
            ],
            environment,
            folder / "supernode",
        )
        children.wait_for_port(HOST, port)
        command = [flower.flower("python"), str(LINK / "node_app.py"), f"{HOST}:{port}"]
        children.start("the node's loop", command, environment, root)
        say(f"node {settings.name}: connects to {settings.url}")
        write_json(folder / READY, {"port": port})
        while True:
            children.check()
            time.sleep(1)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    root = project_root()
    try:
        if sys.argv[1] == "coordinator":
            run_coordinator(root, load_config(root / "params.yaml"))
        else:
            run_node(root)
    except KeyboardInterrupt:
        return 0
    except RatchetError as error:
        say(f"{type(error).__name__}: {error}", error=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
