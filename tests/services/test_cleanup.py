"""What `ratchet clean` lists and removes, and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from command import ratchet
from places import make_repository, write_files

from ratchet.config.params import Config
from ratchet.pipeline.workspace import clone
from ratchet.services.cleanup import find_leftovers
from ratchet.services.specs import plan_services

KEPT = {
    ".ratchet/logs/prefect.log": "now",
    ".ratchet/requests.db": "rows",
    ".ratchet/serving/v1-abc/serving.json": "{}",
    ".ratchet/checkpoints/a/step-1/MANIFEST.json": "{}",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = make_repository(tmp_path / "checkout")
    left = {".ratchet/bases/abc/model.safetensors": "x" * 5000, ".ratchet/logs/prefect.log.1": "before"}
    write_files(root, KEPT | left)
    with contextlib.suppress(ZeroDivisionError), clone(root, "retrain", print, keep_failed=1):
        raise ZeroDivisionError
    return root


def fill_and_empty(path: Path) -> int:
    """Leave a database of mostly empty pages; return its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table a (b)")
        database.executemany("insert into a values (?)", [("x" * 4000,)] * 1000)
        database.execute("delete from a where rowid > 10")
        database.commit()
    return path.stat().st_size


def test_it_lists_first_and_removes_on_request_alone_what_can_go(root: Path) -> None:
    before = fill_and_empty(database := root / ".ratchet/prefect/prefect.db")
    with clone(root, "ingest", print, keep_failed=0) as in_use:
        listed = ratchet("-C", root, "clean").stdout
        assert in_use.name not in listed and "bases/" not in listed, "a run may read it"
    listed = ratchet("-C", root, "clean").stdout
    assert [path.name for path in (root / ".ratchet/bases").iterdir()] == ["abc"]
    assert listed.count(" MiB ") == 5 and "ratchet clean --apply" in listed
    with clone(root, "ingest", print, keep_failed=0) as in_use:
        assert ratchet("-C", root, "clean", "--apply").returncode == 0
        assert in_use.is_dir()
    assert ratchet("-C", root, "clean", "--apply").returncode == 0

    assert all((root / name).read_text() == text for name, text in KEPT.items())
    assert not list(root.glob(".ratchet/workspaces/*failed*")) and not list(root.glob(".ratchet/bases/*"))
    assert not (root / ".ratchet/logs/prefect.log.1").exists()
    assert database.stat().st_size < before / 10
    with contextlib.closing(sqlite3.connect(database)) as rows:
        assert rows.execute("select count(*) from a").fetchone() == (10,)
    assert json.loads(ratchet("-C", root, "clean", "--json").stdout) == []


def test_the_largest_comes_first(root: Path) -> None:
    sizes = [one.size for one in find_leftovers(root)]
    assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)


def test_prefect_takes_the_settings_by_which_it_deletes_what_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import Settings

    for name, value in plan_services(tmp_path, Config())["prefect"].environment.items():
        if name.startswith("PREFECT_"):
            monkeypatch.setenv(name, value)
    server = Settings().server
    assert server.services.db_vacuum.enabled_vacuum_types >= {"events", "flow_runs"}
    assert server.services.db_vacuum.retention_period.days == 30
    assert server.events.retention_period.days == 2
