"""Run `make demo-federated`: a coordinator and three nodes on this machine, each with rows of its own.

Each node mostly holds the documentation of other modules. One table compares each node alone, all rows
together in one place, which is the bound, and what the nodes learn together without sharing a row, without
and with differential privacy; the gate judges both versions. Every figure is read from an evaluation on the
coordinator's rows, which no node has.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash
from rich.table import Table

from ratchet.config.data import PydocSource
from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.data.batches import MANIFEST as BATCHES
from ratchet.demo.checkout import (
    AUTHOR,
    cell,
    console,
    make_checkout,
    make_values,
    ratchet,
    run,
    shown,
    step,
)
from ratchet.evaluation.report import Metrics, read_metrics
from ratchet.federation.records import Round, read_trained_rounds
from ratchet.files import write_bytes, write_json, write_text
from ratchet.models.manifests import MANIFEST
from ratchet.pipeline.checkout import git
from ratchet.pipeline.stage import project_root
from ratchet.promotion.champion import read_champion
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Verdict, read_verdict
from ratchet.services.processes import free_port
from ratchet.sources.pydoc import harvest

PLACE = Path(".ratchet/federated")
COORDINATOR = "coordinator"
APART, EVERYTHING = "apart", "all rows in one place"
PARAMS = "params.json"
# What each node's people mostly write about. All are in the standard library of any Python, and the base has
# read nothing of them: the evaluation would refuse rows that it has.
NODES = {
    "north": "email http urllib smtplib imaplib wsgiref xmlrpc ssl",
    "south": "asyncio multiprocessing logging concurrent pdb doctest",
    "west": "tarfile zipfile encodings codecs pathlib datetime collections enum typing configparser difflib",
}
KEPT = 20  # percent of the rows that the coordinator has for the evaluation, and no node
OTHERS = 40  # percent of the rows that go to any node, whatever they are about
GOLDEN_ROWS = 100
ROUNDS = 5
SETTINGS: dict[str, Any] = {
    "project": {"name": "federated"},
    "prepare": {"min_rows": 40},
    "tokenize": {"max_length": 128, "window": 256},
    "train": {"epochs": 3.0, "learning_rate": 5.0e-3, "batch_windows": 2},
    "adapter": {"rank": 16, "alpha": 32.0},
    "evaluate": {"max_new_tokens": 8},
    "parity": {"rows": 40},
    "gate": {"min_rows": 100},
    "federate": {"rounds": ROUNDS, "min_nodes": 3},
    "promotion": "auto",
}
NODE_SHARES = {"test_share": 0.1, "validation_share": 0.1}
EPSILON = 8.0
# Two long rounds: noise is added in each step, to the sum over its rows, so many rows a step are better.
PRIVATE: dict[str, Any] = {
    "train": {
        "start_from": "base",
        "epochs": 6.0,
        "learning_rate": 2.0e-2,
        "privacy": {"epsilon": EPSILON, "batch_rows": 200},
    },
    "federate": {"rounds": 2},
}


class Judged(NamedTuple):
    """A version of the federation: its evaluation, the gate's verdict, its rounds."""

    metrics: Metrics
    verdict: Verdict
    rounds: list[Round]


def deal_rows() -> dict[str, list[bytes]]:
    """Return the rows of each party, as JSON lines, of all modules in turn: of the nodes, and those that no
    node has.
    """
    owner = {module: name for name, modules in NODES.items() for module in modules.split()}
    dealt: dict[str, dict[int, bytes]] = {name: {} for name in (*NODES, COORDINATOR)}
    for row in harvest(PydocSource(packages=["stdlib"], summaries=0.0)):
        question, module = (message["content"] for message in row["messages"])
        if module not in owner:
            continue
        drawn = xxhash.xxh64_intdigest(question.encode())
        chance, other = divmod(drawn, 2**32)
        name = owner[module] if other % 100 >= OTHERS else list(NODES)[other // 100 % len(NODES)]
        if chance % 100 < KEPT:
            name = COORDINATOR
        dealt[name][drawn] = msgspec.json.encode(row) + b"\n"
    return {name: [rows[drawn] for drawn in sorted(rows)] for name, rows in dealt.items()}


def run_demo(root: Path, *, compare: bool = True, rounds: int = ROUNDS) -> None:
    """Run the demo in .ratchet/federated, with or without the trainings for comparison.

    `rounds` are those without differential privacy.

    Raises RatchetError if a step fails.
    """
    began = time.perf_counter()
    # All parties share this machine's cores; more threads than cores would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(NODES))))
    place = root / PLACE
    for home in sorted(place.glob("*/params.yaml")):
        ratchet(home.parent, "federate", "down")
    if (place / COORDINATOR / "params.yaml").exists():
        ratchet(place / COORDINATOR, "down", "--force")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    step("1  A coordinator and three nodes: four clones, each with rows of its own, and the same base")
    base, rows = place / "base", deal_rows()
    with ThreadPoolExecutor(2) as pool:
        made = pool.submit(_make_base, place, base)
        making = {name: pool.submit(_make_node, root, name, base, rows[name]) for name in NODES}
        coordinator = _make_coordinator(root, base, rows[COORDINATOR], rounds)
        nodes = {name: node.result() for name, node in making.items()}
        made.result()
    together, private = _train_together(place, coordinator, nodes, rounds)
    alone = _train_apart(place, base, coordinator, nodes, rounds) if compare else {}
    _print_table(together, private, alone)
    _print_verdict("three nodes", together)
    _print_verdict(f"three nodes, ε = {EPSILON:g}", private)
    if champion := read_champion(coordinator):
        console.print(f"in charge: [bold]v{champion.version}[/bold], {champion.why}")
    console.print(f"\n[bold]{time.perf_counter() - began:.0f} s[/bold] in all")
    there = shown(coordinator)
    console.print(
        f"go on:  ratchet -C {there} federate status | history\n"
        f"stop:   ratchet -C {there} federate down && ratchet -C {there} down"
    )


def _train_together(
    place: Path, coordinator: Path, nodes: dict[str, Path], rounds: int
) -> tuple[Judged, Judged]:
    """Let the nodes join and train, without and with differential privacy; return what became of both."""
    step("2  The coordinator listens, with a certificate of its own; each node joins by its invitation")
    ratchet(coordinator, "up")
    ratchet(coordinator, "federate", "up")
    for name in nodes:
        ratchet(coordinator, "federate", "invite", name, "--out", str(place / f"{name}.invitation"))
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(lambda home: _join(home, place / f"{home.name}.invitation"), nodes.values()))
    step(f"3  {rounds} rounds: the adapter goes out, each node trains it, the updates become one")
    ratchet(coordinator, "federate", "run", "--reason", "three nodes, no row shared")
    ratchet(coordinator, "federate", "status")
    together = _judged(coordinator)
    step(f"4  The same rows with differential privacy, ε = {EPSILON:g}: its version meets the same gate")
    _ask_for_privacy(coordinator)
    ratchet(coordinator, "federate", "run", "--reason", f"the same rows with ε = {EPSILON:g}")
    return together, _judged(coordinator)


def _join(home: Path, invitation: Path) -> None:
    ratchet(home, "federate", "join", str(invitation))
    invitation.unlink()


def _make_base(place: Path, base: Path) -> None:
    """Pre-train the base once: on another machine a base has other rounding, and would be another one."""
    params = place / "base.yaml"
    write_text(params, render_params(Config.model_validate(make_values("demo", SETTINGS))))
    command = [sys.executable, "-m", "tasks.base", "--params", str(params)]
    paths = ["--out", str(base), "--proof", str(place / "base.json")]
    run(place, [*command, *paths], told="python -m tasks.base")


def _settings(base: Path, more: dict[str, Any]) -> dict[str, Any]:
    values = make_values(str(base), SETTINGS)
    for section, settings in more.items():
        values[section] |= settings
    return values


def _make_coordinator(root: Path, base: Path, rows: list[bytes], rounds: int) -> Path:
    asked = {"port": free_port(), "superlink_port": free_port(), "rounds": rounds}
    more = {"prepare": {"test_share": 0.7, "validation_share": 0.05}, "federate": asked}
    home = make_checkout(root, PLACE / COORDINATOR, _settings(base, more))
    for name, part, golden in (("golden", rows[:GOLDEN_ROWS], True), ("rows", rows[GOLDEN_ROWS:], False)):
        path = home / ".ratchet" / f"{name}.jsonl"
        write_bytes(path, part)
        ratchet(home, "ingest", "--path", str(path), *(["--golden", str(len(part))] if golden else []))
    return home


def _make_node(root: Path, name: str, base: Path, rows: list[bytes]) -> Path:
    more = {"prepare": NODE_SHARES}
    home = make_checkout(root, PLACE / name, _settings(base, more))
    path = home / ".ratchet/rows.jsonl"
    write_bytes(path, rows)
    ratchet(home, "ingest", "--path", str(path))
    return home


def _train_apart(
    place: Path, base: Path, coordinator: Path, nodes: dict[str, Path], rounds: int
) -> dict[str, Metrics]:
    """Train on each node's rows alone, and on those of all in one place, as long as in all rounds.

    Return what each of them scores on the coordinator's rows.
    """
    step("5  For comparison: each node alone, and all rows together in one place, as long as the rounds")
    whole = place / APART / EVERYTHING / "raw"
    whole.mkdir(parents=True)
    raws = [home / "data/raw" for home in nodes.values()]
    for path in (path for raw in raws for path in raw.glob("*.jsonl")):
        shutil.copy(path, whole)
    write_bytes(whole / BATCHES, [(raw / BATCHES).read_bytes() for raw in raws])
    values = make_values(str(base), SETTINGS)
    values["prepare"] |= NODE_SHARES
    values["train"] |= {"epochs": SETTINGS["train"]["epochs"] * rounds}
    write_json(place / APART / PARAMS, values)
    asked = {EVERYTHING: whole, **dict(zip(nodes, raws, strict=True))}  # the longest first
    with ThreadPoolExecutor(2) as pool:
        made = [
            pool.submit(_train_alone, place / APART / name, base, raw, coordinator)
            for name, raw in asked.items()
        ]
        return {name: each.result() for name, each in zip(asked, made, strict=True)}


def _train_alone(out: Path, base: Path, raw: Path, coordinator: Path) -> Metrics:
    nobody, none = out / "nobody", out / "none.jsonl"
    write_json(nobody / MANIFEST, {"version": None, "batches": []})
    write_bytes(none, [])
    prepared, tokens, candidate = out / "prepared", out / "tokenized", out / "candidate"
    shared = {"base": base, "incumbent": nobody}
    asked = {"prepared": coordinator / "data/prepared", "region": coordinator / "data/region.json"}
    for stage, paths in {
        "prepare": {"raw": raw, "golden": none, "forgotten": none, "out": prepared},
        "tokenize": {**shared, "prepared": prepared, "out": tokens},
        "train": {**shared, "tokens": tokens, "out": candidate, "reports": out / "train"},
        "evaluate": {
            **(shared | asked),
            "candidate": candidate,
            "own": coordinator / "metrics",
            "out": out / "evaluation",
        },
    }.items():
        command = [sys.executable, "-m", f"tasks.{stage}", "--params", str(out.parent / PARAMS)]
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        run(out, [*command, *flags], told=f"python -m tasks.{stage} for {out.name!r}")
    return read_metrics(out / "evaluation")


def _ask_for_privacy(coordinator: Path) -> None:
    """Change the settings as a user would: in params.yaml, with a commit."""
    params = coordinator / "params.yaml"
    values = msgspec.yaml.decode(params.read_bytes())
    for section, settings in PRIVATE.items():
        values[section] = values.get(section, {}) | settings
    write_text(params, render_params(Config.model_validate(values)))
    git(coordinator, *AUTHOR, "commit", "--quiet", "--all", "--message", f"Ask for ε = {EPSILON:g}")


def _judged(coordinator: Path) -> Judged:
    reports = coordinator / "reports"
    return Judged(
        read_metrics(reports / "evaluation"),
        read_verdict(reports / "gate.json"),
        read_trained_rounds(reports / "train"),
    )


def _print_table(together: Judged, private: Judged, alone: dict[str, Metrics]) -> None:
    table = Table(
        title="exact match on the coordinator's rows, which no node has [95 % interval]", title_justify="left"
    )
    for title in ("trained by", "test rows", "golden rows"):
        table.add_column(title)
    lines = [
        ("nobody: the base", together.metrics, "base"),
        *((f"{name} alone", alone[name], "candidate") for name in NODES if name in alone),
        (f"three nodes together, ε = {EPSILON:g} for each row", private.metrics, "candidate"),
        ("[bold]three nodes together, no row shared[/bold]", together.metrics, "candidate"),
        *((name, alone[name], "candidate") for name in (EVERYTHING,) if name in alone),
    ]
    for told, metrics, model in lines:
        cells = (cell(metrics.slices[part][model].scores["exact_match"]) for part in ("test", "golden"))
        table.add_row(told, *cells)
    console.print(table)


def _print_verdict(name: str, found: Judged) -> None:
    sent = sum(each.sent_mib for each in found.rounds)
    console.print(
        f"gate: [bold]{found.verdict.verdict}[/bold] — {name}, {len(found.rounds)} rounds; {sent:.1f} MiB "
        "went between them"
    )
    console.print(f"  {tell_verdict(found.verdict)}", markup=False)
    for reason in found.verdict.reasons:
        console.print(f"  {reason}", markup=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train with three nodes on this machine.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the training without privacy")
    parser.add_argument("--no-comparison", action="store_true", help="train on nobody's rows alone")
    given = parser.parse_args()
    run_demo(project_root(), compare=not given.no_comparison, rounds=given.rounds)
