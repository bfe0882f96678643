"""A federation in this process: no network, and stages that share the torch that is loaded."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from parties import Direct

from ratchet.federation.node import handle


class Calm(Direct):
    """The same nodes without a network, and with the stages in this process, which has torch already."""

    def call(self, root: Path, request: bytes) -> bytes | str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "run", run_here)
            return handle(root, request)


def run_here(
    command: list[str], cwd: Path, env: dict[str, str], **_: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run `python -m MODULE` here."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that was imported before
        patch.setattr(sys, "argv", command[2:])
        patch.chdir(cwd)
        patch.setenv("RATCHET_ROOT", env["RATCHET_ROOT"])
        try:
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return subprocess.CompletedProcess(command, int(end.code or 0))
        return subprocess.CompletedProcess(command, 0)
