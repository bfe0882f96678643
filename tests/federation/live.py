"""A federation of real processes on this machine, as people start it, of which each can be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil
from command import Done, ratchet
from patience import patience, scaled

from ratchet.config.params import Config
from ratchet.federation.link.flower import FOLDER, read_names
from ratchet.federation.rounds import Plan
from ratchet.files import read_json, write_json, write_text
from ratchet.services.processes import free_port

RUN = """
import json, sys
from pathlib import Path
import msgspec
from safetensors.torch import load_file
from ratchet.config.federation import FederateConfig
from ratchet.federation.aggregation import Aggregate
from ratchet.federation.link.flower import FlowerLink
from ratchet.federation import rounds
asked = json.loads(Path(sys.argv[1]).read_text())
rounds.STEP_SECONDS *= asked["patience"]
plan = rounds.Plan(**asked["plan"] | {"settings": FederateConfig(**asked["plan"]["settings"])})
start = Aggregate(load_file(asked["start"]), {})
rounds.run_rounds(FlowerLink(Path(asked["root"])), Path(asked["folder"]), start, plan, print)
"""


class Live:
    """The coordinator's checkout and those of its nodes; `up`, `invite` and `join` are the commands."""

    def __init__(self, root: Path, config: Config) -> None:
        self.root = root
        ports = {"port": free_port(), "superlink_port": free_port()}
        self.config = config.model_copy(update={"federate": config.federate.model_copy(update=ports)})
        write_text(root / "params.yaml", json.dumps(self.config.model_dump(mode="json")))
        self.nodes: dict[str, Path] = {}
        self.runs: list[subprocess.Popen[str]] = []

    def ratchet(self, home: Path, *arguments: str | Path) -> Done:
        """Run a command in a checkout."""
        return ratchet("-C", home, *arguments)

    def start(self, command: list[str], log: IO[str]) -> subprocess.Popen[str]:
        """Start a process of the coordinator."""
        return subprocess.Popen(command, text=True, stdout=log, stderr=subprocess.STDOUT)

    def up(self) -> Done:
        return _done(self.ratchet(self.root, "federate", "up"))

    def command(self, side: str) -> list[str]:
        """What `up` and `join` start, for starting it by hand."""
        return [sys.executable, "-m", "ratchet.federation.link.party", side]

    def environment(self) -> dict[str, str]:
        return os.environ | {"RATCHET_ROOT": str(self.root)}

    def invite(self, home: Path) -> Path:
        invitation = self.root / f"{home.name}.invitation"
        _done(self.ratchet(self.root, "federate", "invite", home.name, "--out", invitation))
        self.nodes[home.name] = home
        return invitation

    def join(self, home: Path, *invitation: Path) -> Done:
        return _done(self.ratchet(home, "federate", "join", *invitation))

    def connected(self) -> set[str]:
        """The names of the nodes that the relay sees."""
        names, path = read_names(self.root / FOLDER), self.root / FOLDER / "exchange/nodes.json"
        return {names[number] for number in (read_json(path) if path.exists() else []) if number in names}

    def start_run(self, folder: Path, start: Path, plan: Plan) -> subprocess.Popen[str]:
        """Begin the rounds, or go on with them, in a process of its own."""
        described = msgspec.to_builtins(plan._asdict() | {"settings": plan.settings.model_dump(mode="json")})
        asked = folder.with_suffix(".json")
        paths = {"root": str(self.root), "folder": str(folder), "start": str(start)}
        write_json(asked, {**paths, "plan": described, "patience": patience()})
        with folder.with_suffix(".log").open("a") as log:
            command = [sys.executable, "-c", RUN, str(asked)]
            self.runs.append(self.start(command, log))
        return self.runs[-1]

    def stop(self) -> None:
        for run in self.runs:
            run.kill()
            run.wait()
        for home in (*self.nodes.values(), self.root):
            self.ratchet(home, "federate", "down")


def _done(done: Done) -> Done:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def party(home: Path) -> psutil.Process:
    return psutil.Process(read_json(home / ".ratchet/run/federation.json")["pid"])


def find(home: Path, words: str) -> psutil.Process | None:
    """The process below a checkout's link whose command line holds these words."""
    for process in party(home).children(recursive=True):
        try:
            if words in " ".join(process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None


def kill(*processes: psutil.Process) -> None:
    """Kill them as the system does when memory runs out; whoever has ended already stays so."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=scaled(10))


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> None:
    until = time.monotonic() + scaled(seconds)
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.1)
