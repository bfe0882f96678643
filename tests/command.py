"""Run `ratchet` as people type it, in this process or in one of its own.

A process spends a second on imports, more where it needs pandas or MLflow. Most tests ask what the command
says and does, which is the same in both (`tests/cli/test_cli.py` holds them against each other).
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from patience import scaled

from ratchet.cli.context import Here
from ratchet.cli.main import main

ROOT = Path(__file__).parents[1]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "ratchet.cli", *map(str, arguments)]


def in_process(*arguments: str | Path, cwd: Path = ROOT, given: str = "") -> Done:
    """Start a process for the command, and wait for its end."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(100),
    )
    return Done(done.returncode, done.stdout, done.stderr)


def ratchet(*arguments: str | Path, cwd: Path = ROOT, given: str = "") -> Done:
    """Run the command here, and put back what it changes: streams, environment, folder, SIGTERM's handler."""
    streams = {"stdin": io.StringIO(given), "stdout": io.StringIO(), "stderr": io.StringIO()}
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["ratchet", *map(str, arguments)])
        patch.setattr(Here, "path", None)
        patch.setattr(Here, "debug", False)
        patch.chdir(cwd)
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)
    return Done(code, streams["stdout"].getvalue(), streams["stderr"].getvalue())
