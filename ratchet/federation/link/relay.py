"""Pass requests from files to nodes, and their replies back: the ServerApp of the coordinator.

It runs in Flower's own environment, so it imports nothing of ours, and reads no message: it moves bytes. The
folder of the exchange is named by RATCHET_EXCHANGE:

    nodes.json              ids of the nodes that are connected, written anew when they change
    ask-N/request.json      {"seconds": how long replies are waited for}, written last
    ask-N/NODE.request      bytes for one node
    ask-N/NODE.reply        bytes of its reply, or NODE.error with a reason
    ask-N/done              when there is nothing more to come
    alive                   touched while the app runs
"""

from __future__ import annotations

import json
import os
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


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    exchange, seen, looked = Path(os.environ["RATCHET_EXCHANGE"]), None, 0.0
    while True:
        (exchange / "alive").touch()
        if time.monotonic() - looked > NODES:
            looked, nodes = time.monotonic(), sorted(grid.get_node_ids())
            if nodes != seen:
                write(exchange / "nodes.json", json.dumps([str(node) for node in nodes]).encode())
                seen = nodes
        for asked in sorted(exchange.glob("ask-*/request.json")):
            if not (asked.parent / "done").exists():
                relay(grid, asked.parent)
        time.sleep(POLL)


def relay(grid: Grid, folder: Path) -> None:
    """Send the requests of a folder that have no reply yet, and write replies as they come."""
    seconds = json.loads((folder / "request.json").read_text())["seconds"]
    waiting: dict[str, str] = {}  # message id → node
    for path in sorted(folder.glob("*.request")):
        if not any(path.with_suffix(end).exists() for end in (".reply", ".error")):
            message = Message(
                pack(path.read_bytes()), int(path.stem), "train", ttl=seconds, group_id=folder.name
            )
            (sent,) = grid.push_messages([message]) or [""]
            if sent:
                waiting[sent] = path.stem
            else:
                write(folder / f"{path.stem}.error", b"the node is not connected")
    until = time.monotonic() + seconds
    while waiting and time.monotonic() < until:
        (folder.parent / "alive").touch()
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():
                write(folder / f"{node}.error", str(reply.error.reason).encode())
            else:
                write(folder / f"{node}.reply", unpack(reply.content))
        time.sleep(POLL)
    for node in waiting.values():
        write(folder / f"{node}.error", f"no reply within {seconds:.0f} s".encode())
    write(folder / "done", b"")


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
