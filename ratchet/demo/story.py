"""Run `ratchet demo`: the whole loop in a separate clone under .ratchet/demo.

The model is a small one that is pre-trained there, of text or of charts, or SmolLM2-135M-Instruct. Every
printed figure is read from the records of the run. The user's checkout gets no commit and no change. The
services keep running, so that people can open their pages.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil
from rich.markup import escape
from rich.table import Table

from ratchet.config.params import Config, load_config
from ratchet.demo.checkout import cell, console, make_checkout, make_values, ratchet, run, step
from ratchet.demo.clients import Reply, ask_gateway, summarise
from ratchet.demo.follow import follow_retraining
from ratchet.demo.material import CHART_BASE, SECOND, Charts, Documentation, Material
from ratchet.demo.smollm2 import SHA256, TEMPLATE, find_smollm2
from ratchet.errors import RatchetError
from ratchet.evaluation.report import read_metrics
from ratchet.evaluation.statistics import wilson
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.rollout import read_rollout
from ratchet.promotion.verdict import read_verdict
from ratchet.services.status import ledger_lines, read_moves

PLACE = Path(".ratchet/demo")
# Pattern of words in the new packages' documentation: a drifted topic that matches gets its rows from there.
TERMS = "array|matri|axis|template|macro|console|style|render"
SOURCES = [{"match": TERMS, "source": "pydoc", "packages": SECOND.split(",")}]


class Scale(NamedTuple):
    """The size of a demo, which depends on its model: settings of params.yaml, rows and questions."""

    settings: dict[str, dict[str, Any]]
    golden_rows: int
    requests: int
    look_requests: int  # questions before each look at the rollout


# Settings for a model of width 128 and rows of one line; the defaults are for real models.
TOY = Scale(
    {
        "ingest": {"pydoc": {"share": 0.85}},
        "prepare": {"min_rows": 200},
        "tokenize": {"max_length": 128, "window": 256},
        "train": {"epochs": 6.0, "learning_rate": 2.0e-3},
        "evaluate": {"max_new_tokens": 32},
        "gate": {"min_rows": 200},
        "monitor": {"min_prompts": 200, "sources": SOURCES},
    },
    golden_rows=150,
    requests=500,
    look_requests=250,
)
# Two cores train 135 million weights on about 200 tokens per second, so only three tenths of the rows (29
# tokens each) are used.
REAL = Scale(
    {
        "base": {"revision": SHA256, "chat_template": TEMPLATE},
        "ingest": {"pydoc": {"share": 0.3, "summaries": 0.0}},
        # Golden rows are chosen from those that would be test rows, so the test share is larger.
        "prepare": {"min_rows": 200, "test_share": 0.3, "validation_share": 0.05},
        "tokenize": {"max_length": 128, "window": 256},
        "train": {"epochs": 2.0, "learning_rate": 5.0e-4, "batch_windows": 1, "evaluations": 4},
        "adapter": {"rank": 16, "alpha": 32.0},
        "evaluate": {"max_new_tokens": 12, "batch_size": 32},
        "parity": {"rows": 40},
        "gate": {"min_rows": 50},
        "monitor": {"min_prompts": 200, "sources": SOURCES},
    },
    golden_rows=150,
    requests=300,
    look_requests=150,
)
# A model of width 96, and rows of 16 tokens of a picture and about as many of text.
CHARTS = Scale(
    {
        "project": {"name": "charts"},
        "prepare": {"min_rows": 200, "test_share": 0.25},
        "tokenize": {"max_length": 64, "window": 128},
        # People's corrections are all that there is of lines. At this width float32 is faster than bfloat16.
        "train": {
            "epochs": 8.0,
            "batch_windows": 16,
            "learning_rate": 2.0e-3,
            "precision": "float32",
            "max_feedback_share": 0.5,
        },
        "adapter": {"rank": 16, "alpha": 32.0},
        "evaluate": {"max_new_tokens": 16},
        "gate": {"min_rows": 100},
        "monitor": {"min_prompts": 100},
        "request_log": {"pictures": True},
    },
    golden_rows=120,
    requests=400,
    look_requests=200,
)
MAX_LOOKS, PARALLEL = 14, 16


def run_demo(root: Path, *, base: str = "demo", until: str = "v2") -> None:
    """Run the demo with the base `demo`, `smollm2` or `charts`; `until="v1"` stops after the first version.

    Raises RatchetError if a step fails, and leaves the demo's checkout and services as they are;
    BaseModelError: SmolLM2 is not on this machine.
    """
    started = time.perf_counter()
    model, scale, material = _choose(root, base)
    with _peak_memory() as peak:
        home = make_checkout(root, PLACE, make_values(model, scale.settings))
        config = load_config(home / "params.yaml")
        _story(home, scale, material, until)
    _print_pages(home, config)
    console.print(
        f"\n[bold]{time.perf_counter() - started:.0f} s[/bold] in all, peak memory {peak[0] / 2**30:.2f} GiB "
        "(all processes of the demo together)"
    )
    console.print(
        f"go on:  ratchet -C {PLACE} status | rollback | history | retrain\nstop:   ratchet -C {PLACE} down"
    )


def _choose(root: Path, base: str) -> tuple[str, Scale, Material]:
    if base == "charts":
        return f"./{CHART_BASE}", CHARTS, Charts()
    if base == "smollm2":
        return (
            str(find_smollm2(root)),
            REAL,
            Documentation("SmolLM2-135M-Instruct is read from its GGUF file"),
        )
    return base, TOY, Documentation("The base is pre-trained here")


def _story(home: Path, scale: Scale, material: Material, until: str) -> None:
    words = material.words
    step("1  MLflow, Prefect, the deployments and the gateway start, on 127.0.0.1 only")
    ratchet(home, "up")
    step(f"2  {words.rows}")
    material.take_in(home, scale.golden_rows, partial(ratchet, home))
    step(f"3  {words.base}, an adapter is trained on it, and the gate compares the two")
    if command := material.make_base(home):
        run(home, command, told=f"python {' '.join(command[1:])}")
    ratchet(home, "retrain", "--reason", words.reason)
    _print_scores(home, {"base": "base", "candidate": "v1", "simple": "TF-IDF"})
    _print_looks(home)
    if until == "v1":
        return
    traffic = Traffic(home, material)
    step(f"4  {words.known}")
    traffic.send(scale.requests, new=0.0)
    ratchet(home, "monitor")
    step(f"5  {words.new}")
    traffic.send(scale.requests, new=0.5)
    ratchet(home, "monitor")
    step("6  The event has started a retraining, in the served deployment; v1 answers on")
    follow_retraining(home, say=console.print)
    _print_scores(home, {"base": "base", "champion": "v1", "candidate": "v2", "simple": "TF-IDF"})
    _print_looks(home)
    if not _print_verdict(home):
        return
    step(
        "7  v2 gets a growing share of the users; their feedback decides, and the test allows any number of "
        "looks"
    )
    _roll_out(home, traffic, scale.look_requests)
    step("Before and after, as the users saw it")
    traffic.print_table()
    step("The ledger")
    console.print("\n".join(escape(line) for line in ledger_lines(read_moves(home))))
    if not material.writes:
        return
    step(
        "8  A teacher writes rows out of a document, for people to review; here it is a script that asks for "
        "each sentence, no model"
    )
    with _scripted_teacher(home):
        ratchet(home, "synthesize", "--documents", "docs/data.md", "--count", "12")
    ratchet(home, "review", "status")


@contextmanager
def _scripted_teacher(home: Path) -> Iterator[None]:
    """Run the scripted teacher of the tests on the port that the demo's params.yaml names."""
    port = urlsplit(load_config(home / "params.yaml").synthesize.teacher.url).port
    listen = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
    command = ["uvicorn", "--app-dir", "tests", "--factory", "teacher_stub:TeacherStub", *listen]
    with subprocess.Popen([sys.executable, "-m", *command], cwd=home) as teacher:
        try:
            yield
        finally:
            teacher.terminate()


def _roll_out(home: Path, traffic: Traffic, requests: int) -> None:
    for _ in range(MAX_LOOKS):
        ratchet(home, "rollout", "look")
        if read_rollout(home) is None:
            return
        traffic.send(requests, new=0.8)
    console.print(
        f"[yellow]no end after {MAX_LOOKS} looks: `ratchet -C {PLACE} rollout look` goes on[/yellow]"
    )


class Traffic:
    """Questions that no batch contains, each asked by another user, with known answers."""

    def __init__(self, home: Path, material: Material) -> None:
        config = load_config(home / "params.yaml")
        self._url, self._model = f"http://127.0.0.1:{config.gateway.port}", config.project.name
        self._known, self._new = (material.questions(home, new=new) for new in (False, True))
        self._random = random.Random(2)  # noqa: S311 (no secret: the order of the questions)
        self._replies: list[Reply] = []

    def send(self, count: int, *, new: float) -> None:
        """Send `count` questions, of which the share `new` is about what is new.

        Raises RatchetError if a request fails.
        """
        asked = [next(self._new if self._random.random() < new else self._known) for _ in range(count)]
        users = [f"user-{len(self._replies) + number}" for number in range(count)]
        started = time.perf_counter()
        replies = ask_gateway(self._url, self._model, asked, users=users, parallel=PARALLEL)
        self._replies += replies
        took, faults = time.perf_counter() - started, [reply.fault for reply in replies if reply.fault]
        told = ", ".join(
            f"v{score.version} right on {score.right} of {score.asked} about {score.kind}"
            for score in summarise(replies)
        )
        console.print(
            f"{count} questions by {count} users in {took:.0f} s ({count / took:.0f} a second), "
            f"{len(faults)} failed: {told}"
        )
        if faults:
            raise RatchetError(
                f"{len(faults)} requests failed, the first: {faults[0]}",
                remedy=f"{PLACE}/.ratchet/logs/gateway.log may say why",
            )

    def print_table(self) -> None:
        shown = Table(
            title="answers that were right, of all that the users asked [95 % interval]", title_justify="left"
        )
        for column in ("version", "questions about", "asked", "right"):
            shown.add_column(column, justify="right" if column == "asked" else "left")
        for score in summarise(self._replies):
            share = wilson(np.array([1.0] * score.right + [0.0] * (score.asked - score.right)), alpha=0.025)
            shown.add_row(f"v{score.version}", score.kind, str(score.asked), cell(share))
        console.print(shown)


def _print_scores(home: Path, names: dict[str, str]) -> None:
    """Print the recorded scores of each batch, of all test rows and of the golden set."""
    slices = read_metrics(home / "reports/evaluation").slices
    shown = Table(
        title="exact match on held-out rows [95 % interval]; TF-IDF is a plain classifier for comparison",
        title_justify="left",
    )
    shown.add_column("rows of")
    shown.add_column("n", justify="right")
    for label in names.values():
        shown.add_column(label)
    for name in [name for name in slices if name.startswith("batch:")] + [
        name for name in ("test", "golden") if name in slices
    ]:
        part = slices[name]
        label = {"test": "all test rows", "golden": "the golden set"}.get(
            name, name.partition("-")[2].rpartition("-")[0]
        )
        shown.add_row(
            label,
            str(next(iter(part.values())).rows),
            *(cell(part[model].scores["exact_match"]) for model in names if model in part),
        )
    console.print(shown)


def _print_looks(home: Path) -> None:
    """Print what the gate says of rows that are asked without their pictures, where any row has one."""
    for check in read_verdict(home / "reports/gate.json").checks:
        if check.name.startswith("pictures:"):
            console.print(f"  {check.name}: {check.result}: {check.reason}", markup=False)


def _print_verdict(home: Path) -> bool:
    """Print the gate's reasons, and return whether it let the candidate through."""
    decision = read_verdict(home / "reports/gate.json")
    console.print(f"gate: [bold]{decision.verdict}[/bold]")
    console.print(tell_verdict(decision), markup=False)
    for part in [*decision.checks[:1], *decision.regions]:
        console.print(f"  {part.reason}", markup=False)
    if decision.verdict != "promote":
        console.print(
            "[yellow]the candidate was not let through: v1 stays in charge. That is the gate's work, and "
            "worth a look at the reasons above.[/yellow]"
        )
    return decision.verdict == "promote"


def _print_pages(home: Path, config: Config) -> None:
    mlflow, prefect = (
        f"http://127.0.0.1:{port}" for port in (config.services.mlflow_port, config.services.prefect_port)
    )
    console.print(
        f"\nthe page http://127.0.0.1:{config.gateway.port}/\nMLflow   "
        f"{mlflow}/#/models/{config.project.name}\nPrefect  {prefect}/runs\ngit log  git -C {PLACE} log "
        "--oneline"
    )


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Measure the peak memory (proportional set size, in bytes) of this process and all that it started.

    It is read every three seconds: reading it every second took 115 CPU seconds of a demo of 23 minutes.
    """
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(3.0):
            peak[0] = max(peak[0], _family_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _family_memory() -> int:
    """Sum the memory of the demo's processes, in bytes.

    They are recognised by their folder, because services outlive their parent processes.
    """
    total = 0
    for process in psutil.process_iter():
        try:
            if (
                process.pid == os.getpid()
                or str(PLACE) in process.cwd()
                or str(PLACE) in " ".join(process.cmdline())
            ):
                total += process.memory_full_info().pss
        except (psutil.Error, AttributeError, OSError):
            continue
    return total
