"""Make the checkout of a demo, a clone with settings of its own, and run commands in it as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import CheckoutError, RatchetError
from ratchet.evaluation.statistics import Interval
from ratchet.files import write_text
from ratchet.pipeline.checkout import child_environment, git
from ratchet.services.processes import find_port_fault, free_port
from ratchet.services.supervisor import stop_services

console = Console(highlight=False)
AUTHOR = ("-c", "user.name=Ratchet", "-c", "user.email=ratchet@localhost")  # for git, of a demo's commits


def make_checkout(root: Path, place: Path, values: dict[str, Any]) -> Path:
    """Clone the last commit to `place`, with `values` as params.yaml and free ports; return its folder.

    Raises CheckoutError: `root` is no git repository with a commit.
    """
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except RatchetError:
        raise CheckoutError(
            f"{root} is no git repository with a commit",
            remedy="the demo works on a clone of it: git init && git add -A && git commit -m start",
        ) from None
    home = root / place
    if home.exists():
        console.print(f"an earlier demo is removed: {place}")
        stop_services(home, report=lambda _: None)
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    git(root, "clone", "--quiet", str(root), str(home))
    # Without a remote, the demo cannot push to the user's checkout. A detached HEAD (on a CI runner) has no
    # branch name.
    git(home, "remote", "remove", "origin")
    git(home, "checkout", "--quiet", "-B", "main")
    if git(root, "status", "--porcelain", "--untracked-files=no").strip():
        console.print("note: your checkout has uncommitted changes; the demo runs the last commit")
    _settle(home, values)
    return home


def _settle(home: Path, values: dict[str, Any]) -> None:
    """Write the demo's params.yaml, with free ports and without waiting times, and commit it.

    The ports are the usual ones where they are free now. With RATCHET_FREE_PORTS they never are: two demos
    that run at once, as in the tests, begin to listen minutes later, and would take the same.
    """
    params = home / "params.yaml"
    beside = "RATCHET_FREE_PORTS" in os.environ
    for section, key in (("services", "mlflow_port"), ("services", "prefect_port"), ("gateway", "port")):
        if beside or find_port_fault(values[section][key]):
            values[section][key] = free_port()
    values["synthesize"]["teacher"] |= {"url": f"http://127.0.0.1:{free_port()}/v1", "model": "script"}
    values["monitor"]["cooldown_hours"] = 0.0
    # Names of the new packages have more tokens (numpy.ma against os), so an answer takes a third longer; the
    # margin lets these users accept that.
    values["rollout"] |= {"steps": [0.1, 0.5, 1.0], "step_minutes": 0.0, "latency_margin": 1.0}
    write_text(params, render_params(Config.model_validate(values)))
    git(home, *AUTHOR, "commit", "--quiet", "--all", "--message", "Settle the demo")


def make_values(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a demo's params.yaml: our defaults and `settings`, without the user's changes."""
    values = Config().model_dump(mode="json")
    values["base"]["model"] = model
    _put(values, settings)
    return values


def _put(values: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Overwrite values by settings, section by section."""
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(values[key], dict):
            _put(values[key], value)
        else:
            values[key] = value


def ratchet(home: Path, *arguments: str) -> None:
    """Run a `ratchet` command as a user would, with its output shown. Raises RatchetError if it fails."""
    command = [sys.executable, "-m", "ratchet.cli", "-C", str(home), *arguments]
    run(home, command, told=f"ratchet -C {shown(home)} {' '.join(arguments)}")


def shown(home: Path) -> str:
    """Return the folder of a checkout as users type it: from the place of .ratchet."""
    parts = home.parts
    return str(Path(*parts[parts.index(".ratchet") :])) if ".ratchet" in parts else str(home)


def run(home: Path, command: list[str], *, told: str) -> None:
    """Run a command in the demo's checkout, shown as `told`. Raises RatchetError if it fails."""
    console.print(f"[dim]$ {told}[/dim]")
    environment = {
        name: value
        for name, value in child_environment().items()
        if not name.startswith(("PREFECT_", "MLFLOW_", "RATCHET_"))
    }
    done = subprocess.run(command, env=environment, cwd=home, check=False)
    if done.returncode:
        raise RatchetError(
            f"`{told}` ended with exit code {done.returncode}",
            remedy=f"its message stands above; {shown(home)} is left as it was; `ratchet -C {shown(home)} "
            "down` stops the services",
        )


def step(title: str) -> None:
    """Print the title of a step of the story."""
    console.rule(f"[bold]{escape(title)}", align="left")


def cell(found: Interval) -> str:
    """Return a share with its interval, for a table."""
    return escape(f"{found.mean:.0%} [{found.low * 100:.0f}–{found.high * 100:.0f}]")
