"""A study on a real PostgreSQL: several machines share its trials, and its password is shown nowhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from patience import scaled
from places import KEPT_CONNECTIONS, make_repository
from postgres import PASSWORD, QUOTED, connect, postgres

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import ConfigError, ServiceError
from ratchet.files import read_json
from ratchet.pipeline.checkout import child_environment
from ratchet.training.launch import Material
from tasks.sweep import STORAGE_VARIABLE, Search

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings(KEPT_CONNECTIONS)]


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with postgres() as port:
        yield port


@pytest.fixture
def url(server: int, request: pytest.FixtureRequest) -> str:
    """Of an empty database of the test's own."""
    name = f"study_{abs(hash(request.node.name))}"
    with connect(server) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql+psycopg://ana:{QUOTED}@127.0.0.1:{server}/{name}"


@pytest.fixture
def material(tokens: Path, tiny_base: Path, nobody: Path) -> Material:
    return Material(tokens, tiny_base, nobody)


def with_space(config: Config) -> Config:
    """Nothing is ended early: each trial's loss can be compared."""
    sweep = {"space": {"adapter.rank": {"low": 1, "high": 64}}, "trials": 3, "startup_trials": 9}
    return config.model_validate({**config.model_dump(), "sweep": sweep})


WORKER = """
import json, sys
from pathlib import Path
from ratchet.config.params import load_config
from ratchet.training.launch import Material
from tasks.sweep import Search

home = Path(sys.argv[1])
material = Material(*map(Path, sys.argv[2:]))
print("ready", flush=True)
sys.stdin.readline()
search = Search(home, load_config(home / "params.yaml"), material, commit="c", say=print)
while (trial := search.next()) is not None:
    search.run(trial, material)
best = search.best()
print(json.dumps({"best": [best.number, best.value], "counts": search.counts()}))
"""


def test_two_machines_that_begin_at_once_share_a_study(
    url: str, material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    """From an empty database: both find no tables, no study and no trial."""
    homes = [tmp_path / "one", tmp_path / "other"]
    workers = [begin_worker(home, with_space(tiny_config), material, url) for home in homes]
    for worker in workers:
        assert worker.stdout and worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    outputs = [worker.communicate(timeout=scaled(120)) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    records = [
        [read_json(path) for path in sorted((home / ".ratchet/sweeps").glob("*/trial-*.json"))]
        for home in homes
    ]
    assert all(records), "each had some"
    both = records[0] + records[1]
    assert len({record["study"] for record in both}) == 1
    assert set(Counter(record["number"] for record in both).values()) == {1}, "each number once"
    assert values_in(url, both[0]["study"]) == {record["number"]: record["value"] for record in both}
    assert len(both) == 3 == len({json.dumps(record["changes"]) for record in both}), (
        "as many as asked for, each other settings"
    )
    told = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert {tuple(one["best"][:2]) for one in told} <= {
        (record["number"], record["value"]) for record in both
    }
    holds_no_password(tmp_path, *(text for output in outputs for text in output))


def begin_worker(home: Path, config: Config, material: Material, url: str) -> subprocess.Popen[str]:
    home.mkdir()
    (home / "params.yaml").write_text(render_params(config), encoding="utf-8")
    pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    environment = {**child_environment(), STORAGE_VARIABLE: url}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(home), *map(str, material)],
        cwd=ROOT,
        env=environment,
        text=True,
        **pipes,
    )


def values_in(url: str, study: str) -> dict[int, float | None]:
    """Of its completed trials, as the database has them."""
    storage = optuna.storages.RDBStorage(url)
    try:
        trials = optuna.load_study(study_name=study, storage=storage).trials
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return {trial.number: trial.value for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE}


def holds_no_password(folder: Path, *texts: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for data in [*(path.read_bytes() for path in files), *(text.encode() for text in texts)]:
        assert PASSWORD.encode() not in data and QUOTED.encode() not in data and b"mulberry" not in data


FAULTS = {
    "a wrong password": (
        "postgresql+psycopg://ana:mulberry%2F18@127.0.0.1:{port}/postgres",
        ServiceError,
        "password authentication failed",
    ),
    "no such database": (
        "postgresql+psycopg://ana:{quoted}@127.0.0.1:{port}/nothing",
        ServiceError,
        'database "nothing" does not exist',
    ),
    "nobody listens": ("postgresql+psycopg://ana:{quoted}@127.0.0.1:1/study", ServiceError, "refused"),
    "no driver": (
        "postgresql+pg8000://ana:{quoted}@127.0.0.1:{port}/study",
        ServiceError,
        "postgresql+psycopg://… with the extra `store`",
    ),
    "no such kind of database": (
        "postgres://ana:{quoted}@127.0.0.1:{port}/study",
        ServiceError,
        "does not answer",
    ),
    "an at sign in the password": (
        "postgresql+psycopg://ana:17@mulberry@127.0.0.1:{port}/study",
        ConfigError,
        "is no database URL",
    ),
    "a password alone": ("mulberry", ConfigError, "is no database URL"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_storage_that_refuses_is_told_with_a_remedy_and_no_password(
    fault: str,
    server: int,
    material: Material,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url, kind, wanted = FAULTS[fault]
    monkeypatch.setenv(STORAGE_VARIABLE, url.format(port=server, quoted=QUOTED))
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(kind, match=re.escape(wanted)) as raised:
        Search(home, with_space(tiny_config), material, commit="c", say=print)
    assert STORAGE_VARIABLE in str(raised.value) and raised.value.remedy
    said = capfd.readouterr()
    for text in (str(raised.value), said.out, said.err):
        assert "mulberry" not in text


def test_the_command_looks_at_the_storage_before_anything_runs(tmp_path: Path) -> None:
    root = make_repository(tmp_path / "checkout")
    environment = {
        **child_environment(),
        STORAGE_VARIABLE: f"postgresql+psycopg://ana:{QUOTED}@127.0.0.1:1/study",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "ratchet.cli", "-C", str(root), "sweep"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        (done.returncode, done.stdout) == (1, "")
        and "Connection refused" in done.stderr
        and "→ `sweep.storage`" in done.stderr
    )
    assert not (root / ".ratchet/sweeps").exists() and not (root / ".ratchet/workspaces").exists()
    holds_no_password(root, done.stdout, done.stderr)
