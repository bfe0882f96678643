"""`ratchet demo`: the whole loop on the embedded default, in a clone of its own under .ratchet/demo.

Every figure that it prints is read from the records of the run. The user's checkout gets no commit and no change; the
services go on running, so that their pages can be looked at.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ratchet.config import Config, load_config
from ratchet.errors import CheckoutError, RatchetError
from ratchet.files import read_json, write_text
from ratchet.services import find_port_fault, stop_services
from ratchet.status import ledger_lines, ledger_rows
from ratchet.workspace import child_environment, git

PLACE = Path(".ratchet/demo")
SECOND = "numpy,jinja2,rich"
GOLDEN_ROWS = 150
console = Console(highlight=False)


def run_demo(root: Path, *, until: str = "v2") -> None:
    """Raises RatchetError when a step fails; the demo's checkout and its services are left to look at."""
    started = time.perf_counter()
    with _peak_memory() as peak:
        home = make_checkout(root)
        config = load_config(home / "params.yaml")
        _story(home, until)
    _print_pages(home, config)
    console.print(f"\n[bold]{time.perf_counter() - started:.0f} s[/bold] in all, peak memory {peak[0] / 2**30:.2f} GiB (all processes of the demo together)")
    console.print(f"go on:  ratchet -C {PLACE} status | rollback | history | retrain\nstop:   ratchet -C {PLACE} down")


def _story(home: Path, until: str) -> None:
    _step("1  MLflow, Prefect and the deployments start, on 127.0.0.1 only")
    _ratchet(home, "up")
    _step("2  The standard library's documentation comes in: a frozen golden set, then the first batch")
    _ratchet(home, "ingest", "--packages", "stdlib", "--golden", str(GOLDEN_ROWS))
    _ratchet(home, "ingest", "--packages", "stdlib")
    _step("3  The base is pre-trained here, an adapter is trained on it, and the gate compares the two")
    _ratchet(home, "retrain", "--reason", "first model of the standard library")
    _print_scores(home, {"base": "base", "candidate": "v1", "simple": "TF-IDF"})
    if until == "v1":
        return
    _step(f"4  Three packages that v1 has never seen come in: {SECOND}")
    _ratchet(home, "ingest", "--packages", SECOND)
    _step("5  Retraining from v1 with replay; v1 and the candidate are scored on the same rows")
    _ratchet(home, "retrain", "--reason", f"documentation of {SECOND}")
    _print_scores(home, {"base": "base", "champion": "v1", "candidate": "v2", "simple": "TF-IDF"})
    _print_verdict(home)
    _step("6  Nothing changed since: every stage is skipped")
    _ratchet(home, "retrain", "--reason", "nothing new")
    _step("The ledger")
    console.print("\n".join(escape(line) for line in ledger_lines(ledger_rows(home))))


def make_checkout(root: Path) -> Path:
    """A fresh clone of the last commit, without a remote, on free ports. Raises CheckoutError when `root` is no clone."""
    try:
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except RatchetError:
        raise CheckoutError(f"{root} is no git repository with a commit", remedy="the demo works on a clone of it: git init && git add -A && git commit -m start") from None
    home = root / PLACE
    if home.exists():
        console.print(f"an earlier demo is removed: {PLACE}")
        stop_services(home, report=lambda _: None)
        shutil.rmtree(home)
    home.parent.mkdir(parents=True, exist_ok=True)
    git(root, "clone", "--quiet", str(root), str(home))
    # A clone of a clone would push there; and a branch name is needed where HEAD was detached (a CI runner).
    git(home, "remote", "remove", "origin")
    git(home, "checkout", "--quiet", "-B", "main")
    if git(root, "status", "--porcelain", "--untracked-files=no").strip():
        console.print("note: your checkout has uncommitted changes; the demo runs the last commit")
    _use_free_ports(home)
    return home


def _use_free_ports(home: Path) -> None:
    """The demo shall not fall over a port that something else holds; its own params.yaml says which it took."""
    params = home / "params.yaml"
    text, services = params.read_text(encoding="utf-8"), load_config(params).services
    for key, port in (("mlflow_port", services.mlflow_port), ("prefect_port", services.prefect_port)):
        if find_port_fault(port):
            text = text.replace(f"{key}: {port}", f"{key}: {_free_port()}")
    if text != params.read_text(encoding="utf-8"):
        write_text(params, text)
        git(home, "-c", "user.name=Ratchet", "-c", "user.email=ratchet@localhost", "commit", "--quiet", "--all", "--message", "Take free ports for the demo")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ratchet(home: Path, *arguments: str) -> None:
    """The command as a user types it, its lines passed through."""
    console.print(f"[dim]$ ratchet -C {PLACE} {' '.join(arguments)}[/dim]")
    environment = {name: value for name, value in child_environment().items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    done = subprocess.run([sys.executable, "-m", "ratchet.cli", "-C", str(home), *arguments], env=environment, cwd=home, check=False)
    if done.returncode:
        raise RatchetError(
            f"`ratchet {' '.join(arguments)}` ended with exit code {done.returncode}",
            remedy=f"its message stands above; {PLACE} is left as it was, `ratchet -C {PLACE} down` stops the services",
        )


def _print_scores(home: Path, names: dict[str, str]) -> None:
    """Old and new material apart, as the evaluation recorded them."""
    slices = read_json(home / "reports/evaluation/metrics.json")["slices"]
    shown = Table(title="exact match on held-out rows [95 % interval]; TF-IDF is a plain classifier for comparison", title_justify="left")
    shown.add_column("rows of")
    shown.add_column("n", justify="right")
    for label in names.values():
        shown.add_column(label)
    for name in [name for name in slices if name.startswith("batch:")] + [name for name in ("test", "golden") if name in slices]:
        part = slices[name]
        label = {"test": "all test rows", "golden": "the golden set"}.get(name, name.partition("-")[2].rpartition("-")[0])
        shown.add_row(label, str(next(iter(part.values()))["rows"]), *(_cell(part[model]["exact_match"]) for model in names if model in part))
    console.print(shown)


def _cell(found: dict[str, float]) -> str:
    return escape(f"{found['mean']:.0%} [{found['low'] * 100:.0f}–{found['high'] * 100:.0f}]")


def _print_verdict(home: Path) -> None:
    decision = read_json(home / "reports/gate.json")
    console.print(f"gate: [bold]{decision['verdict']}[/bold]")
    if decision["verdict"] != "promote":
        console.print("[yellow]the candidate was not promoted: v1 stays in charge. That is the gate's work, and worth a look at the reasons above.[/yellow]")


def _print_pages(home: Path, config: Config) -> None:
    mlflow, prefect = (f"http://127.0.0.1:{port}" for port in (config.services.mlflow_port, config.services.prefect_port))
    console.print(f"\nMLflow   {mlflow}/#/models/{config.project.name}\nPrefect  {prefect}/runs\ngit log  git -C {PLACE} log --oneline")


def _step(title: str) -> None:
    console.rule(f"[bold]{title}", align="left")


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Highest sum of proportional memory over this process and all that it started, in bytes, looked at once a second."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            peak[0] = max(peak[0], _family_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _family_memory() -> int:
    """Services outlive their parents, so a process of the demo is told by the folder that it works in."""
    total = 0
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or str(PLACE) in process.cwd() or str(PLACE) in " ".join(process.cmdline()):
                total += process.memory_full_info().pss
        except (psutil.Error, AttributeError, OSError):
            continue
    return total
