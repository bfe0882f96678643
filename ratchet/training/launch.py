"""Run `python -m tasks.train` in a process and a folder of its own, and follow it while it runs.

For trainings outside the DAG: the probe of `ratchet plan`, the trials of `ratchet sweep`, the methods of
`ratchet compare`. Checkpoints stay in the folder. Nothing is sent to MLflow; the caller records the training.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import ConfigError, StageError
from ratchet.files import read_json, write_text
from ratchet.pipeline.checkout import child_environment
from ratchet.pipeline.dvc import without_torchrun
from ratchet.pipeline.processes import find_named, write_name
from ratchet.tracking.curve import read_history
from ratchet.training.schedule import Figures, Points

CODE = Path(__file__).resolve().parents[2]  # the training runs the same code as this process
CANDIDATE, REPORTS, PARAMS, LOG, PROCESS = "candidate", "reports", "params.yaml", "train.log", "process"
POLL_SECONDS = 0.05
STOP_SECONDS = 20.0  # for a checkpoint, before a training that was asked to end is killed
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory", "MemoryError")


class Material(NamedTuple):
    """What a training reads."""

    tokens: Path
    base: Path
    incumbent: Path


class Ended(NamedTuple):
    """How a training ended. `seconds` are those of the process; `stopped` is true if `follow` ended it."""

    code: int
    seconds: float
    stopped: bool
    said: list[str]

    @property
    def reason(self) -> str:
        """Return why it failed, in one line."""
        told = [
            f"{line.strip()} {after.strip()}" if after.lstrip().startswith("→") else line
            for line, after in pairwise([*self.said, ""])
            if "Error: " in line
        ]
        if self.code == -signal.SIGKILL and not self.stopped:
            return "its process was killed: out of memory?"
        return (told or self.said or [f"exit code {self.code}"])[-1].strip()[:500]

    @property
    def out_of_memory(self) -> bool:
        return not self.stopped and (
            self.code == -signal.SIGKILL or any(word in line for line in self.said for word in OUT_OF_MEMORY)
        )


def refuse_private(config: Config, what: str) -> None:
    """Raise ConfigError with `train.privacy`: trainings outside the DAG are in no ledger."""
    if config.train.privacy.epsilon:
        raise ConfigError(
            f"`train.privacy.epsilon` is set, and `ratchet {what}` trains on these rows outside the ledger "
            "of what they have spent",
            remedy="choose settings on rows that need no privacy, or by `ratchet retrain` within the budget",
        )


def run_training(
    folder: Path, material: Material, config: Config, follow: Callable[[Points], bool] = lambda points: False
) -> Ended:
    """Train into `folder`/candidate and `folder`/reports.

    `follow` sees the curve as it grows; when it returns True, the process is killed at once.
    """
    _end_orphan(folder)
    for half in folder.glob(".*.tmp"):  # left by a killed process, whose curve must not be followed
        shutil.rmtree(half, ignore_errors=True)
    write_text(folder / PARAMS, render_params(config))
    paths = {
        **material._asdict(),
        "out": folder / CANDIDATE,
        "reports": folder / REPORTS,
        "params": folder / PARAMS,
    }
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(path.absolute()))]
    return run_module("tasks.train", arguments, folder, lambda: follow(read_points(folder)))


def run_module(
    module: str, arguments: list[str], folder: Path, follow: Callable[[], bool] = lambda: False
) -> Ended:
    """Run a stage's module with its output in `folder`/train.log.

    On an exception here, such as Ctrl-C, the process is asked to end and is waited for.
    """
    environment = {**child_environment(), "RATCHET_ROOT": str(folder.absolute())}
    environment.pop("MLFLOW_TRACKING_URI", None)
    began = time.monotonic()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        # In a session of its own, so that Ctrl-C in a terminal reaches only us, and we end the training.
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=CODE,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        write_name(folder / PROCESS, process.pid)
        try:
            stopped = _watch(process, follow)
        except BaseException:
            _end(process)
            raise
    said = without_torchrun((folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines())
    return Ended(process.returncode, time.monotonic() - began, stopped, said[-30:])


def _watch(process: subprocess.Popen[bytes], follow: Callable[[], bool]) -> bool:
    while process.poll() is None:
        if follow():
            _kill(process)  # no result is wanted, not even a checkpoint
            return True
        time.sleep(POLL_SECONDS)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, so that a training writes its checkpoint; kill it after STOP_SECONDS."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        _kill_tree(psutil.Process(process.pid))
    process.wait()


def _kill_tree(process: psutil.Process) -> None:
    """Kill a process and its children: those of torchrun have their own sessions, and would live on."""
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            each.kill()


def _end_orphan(folder: Path) -> None:
    """Kill a training in this folder whose starter was killed, as it would keep writing into the folder."""
    with suppress(OSError, psutil.Error):
        if process := find_named((folder / PROCESS).read_text(encoding="utf-8")):
            _kill_tree(process)


def read_points(folder: Path) -> Points:
    """Read the curve so far; while it grows, its folder has a temporary name (`whole_folder`)."""
    growing = next(folder.glob(f".{REPORTS}.*.tmp/history.jsonl"), None)
    return read_history(growing or folder / REPORTS / "history.jsonl")


def read_figures(folder: Path) -> Figures:
    found: Figures = read_json(folder / REPORTS / "figures.json")
    return found


def require_success(ended: Ended, what: str) -> None:
    """Raise StageError, with the training's own message, if it failed."""
    if ended.code:
        remedy = (
            "lower `train.batch_windows`, set `train.checkpoint_activations: true`,"
            " or take `adapter.method: qlora`"
            if ended.out_of_memory
            else ""
        )
        raise StageError(
            f"{what} failed: {ended.reason}", exit_code=2 if ended.code == 2 else 1, remedy=remedy
        )
