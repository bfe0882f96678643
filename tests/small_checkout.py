"""A checkout of a small project with batches, prepared once, and versions of it in MLflow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from places import commit, make_repository

from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.data.batches import write_batch
from ratchet.data.examples import Message, example_id, read_examples
from ratchet.pipeline.checkout import dvc
from ratchet.pipeline.dvc import run_stage
from ratchet.pipeline.workspace import land, open_workspace
from ratchet.promotion.lineage import STARTED_FROM
from ratchet.tracking.mlflow import KEY_TAG, find_or_create_run
from ratchet.tracking.registry import get_version, make_version

ROOT = Path(__file__).parents[1]
CONFIG = Config(project=ProjectConfig(name="small"))
PARAMS = "project:\n  name: small\nprepare:\n  min_rows: 1\n  test_share: 0.0\n  validation_share: 0.0\n"


def quiet(line: str) -> None:
    """Nobody listens."""


def row(number: int, said: str = "", **meta: Any) -> bytes:
    words = " ".join(f"n{number}w{place}" for place in range(8))
    return json.dumps(
        {"question": f"{words} {said}".strip(), "answer": f"answer {number}", "meta": meta}
    ).encode()


def id_of(line: bytes) -> str:
    given = json.loads(line)
    return example_id([Message("user", given["question"]), Message("assistant", given["answer"])])


def add(raw: Path, lines: list[bytes], month: int = 1) -> str:
    return write_batch(
        raw,
        lines,
        source="jsonl",
        label=f"month-{month}",
        time=f"2026-{month:02}-01T00:00:00Z",
        licence="CC0-1.0",
        who="tests",
        form="auto",
    ).name


def make_checkout(path: Path, files: dict[str, str]) -> None:
    """A repository with the code of the stages and `files`, without a batch."""
    make_repository(
        path,
        {
            "params.yaml": PARAMS,
            "data/.gitignore": "/raw\n/prepared\n/code\n",
            ".gitignore": ".ratchet/\n__pycache__/\n",
            **files,
        },
    )
    for name in ("ratchet", "tasks"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", path)


def commit_batches(path: Path, subject: str) -> None:
    dvc(path, "add", "--quiet", "data/raw")
    commit(path, subject)


def make(root: Path) -> str:
    """The stage `prepare`, as a retraining runs and lands it. The commit."""
    with open_workspace(root, "retrain", quiet) as workspace:
        workspace.dvc("checkout", "--quiet", "data/raw.dvc")
        run_stage(workspace, "prepare", quiet)
        return land(workspace, "Retrain", ["dvc.lock", "data"])


def training_ids(root: Path) -> set[str]:
    return {example.id for example in read_examples(root / "data/prepared/train.jsonl")}


def register(number: int, commit: str, batches: list[str], start: str = "base") -> None:
    adapter = Path("adapter")
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_model.safetensors").write_text(f"weights {number}")
    tags = {
        KEY_TAG: f"key{number}",
        "git_commit": commit,
        "adapter_sha256": f"{number}" * 64,
        "batches": json.dumps(batches),
        STARTED_FROM: start,
    }
    run = find_or_create_run("small", f"key{number}", {})
    assert make_version("small", run, adapter, tags, "card").number == number


def tag_of(number: int, tag: str) -> dict[str, Any] | None:
    version = get_version("small", number)
    assert version is not None
    return json.loads(version.tags[tag]) if tag in version.tags else None
