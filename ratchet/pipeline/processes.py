"""Name a process so that another one with its id is not taken for it, and end a stage with its starter.

A process is named by its id and the time of its start, since systems give ids out again.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

# Processes with the same id are created more than 2 s apart. If the clock is corrected by more than this
# while a service runs, the service is not recognised.
SAME_START_SECONDS = 2.0
STARTER = "RATCHET_STARTER"  # names the process of the run that a stage belongs to
LOOK_SECONDS, GRACE_SECONDS = 0.5, 60.0  # between two looks at it; for the checkpoint of a training


def name_process(pid: int | None = None) -> str:
    """Return the name of a process, or of this one: its id and its start in seconds since 1970."""
    process = psutil.Process(pid)
    return f"{process.pid} {process.create_time():.2f}"


def find_named(name: str) -> psutil.Process | None:
    """Find a process by its name; None when it ended, or `name` is none."""
    pid, _, created = name.strip().partition(" ")
    with suppress(ValueError):
        return find_process(int(pid), float(created))
    return None


def find_process(pid: int, created: float) -> psutil.Process | None:
    """Find the process that had this id at this time; None when it ended, even if another has its id now."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < SAME_START_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def end_with_starter() -> None:
    """End this process when the run that started it is gone, whatever killed that.

    A stage has a session of its own, and DVC and a shell stand between it and the run, so no signal to the
    run's group reaches it, and the death of its parent says nothing of the run. A training is asked to stop,
    so that its newest step is kept; what has not ended after GRACE_SECONDS is ended.
    """
    name = os.environ.get(STARTER)
    if name is None:
        return
    starter = find_named(name)

    def watch() -> None:
        # Once found it is compared by psutil, which a correction of the clock does not mislead.
        while starter and _runs(starter):
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="starter", daemon=True).start()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def write_name(path: Path, pid: int) -> None:
    """Keep a child's name in a file; one that has ended already leaves none."""
    with suppress(psutil.Error):
        path.write_text(name_process(pid), encoding="utf-8")
