"""Preparation by many workers: the same rows as one process accepts, and a killed worker costs its shard."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from ratchet.config.data import DatatroveConfig, PrepareConfig
from ratchet.data.batches import write_batch
from ratchet.data.sharded import run_step
from ratchet.errors import ConfigError, DataError, ServiceError
from tasks.prepare import prepare

TAILS = ("ane", "ilt", "or", "ushy", "ent", "ab")
WORDS = [f"{head}{tail}" for head in "bcdfghjklmnprstvwz" for tail in TAILS]
FREE = {"max_rejected_share": 1.0, "max_reason_share": 1.0, "max_leaked_share": 1.0, "min_rows": 1}


def make_row(chance: random.Random, known: list[str]) -> bytes:
    """Return a row: new, equal or near to another, contradicting one, unfit, or over a cap."""
    kind = chance.random()
    question = " ".join(chance.choices(WORDS, k=chance.randrange(2, 30)))
    if known and kind < 0.35:
        words = chance.choice(known).split()
        words[chance.choice([0, -1])] = chance.choice(WORDS)
        question = " ".join([*words, *chance.choices(WORDS, k=chance.randrange(3))])
    elif known and kind < 0.5:
        question = chance.choice(known)
    known.append(question)
    row = {"prompt": question, "completion": chance.choice(["yes", "no", "it depends", question])}
    if kind > 0.9:
        row |= {"meta": {"user": f"u{chance.randrange(20)}"}}
    if 0.86 < kind < 0.88:
        row["completion"] = "As an AI language model, I cannot say."
    if 0.88 < kind < 0.89:
        return msgspec.json.encode(row)[:-3]
    if 0.89 < kind < 0.9:
        row = {"prompt": question, "completion": row["completion"], "label": False}  # type: ignore[dict-item]
    return msgspec.json.encode(row)


def make_project(folder: Path, rows: int) -> None:
    """Write two batches, one of corrections between them, and a golden set of rows near to others."""
    chance, known = random.Random(11), list[str]()
    batches = [[make_row(chance, known) for _ in range(rows // 2)] for _ in range(2)]
    corrections = [
        msgspec.json.encode({"prompt": chance.choice(known), "completion": "corrected"}) for _ in range(40)
    ]
    for month, (lines, source) in enumerate(
        [(batches[0], "jsonl"), (corrections, "feedback"), (batches[1], "jsonl")], start=1
    ):
        time = f"2026-{month:02}-01T00:00:00Z"
        write_batch(
            folder / "raw",
            lines,
            source=source,
            label=f"b{month}",
            time=time,
            licence="CC0-1.0",
            who="tests",
            form="auto",
        )
    asked = dict.fromkeys(known[5 : rows : rows // 9])
    golden = [msgspec.json.encode({"prompt": question, "completion": "golden"}) for question in asked]
    (folder / "golden.jsonl").write_bytes(b"\n".join(golden))


def prepared(folder: Path, engine: str, *, tell=print, **settings) -> dict[str, str]:
    """Prepare, and return file → hash of what was written."""
    workers = {"workers": 3, "shard_rows": settings.pop("shard_rows", 300)}
    config = PrepareConfig(engine=engine, datatrove=workers, **(FREE | settings))
    prepare(folder / "raw", folder / "golden.jsonl", folder / engine, config, tell=tell, home=folder / "home")
    return hashes(folder / engine)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("settings", [{}, {"near_search": False}, {"near_duplicate": 0.6, "max_near": 1}])
def test_workers_accept_the_rows_that_one_process_accepts(tmp_path, settings):
    make_project(tmp_path, 1800)

    ours = prepared(tmp_path, "local", **settings)

    assert ours["rejected.jsonl"] != ours["golden.jsonl"]
    assert prepared(tmp_path, "datatrove", **settings) == ours
    assert (tmp_path / "local" / "train.jsonl").stat().st_size > 20_000
    reasons = (tmp_path / "local" / "profile.json").read_text()
    assert all(reason in reasons for reason in ("invalid_json", "contradiction", "superseded", "undesirable"))
    if settings.get("near_search", True):
        assert all(reason in reasons for reason in ("near_golden", '"near"'))
    if not settings:
        assert "straddles" in reasons
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.e2e
def test_a_hundred_thousand_rows_by_three_workers_are_those_of_one_process(tmp_path):
    make_project(tmp_path, 100_000)

    ours = prepared(tmp_path, "local")

    assert prepared(tmp_path, "datatrove", shard_rows=10_000) == ours


def test_what_was_done_is_not_done_again(tmp_path):
    make_project(tmp_path, 900)
    with pytest.raises(DataError):  # by the limits, after the workers' part
        prepared(tmp_path, "datatrove", max_rejected_share=0.0)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*.npy")}
    assert len(before) > 10

    with pytest.raises(DataError):
        prepared(tmp_path, "datatrove", max_rejected_share=0.0)

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*.npy")} == before


@dataclass(frozen=True)
class Step:
    """Note each call; fail or die as often as told, in the shard with that number."""

    folder: Path
    dies: int = -1
    times: int = 1

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        path = self.folder / f"{rank}.txt"
        with path.open("a") as notes:
            notes.write("called\n")
        if rank == self.dies and len(path.read_text().splitlines()) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)

    def calls(self) -> list[int]:
        paths = sorted(self.folder.glob("*.txt"))
        return [len(path.read_text().splitlines()) for path in paths]


def test_a_killed_worker_costs_its_shard_only(tmp_path):
    step = Step(tmp_path, dies=2)

    assert run_step(step, 5, tmp_path / "logs", DatatroveConfig(workers=3)) == 5
    assert step.calls() == [1, 1, 2, 1, 1]


def test_a_shard_that_always_fails_ends_the_run_and_keeps_the_others(tmp_path):
    step, config = Step(tmp_path, dies=1, times=99), DatatroveConfig(workers=2, tries=2)

    with pytest.raises(ServiceError, match="1 of 3 shards"):
        run_step(step, 3, tmp_path / "logs", config)

    assert step.calls() == [1, 2, 1]


@pytest.mark.e2e
def test_slurm_gets_an_array_of_jobs(tmp_path, monkeypatch):
    """A stand-in for `sbatch` runs the array here, as Slurm would on its nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "sbatch": """
            script=$(mktemp); cp "${@: -1}" "$script"; echo "$@" >> "$TOOLS/submitted"
            cat "$script" >> "$TOOLS/scripts"
            last=$(grep -oP -- '--array=0-\\K\\d+' "$script")
            for i in $(seq 0 "$last"); do
              SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash "$script" > /dev/null 2>> "$TOOLS/faults"
            done
            rm "$script"; echo "Submitted batch job 7"
            """,
        "srun": 'while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; exec "$@"',
        "squeue": "true",
        "scontrol": "echo here",
    }.items():
        (tools / name).write_text("#!/bin/bash\n" + textwrap.dedent(text))
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TOOLS", str(tools))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    step = Step(tmp_path, dies=0)
    config = DatatroveConfig(executor="slurm", workers=2, partition="cpu", time_limit="00:10:00")

    run_step(step, 3, tmp_path / "logs", config)

    assert step.calls() == [2, 1, 1]
    scripts = (tools / "scripts").read_text()
    assert "#SBATCH --partition=cpu" in scripts
    assert "#SBATCH --time=00:10:00" in scripts


def test_an_executor_that_is_not_there_is_named(tmp_path, monkeypatch):
    make_project(tmp_path, 100)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = PrepareConfig(
        engine="datatrove", datatrove=DatatroveConfig(executor="slurm", partition="cpu"), **FREE
    )

    with pytest.raises(ConfigError, match="sbatch"):
        prepare(tmp_path / "raw", tmp_path / "golden.jsonl", tmp_path / "out", config)


def test_slurm_needs_a_partition():
    with pytest.raises(ValueError, match=r"prepare\.datatrove\.partition"):
        DatatroveConfig(executor="slurm")
