"""Run one side of a federation until SIGTERM: `python -m ratchet.federation.link.party coordinator|node`.

It starts Flower's processes, and ends when one of them ends, so that the service is seen to be down; a
SuperNode is started again first. When it is killed they go on: whoever starts it calls `end_left` before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import psutil

from ratchet.config.params import Config, load_config
from ratchet.errors import RatchetError, ServiceError
from ratchet.federation import records
from ratchet.federation.link import flower
from ratchet.federation.link.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates
from ratchet.federation.link.flower import ALIVE_SECONDS, LINK, Control, flower_environment
from ratchet.files import read_json, write_json, write_text
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.processes import find_process
from ratchet.pipeline.stage import project_root, say
from ratchet.services.environment import HOST
from ratchet.services.processes import end_family
from ratchet.services.specs import FEDERATION
from ratchet.services.supervisor import is_running

READY = "ready.json"  # in the side's folder, while its processes run and answer
WORD = "word.json"  # in a node's folder: whether the coordinator let it in when it was asked last
LET_IN = "SuperNode ID:"  # what a SuperNode says then
CHILDREN = "children.json"  # the processes, and when they were created
START_SECONDS = 180.0
# A node that was killed counts as connected for a minute, in which the SuperLink refuses it. It tries longer.
TRY_SECONDS, REFUSED_SECONDS = 10.0, 120.0
NODE_KEY, NODE_AUTHORITY = "key", "authority.pem"


class Children:
    """The processes of one side, which end together."""

    def __init__(self, folder: Path) -> None:
        self._note = folder / CHILDREN
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        folder: Path,
        out: BinaryIO | None = None,
    ) -> None:
        """Start a process; what it says goes to `out`, or to where this one's words go."""
        said = None if out is None else subprocess.STDOUT
        self._running[name] = subprocess.Popen(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=said
        )
        with contextlib.suppress(psutil.Error):  # one has ended already: `check` says so
            pids = [process.pid for process in self._running.values()]
            write_json(self._note, [[pid, psutil.Process(pid).create_time()] for pid in pids])

    def code(self, name: str) -> int | None:
        """Return the code with which it ended, below 0 when it was killed; None while it runs."""
        return self._running[name].poll()

    def check(self) -> None:
        """Raise ServiceError when one of them has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise ServiceError(f"{name} ended with code {process.returncode}; the lines above say why")

    def wait(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds. Raises ServiceError: `what` is not there in time, or one has ended."""
        until = time.monotonic() + START_SECONDS
        while not holds():
            self.check()
            if time.monotonic() > until:
                raise ServiceError(f"{what} is not there after {START_SECONDS:.0f} s")
            time.sleep(0.2)

    def wait_for_port(self, host: str, port: int) -> None:
        self.wait(lambda: _answers(host, port), f"a listener on {host}:{port}")

    def end(self) -> None:
        for process in reversed(self._running.values()):
            with contextlib.suppress(psutil.Error):
                end_family(psutil.Process(process.pid), 5.0)


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def end_left(root: Path) -> bool:
    """End the processes of a side that was killed, and return whether there were any."""
    ended = False
    for folder in (root / flower.FOLDER, root / records.NODE):
        (folder / READY).unlink(missing_ok=True)
        (folder / WORD).unlink(missing_ok=True)
        note = folder / CHILDREN
        for pid, created in read_json(note) if note.exists() else []:
            if process := find_process(pid, created):
                end_family(process, 5.0)
                ended = True
        note.unlink(missing_ok=True)
    return _end_relay(root / flower.FOLDER) or ended


def _end_relay(folder: Path) -> bool:
    """End a relay that outlived its SuperLink; as long as it holds the lock, the id in there is its own."""
    path = folder / "exchange/lock"
    if not path.exists():
        return False
    with path.open("r+") as lock, contextlib.suppress(psutil.Error, ValueError):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            end_family(psutil.Process(int(lock.read())), 5.0)
            return True
    return False


@contextlib.contextmanager
def _children(folder: Path) -> Iterator[Children]:
    ready, children = folder / READY, Children(folder)
    try:
        yield children
    finally:
        ready.unlink(missing_ok=True)
        children.end()
        _end_relay(folder)


def run_coordinator(root: Path, config: Config) -> None:
    """Run SuperLink, proxy and relay. Raises ServiceError when one of them ends."""
    settings, folder = config.federate, root / flower.FOLDER
    tls, exchange = folder / "tls", folder / "exchange"
    # The coordinator's own programs reach the SuperLink on loopback, by the same certificate.
    if make_certificates(tls, list(dict.fromkeys([*settings.names, HOST]))):
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
        began, alive = time.time(), exchange / "alive"
        control.start_relay()
        children.wait(lambda: _touched(alive) > began, "the relay")
        say(f"nodes reach this coordinator on {settings.names[0]}:{settings.port}")
        write_json(folder / READY, {"port": settings.port})
        seen, since = 0.0, time.monotonic()
        while True:
            children.check()
            if (touched := _touched(alive)) != seen:
                seen, since = touched, time.monotonic()
            if time.monotonic() - since > ALIVE_SECONDS:
                raise ServiceError("the relay has ended; the lines above say why")
            time.sleep(1)


def _touched(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def wait_for_word(root: Path, url: str, seconds: float, report: Callable[[str], None]) -> bool:
    """Wait until a node's coordinator has let it in; return False where it does not answer in time.

    Raises ServiceError: it does not let the node in, also not when a node that was killed would be away.
    """
    word, until, told = root / records.NODE / WORD, time.monotonic() + seconds, False
    while not (found := read_json(word) if word.exists() else {}).get("in"):
        if not is_running(root, FEDERATION):
            ended = root / records.ENDED
            raise ServiceError(
                ended.read_text() if ended.exists() else "the node's link has ended",
                remedy="ask the coordinator for another invitation; more is in .ratchet/logs/federation.log",
            )
        if found and not told:
            report(
                f"{url} does not let this node in; it is asked again for {REFUSED_SECONDS:.0f} s, since a "
                "node that was killed counts as connected for a minute"
            )
            told = True
        if not found and time.monotonic() > until:
            return False
        time.sleep(0.3)
    return True


class Said:
    """What a process says, in a file of its own; `pass_on` says it again here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.out: BinaryIO = path.open("wb")
        self._read = 0

    def pass_on(self) -> str:
        """Return the whole lines that are new."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            lines, end, _ = file.read().rpartition(b"\n")
        self._read += len(lines + end)
        text = lines.decode(errors="replace")
        if text:
            sys.stderr.write(f"{text}\n")
        return text


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
        home, ready = folder / "supernode", folder / READY
        home.mkdir(exist_ok=True)
        supernode = [
            flower.flower("flower-supernode"),
            *("--superlink", settings.url, "--root-certificates", str(folder / NODE_AUTHORITY)),
            *("--auth-supernode-private-key", str(folder / NODE_KEY)),
            *("--isolation", "process", "--host", HOST, "--port", str(port)),
        ]
        said = Said(home / "said.log")
        children.start("the SuperNode", supernode, environment, home, said.out)
        command = [flower.flower("python"), str(LINK / "node_app.py"), f"{HOST}:{port}"]
        children.start("the node's loop", command, environment, root)
        say(f"node {settings.name}: connects to {settings.url}")
        since: float | None = None  # it is refused
        while True:
            if LET_IN in said.pass_on():
                write_json(folder / WORD, {"in": True})
                since = None
            if (code := children.code("the SuperNode")) is not None:
                write_json(folder / WORD, {"in": False})
                since = since or time.monotonic() if code >= 0 else None
                if since is None or time.monotonic() - since < REFUSED_SECONDS:
                    say(f"the SuperNode ended with code {code}: it starts again in {TRY_SECONDS:.0f} s")
                    time.sleep(TRY_SECONDS)
                    children.start("the SuperNode", supernode, environment, home, said.out)
                else:
                    raise ServiceError(
                        f"the coordinator at {settings.url} did not let this node in for "
                        f"{REFUSED_SECONDS:.0f} s: was it removed, or is another address meant?",
                        remedy="ask the coordinator for another invitation",
                    )
            children.check()
            if not ready.exists() and _answers(HOST, port):
                write_json(ready, {"port": port})
            time.sleep(1)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, _stop)
    root = project_root()
    try:
        with locked(root, FEDERATION, wait=False):
            (root / records.ENDED).unlink(missing_ok=True)
            if sys.argv[1] == "coordinator":
                run_coordinator(root, load_config(root / "params.yaml"))
            else:
                run_node(root)
    except KeyboardInterrupt:
        return 0
    except RatchetError as error:
        say(f"{type(error).__name__}: {error}", error=True)
        write_text(root / records.ENDED, str(error).splitlines()[0])
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
