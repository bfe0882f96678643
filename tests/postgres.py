"""Run a real PostgreSQL of our own on a free port of 127.0.0.1, which asks for a password."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from patience import scaled

from ratchet.services.processes import free_port

PASSWORD = "mulberry/17@lake"
QUOTED = "mulberry%2F17%40lake"  # as a URL has it


def connect(port: int, database: str = "postgres") -> Any:
    import psycopg

    return psycopg.connect(
        host="127.0.0.1", port=port, user="ana", password=PASSWORD, dbname=database, autocommit=True
    )


@contextmanager
def postgres() -> Iterator[int]:
    """Yield the port; skips where PostgreSQL or its driver is missing."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (the extra `store`)")
    programs = find_programs()
    folder = Path(
        tempfile.mkdtemp(prefix="ratchet-postgres-")
    )  # not under pytest's folder, which no other user may enter
    user = unprivileged_user(folder)
    (folder / "password").write_text(PASSWORD, encoding="utf-8")
    make = [
        programs / "initdb",
        "--no-sync",
        "--auth=scram-sha-256",
        "--username=ana",
        f"--pwfile={folder / 'password'}",
        "--encoding=UTF8",
        "-D",
        folder / "data",
    ]
    subprocess.run(make, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    port = free_port()
    start = [
        programs / "postgres",
        "-D",
        folder / "data",
        "-F",
        "-p",
        str(port),
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        "unix_socket_directories=",
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(start, user=user, cwd=folder, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_ready(port, process, folder / "log")
            yield port
        finally:
            process.send_signal(signal.SIGINT)  # its fast shutdown: sessions are ended, not waited for
            process.wait(timeout=scaled(30))
    shutil.rmtree(folder)


def find_programs() -> Path:
    """Debian keeps them out of PATH, in a folder a version."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path] + sorted(
        Path("/usr/lib/postgresql").glob("*/bin")
    )
    complete = [folder for folder in found if (folder / "initdb").exists() and (folder / "postgres").exists()]
    if not complete:
        pytest.skip("there is no PostgreSQL (apt-get install postgresql)")
    return complete[-1]


def unprivileged_user(folder: Path) -> int | None:
    """PostgreSQL refuses to run as root."""
    if os.getuid() != 0:
        return None
    user = next(entry for name in ("postgres", "nobody") for entry in pwd.getpwall() if entry.pw_name == name)
    os.chown(folder, user.pw_uid, user.pw_gid)
    return user.pw_uid


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    until = time.monotonic() + scaled(30)
    while time.monotonic() < until and process.poll() is None:
        try:
            connect(port).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    pytest.fail(f"PostgreSQL did not start:\n{log.read_text()}")
