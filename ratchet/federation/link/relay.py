"""Pass requests from files to nodes, and their replies back: the ServerApp of the coordinator.

It runs in Flower's own environment, so it imports nothing of ours, and reads no message: it moves bytes. The
folder of the exchange is named by RATCHET_EXCHANGE:

    nodes.json              ids of the nodes that are connected, written anew when they change
    ask-N/request.json      {"seconds": how long replies are waited for}, written last
    ask-N/NODE.request      bytes for one node
    ask-N/NODE.reply        bytes of its reply, or NODE.error with a reason
    ask-N/done              when there is nothing more to come
    alive                   touched while the app runs
    lock                    held by the app, with its process id: an older one may go on when a SuperLink is
                            killed

Flower gives a message to a node once. When node or SuperLink is killed, message or reply may be lost, and
nobody tells. A node takes messages one by one, so an answer to a later one, the probe, tells that the request
is lost; it is sent again then. A node that answered already repeats itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
nothing = ClientApp()  # a node runs its own command, see node_app.py
POLL = 0.2  # seconds between two looks at the folder
NODES = 2.0  # seconds between two looks at who is connected
AWAY = 300.0  # seconds that a node which was asked may be away
PROBE, PROBES = b"here?", 10.0  # what node_app.py repeats; seconds between two, after which one expires
FAILED = 1  # the code of an error of the node's command; other codes are Flower's own, and something was lost


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    exchange = Path(os.environ["RATCHET_EXCHANGE"])
    with (exchange / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        threading.Thread(target=touch, args=[exchange / "alive"], daemon=True).start()
        nodes = Nodes(grid, exchange / "nodes.json")
        while True:
            nodes.look()
            for asked in sorted(exchange.glob("ask-*/request.json")):
                # The coordinator takes away the folder of a run that it has done with.
                with contextlib.suppress(FileNotFoundError):
                    if not (asked.parent / "done").exists():
                        Ask(grid, nodes, asked.parent).relay()
            time.sleep(POLL)


def touch(path: Path) -> None:
    """Touch the file as long as the process runs: a large message takes minutes to go out."""
    while True:
        path.touch()
        time.sleep(1.0)


class Nodes:
    """Who is connected, also in a file."""

    def __init__(self, grid: Grid, path: Path) -> None:
        self._grid, self._path = grid, path
        self._looked = -NODES
        self._written: list[str] | None = None

    def look(self) -> set[str] | None:
        """Return the ids of the nodes that are connected; None when the last look was just before."""
        if time.monotonic() - self._looked < NODES:
            return None
        self._looked, found = time.monotonic(), sorted(str(node) for node in self._grid.get_node_ids())
        if found != self._written:
            write(self._path, json.dumps(found).encode())
            self._written = found
        return set(found)


class Ask:
    """The requests of one folder that have no reply yet."""

    def __init__(self, grid: Grid, nodes: Nodes, folder: Path) -> None:
        self._grid, self._nodes, self._folder = grid, nodes, folder
        self._seconds = float(json.loads((folder / "request.json").read_text())["seconds"])
        self._seen = {  # node without a reply → when it was connected
            path.stem: time.monotonic()
            for path in sorted(folder.glob("*.request"))
            if not any(path.with_suffix(end).exists() for end in (".reply", ".error"))
        }
        self._sent: dict[str, str] = {}  # message id → node
        self._probes: dict[str, str] = {}
        self._probed: dict[str, float] = {}  # node → when it got the last request or probe

    def relay(self) -> None:
        """Send the requests, and write replies as they come, until all are here or the time is up."""
        until = time.monotonic() + self._seconds
        while self._seen and time.monotonic() < until and self._folder.exists():
            here = self._nodes.look()
            if here is not None:
                self._send(here)
            self._receive()
            time.sleep(POLL)
        for node in list(self._seen):
            self._close(node, "error", f"no reply within {self._seconds:.0f} s".encode())
        write(self._folder / "done", b"")

    def _send(self, here: set[str]) -> None:
        now = time.monotonic()
        for node, seen in list(self._seen.items()):
            if node in here:
                self._seen[node] = now
                if node not in self._sent.values():
                    data = (self._folder / f"{node}.request").read_bytes()
                    self._push(self._sent, node, data, self._seconds)
                elif now - self._probed[node] > PROBES:
                    self._push(self._probes, node, PROBE, PROBES)
            elif now - seen > AWAY:
                self._close(node, "error", f"it has been away for {AWAY:.0f} s".encode())

    def _push(self, known: dict[str, str], node: str, data: bytes, seconds: float) -> None:
        message = Message(pack(data), int(node), "train", ttl=seconds, group_id=self._folder.name)
        (sent,) = self._grid.push_messages([message]) or [""]
        if sent:
            known[sent], self._probed[node] = node, time.monotonic()

    def _receive(self) -> None:
        asked, lost = [*self._sent, *self._probes], []
        for reply in self._grid.pull_messages(asked) if asked else []:
            number = reply.metadata.reply_to_message_id
            if number in self._probes:
                node = self._probes.pop(number)
                lost += [] if reply.has_error() else [node]
                continue
            node = self._sent.pop(number)
            if not reply.has_error():
                self._close(node, "reply", unpack(reply.content))
            elif reply.error.code == FAILED:
                self._close(node, "error", str(reply.error.reason).encode())
        self._sent = {number: node for number, node in self._sent.items() if node not in lost}

    def _close(self, node: str, kind: str, data: bytes) -> None:
        write(self._folder / f"{node}.{kind}", data)
        del self._seen[node]


def pack(data: bytes) -> RecordDict:
    """Put bytes into a record that Flower sends in pieces."""
    return RecordDict({"message": ArrayRecord({"bytes": Array(np.frombuffer(data, np.uint8))})})


def unpack(content: Any) -> bytes:
    found: bytes = content["message"]["bytes"].numpy().tobytes()
    return found


def write(path: Path, data: bytes) -> None:
    """Write a whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
