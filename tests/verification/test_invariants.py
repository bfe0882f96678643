"""`ratchet verify`: each invariant holds in a good project, and finds what breaks it, alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest
from places import (
    KEPT_CONNECTIONS,
    commit,
    flip,
    make_repository,
    use_git_without_a_user,
    use_mlflow,
    write_files,
)
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.data.batches import write_batch
from ratchet.files import write_json
from ratchet.models.loading import WEIGHTS, adapter_sha256
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.workspace import LANDING, WORKSPACES
from ratchet.promotion.champion import PENDING, Champion, Data, GateLine, read_champion, write_champion
from ratchet.serving.bundle import ServingState, write_state
from ratchet.tracking.mlflow import find_or_create_run, mlflow_client
from ratchet.tracking.registry import CHAMPION, make_version, set_alias
from ratchet.verification.finding import Finding
from ratchet.verification.project import INVARIANTS, verify

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
CONFIG = Config(project=ProjectConfig(name="small"))
PIPELINE = "stages:\n  train: {cmd: cp -r made models/candidate, deps: [made], outs: [models/candidate]}\n"
OLD = time.time() - 3600


def add_batch(root: Path, number: int) -> str:
    rows = [json.dumps({"prompt": f"q{number}{row}", "completion": "a"}).encode() for row in range(3)]
    made = write_batch(
        root / "data/raw",
        rows,
        source="jsonl",
        label="rows",
        time=f"2026-01-0{number}T00:00:00Z",
        licence="none",
        who="Ana",
        form="auto",
    )
    dvc(root, "add", "--quiet", "data/raw")
    commit(root, f"Ingest\n\nBatch: {made.name}")
    return made.name


def prepare(root: Path, batches: list[str]) -> None:
    counts = {
        "rows": 3,
        "accepted": {"rows": 2, "train": 2},
        "rejected": {"rows": 1},
        "duplicate": {"rows": 0},
    }
    total = {
        "rows": 6,
        "accepted": {"rows": 4, "train": 4},
        "rejected": {"rows": 2},
        "duplicate": {"rows": 0},
    }
    profile = {"total": total, "golden": 0, "batches": dict.fromkeys(batches, counts)}
    write_json(root / "data/prepared/profile.json", profile)
    write_files(root, {"data/prepared/train.jsonl": "{}\n" * 4, "data/prepared/rejected.jsonl": "{}\n" * 2})


def promote(root: Path, version: int, of: str) -> None:
    sha256 = adapter_sha256(root / "models/candidate")
    gate = GateLine("promote", None)
    entry = Champion(
        *("small", version, version - 1 or None, of, f"key{version}", "run", sha256, [], Data(), gate),
        *(f"2026-01-1{version}T00:00:00Z", "Ana", "better", "promote", version - 1 or None),
    )
    write_champion(root, entry)
    git(root, "tag", f"model/small/v{version}", commit(root, f"Promote v{version}"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches, prepared rows, and two versions; v2 is in charge."""
    root = make_repository(tmp_path_factory.mktemp("verification") / "checkout")
    ignored = "/data/raw\n/data/prepared\n/models\n.ratchet\n"
    write_files(root, {"dvc.yaml": PIPELINE, ".gitignore": ignored, f"made/{WEIGHTS}": "weights 1"})
    (root / "models").mkdir()
    prepare(root, [add_batch(root, 1), add_batch(root, 2)])
    for version in (1, 2):
        write_files(root, {f"made/{WEIGHTS}": f"weights {version}"})
        dvc(root, "repro", "--quiet")
        promote(root, version, commit(root, f"Train v{version}"))
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_git_without_a_user(monkeypatch)
    for name in [name for name in os.environ if name.startswith(("RATCHET_", "PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RATCHET_GATEWAY_URL", "http://127.0.0.1:1")
    shutil.copytree(original, tmp_path / "checkout", symlinks=True)
    return tmp_path / "checkout"


def look(root: Path, name: str) -> Finding:
    (invariant,) = [one for one in INVARIANTS if one.__name__ == f"find_{name}"]
    return invariant(root, CONFIG)


def test_all_holds_in_a_good_project(root: Path) -> None:
    found = {one.name: one.result for one in verify(root, CONFIG)}
    away = {"gateway", "alias", "runs"}  # neither a gateway nor MLflow runs here
    assert {name for name, result in found.items() if result == "unknown"} == away
    assert {name for name, result in found.items() if result == "ok"} == found.keys() - away
    assert len(found) == len(INVARIANTS) == 14


def edit_champion(root: Path) -> None:
    champion = json.loads((root / "champion.json").read_bytes())
    write_json(root / "champion.json", champion | {"version": 1})


def drop_tag(root: Path) -> None:
    git(root, "tag", "--delete", "model/small/v1")


def commit_batch_twice(root: Path) -> None:
    name = json.loads((root / "data/raw/manifest.jsonl").read_bytes().splitlines()[0])["name"]
    git(root, "commit", "--quiet", "--allow-empty", "--message", f"Ingest\n\nBatch: {name}")


def lose_batch(root: Path) -> None:
    manifest = root / "data/raw/manifest.jsonl"
    manifest.chmod(0o644)
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:1]))


def lose_rejected_row(root: Path) -> None:
    write_files(root, {"data/prepared/rejected.jsonl": "{}\n"})


def flip_weights_of_the_first(root: Path) -> None:
    for path in (root / ".dvc/cache/files/md5").rglob("*"):
        if path.is_file() and path.read_bytes() == b"weights 1":
            flip(path)


def flip_rows(root: Path) -> None:
    flip(next((root / "data/raw").glob("*-rows-*.jsonl"), root / "data/raw/manifest.jsonl"))


def write_secret(root: Path) -> None:
    write_files(root, {".ratchet/logs/gateway.log": "started\nAKIA" + "Q3EGRIB7WN5TCDXA is the key\n"})


def leave_workspace(root: Path) -> None:
    (root / WORKSPACES / "20260101T000000.000000-promote-4711").mkdir(parents=True)


def leave_half(root: Path) -> None:
    write_files(root, {"models/.candidate.0a1b2c3d.tmp": "half"})
    os.utime(root / "models/.candidate.0a1b2c3d.tmp", (OLD, OLD))


def cut_landing(root: Path) -> None:
    write_files(root, {str(LANDING): "abc"})
    os.utime(root / LANDING, (OLD, OLD))


def change_params(root: Path) -> None:
    write_files(root, {"params.yaml": "project: {name: other}\n"})


@pytest.mark.parametrize(
    ("name", "harm", "seen"),
    [
        ("ledger", edit_champion, "v1"),
        ("tags", drop_tag, "model/small/v1 is not there"),
        ("batches", commit_batch_twice, "came 2 times"),
        ("batches", lose_batch, "is not in data/raw"),
        ("rows", lose_rejected_row, "rejected.jsonl has 1 rows, the profile says 2"),
        ("data", flip_rows, "data/raw/"),
        ("versions", flip_weights_of_the_first, "v1: adapter_model.safetensors"),
        ("secrets", write_secret, ".ratchet/logs/gateway.log:2"),
        ("workspaces", leave_workspace, "1 of promote"),
        ("half_written", leave_half, "models/.candidate.0a1b2c3d.tmp"),
        ("half_written", cut_landing, "a landing that was cut"),
        ("checkout", change_params, "params.yaml"),
    ],
)
def test_what_breaks_an_invariant_is_found(
    root: Path, name: str, harm: Callable[[Path], None], seen: str
) -> None:
    assert look(root, name).result == "ok"
    harm(root)
    found = look(root, name)
    assert found.result == "wrong" and seen in found.seen and found.remedy


def test_after_a_cut_landing_the_remedy_is_another_command(root: Path) -> None:
    lose_batch(root)
    cut_landing(root)
    wrong = {one.name: one.remedy for one in verify(root, CONFIG) if one.result == "wrong"}
    assert wrong.keys() == {"batches", "data", "half-written", "checkout"}
    assert all("any other command" in remedy for remedy in wrong.values())


def test_a_process_that_works_on_in_the_workspace_of_a_killed_run_is_found(root: Path) -> None:
    leave_workspace(root)
    (folder,) = (root / WORKSPACES).iterdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, stdin=subprocess.PIPE) as process:
        assert f"process {process.pid} " in look(root, "processes").seen
    assert look(root, "processes").result == "ok"


def test_mlflows_alias_and_lost_runs_are_compared(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mlflow(monkeypatch, tmp_path)
    adapter = root / "models/candidate"
    for number in (1, 2):
        run = find_or_create_run("small", f"key{number}", {})
        make_version("small", run, adapter, {"ratchet.run_key": f"key{number}"}, "card")
        mlflow_client().set_terminated(run, "FINISHED")
    set_alias("small", CHAMPION, 1)
    found = look(root, "alias")
    assert (found.result, found.seen, found.wanted) == ("wrong", "v1 in MLflow", "v2")
    write_files(root, {PENDING: "v2\n"})
    assert look(root, "alias").result == "waits"
    set_alias("small", CHAMPION, 2)
    assert look(root, "alias").result == "ok" and look(root, "runs").result == "ok"
    find_or_create_run("small", "killed", {})
    assert look(root, "runs").result == "wrong"


class Gateway(BaseHTTPRequestHandler):
    version = 2

    def do_GET(self) -> None:
        ready = self.path == "/healthz" or self.version
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"version": self.version}).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def gateway(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("RATCHET_GATEWAY_URL", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize(("version", "result"), [(2, "ok"), (1, "wrong"), (0, "wrong")])
def test_the_gateways_version_is_compared(
    root: Path, gateway: None, monkeypatch: pytest.MonkeyPatch, version: int, result: str
) -> None:
    monkeypatch.setattr(Gateway, "version", version)
    assert look(root, "gateway").result == result


def test_a_gateway_that_still_loads_a_new_champion_is_waited_for_unless_it_refuses_it(
    root: Path, gateway: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gateway, "version", 1)
    champion = read_champion(root)
    assert champion
    write_champion(root, msgspec.structs.replace(champion, at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"))
    assert look(root, "gateway").result == "waits"
    write_state(root, ServingState(refused={"v2": "its bytes are damaged"}))
    found = look(root, "gateway")
    assert found.result == "wrong" and "its bytes are damaged" in found.seen


def test_the_command_prints_a_line_each_and_its_exit_code_says_whether_all_hold(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(root, {"params.yaml": "project: {name: small}\nservices: {mlflow_port: 5907}\n"})
    commit(root, "Name it")
    call = CliRunner()
    good = call.invoke(app, ["-C", str(root), "verify"])
    assert good.exit_code == 0 and good.stdout.count("\n") == len(INVARIANTS)
    drop_tag(root)
    bad = call.invoke(app, ["-C", str(root), "verify", "--json"])
    found = {one["name"]: one for one in json.loads(bad.stdout)}
    assert bad.exit_code == 1 and found["tags"]["remedy"].startswith("git tag --force model/small/v1 ")
    assert [name for name, one in found.items() if one["result"] == "wrong"] == ["tags"]
    assert read_champion(root) is not None
