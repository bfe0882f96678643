"""End processes with their children, find who holds a port, and tell where a process id means something."""

from __future__ import annotations

import os
import platform
import secrets
import signal
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from ratchet.errors import UserError
from ratchet.services.environment import HOST, PROBE_SECONDS


def require_free_port(port: int, key: str) -> None:
    """Raise UserError when `port` is taken, with its holder where the system tells, and the key to change."""
    fault = find_port_fault(port)
    if fault:
        raise UserError(
            f"{key} is {port}: {fault}", remedy=f"stop that, or set {key} in params.yaml to another port"
        )


def find_port_fault(port: int) -> str | None:
    """Return why a service could not listen on 127.0.0.1:port, or None."""
    with socket.socket() as probe:
        probe.settimeout(PROBE_SECONDS)
        # Connect before binding: where another process listens on all addresses, macOS lets us bind to one of
        # them, and its AirPlay receiver holds 5000 in that way.
        taken = probe.connect_ex((HOST, port)) == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "the system does not let this user listen on it"
        except OSError:
            taken = True
    return (
        f"it is in use by {find_port_holder(port) or 'a process that the system does not name'}"
        if taken
        else None
    )


def free_port() -> int:
    """Return a port that no process listens on.

    It lies below the ports that systems give to outgoing connections (from 32768 on Linux, 49152 elsewhere),
    so no such connection has it by the time that the service listens.
    """
    while find_port_fault(port := secrets.choice(range(20_000, 32_768))):
        pass
    return port


def find_port_holder(port: int) -> str | None:
    """Name the listener, such as `process 4242 (python in /some/folder)`; None where the system hides it."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.laddr
                and connection.laddr.port == port
                and connection.status == psutil.CONN_LISTEN
                and connection.pid
            ):
                process = psutil.Process(connection.pid)
                # Its name and folder alone: its arguments may hold secrets.
                return f"process {process.pid} ({process.name()} in {process.cwd()})"
    return None


@cache
def name_place() -> str:
    """Return a name of this boot of this machine and, in a container, of the container.

    Process ids mean something in one such place only: a container counts its own from 1, and another
    machine that shares the folder has ids of its own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux, so no containers that share a kernel
        return platform.node()


def end_family(leader: psutil.Process, grace: float) -> None:
    """End `leader`, then its children: SIGTERM to it, after `grace` seconds to the rest, 2 s later SIGKILL.

    The leader is signalled first because it ends its own children best: a flow run that gets SIGTERM before
    its runner has told it why reports a crash instead of a cancellation.
    """
    family = _find_family(leader)
    _signal([leader], signal.SIGTERM, seconds=grace)
    left = _signal(family, signal.SIGTERM, seconds=2)
    _signal(left, signal.SIGKILL, seconds=5)


def _signal(
    processes: list[psutil.Process], number: signal.Signals, *, seconds: float
) -> list[psutil.Process]:
    """Send `number` and wait; return the processes that still run when the time is up."""
    for process in processes:
        with suppress(psutil.Error):  # psutil first compares the creation time, so no other process is hit
            process.send_signal(number)
    _, left = psutil.wait_procs(processes, timeout=seconds)
    return list(left)


def _find_family(leader: psutil.Process) -> list[psutil.Process]:
    """Find the leader, its process group, and its descendants, which may have made groups of their own."""
    found = {leader.pid: leader}
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.getpgid(process.pid) == leader.pid:
                found[process.pid] = process
    with suppress(psutil.Error):
        found |= {process.pid: process for process in leader.children(recursive=True)}
    return list(found.values())
