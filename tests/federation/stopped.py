"""Run something in a process of its own that is killed just before its n-th change of a folder.

The changes are those that the interpreter announces to audit hooks: files that are opened for writing,
renamed or removed, and folders that are made or removed. What stages and libraries in other languages write
is not among them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0}  # event → place of the path
ALL = frozenset({"open", *EVENTS})
WRITING = os.O_WRONLY | os.O_RDWR


class Stop(NamedTuple):
    """Where a process is killed: before the `moment`-th of these changes, from 1, below the folder."""

    folder: Path
    moment: int
    events: Collection[str] = ALL


def run(task: Callable[[], object], stop: Stop) -> list[str] | None:
    """Return the changes of a task that came to its end, such as `os.rename member.json`; None: killed.

    The task and what it holds are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ratchet.federation.node", "ratchet.federation.link.flower"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, stop, theirs))
    process.start()
    theirs.close()
    try:
        changes: list[str] | None = ours.recv()
    except EOFError:
        changes = None
    process.join()
    assert process.exitcode == (0 if changes is not None else -signal.SIGKILL), process.exitcode
    return changes


def _run(task: Callable[[], object], stop: Stop, connection: Connection) -> None:
    seen: list[str] = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        path = _changed(event, arguments) if event in stop.events else ""
        if path and Path(path).is_relative_to(stop.folder):
            seen.append(f"{event} {Path(path).name}")
            if len(seen) == stop.moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    task()
    connection.send(list(seen))


def _changed(event: str, arguments: tuple[object, ...]) -> str:
    """Return the path that an event is about to change, or nothing."""
    if event in EVENTS:
        return os.fsdecode(arguments[EVENTS[event]])  # type: ignore[arg-type]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        return os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    return ""
