"""When the served deployments ask for a look at the rollout: a real small server plays the registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from places import write_files

from flows import rollout_watcher as watch
from flows.rollout_watcher import see_registry
from ratchet.config.params import Config
from ratchet.promotion.champion import PENDING, Champion, Data, GateLine, write_champion
from ratchet.promotion.rollout import AGAIN

BODY = {"text": b"{}"}


class Registry(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(BODY["text"])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_the_fingerprint_changes_with_what_the_registry_says(
    registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BODY, "text", b'{"model_versions": [{"tags": []}]}')
    before = see_registry("small")
    assert before == see_registry("small")
    monkeypatch.setitem(
        BODY, "text", b'{"model_versions": [{"tags": [{"key": "decision", "value": "approve"}]}]}'
    )
    assert see_registry("small") not in (before, None)


def test_a_registry_that_is_away_or_no_server_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert see_registry("small") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert see_registry("small") is None


def test_a_look_is_asked_for_when_the_registry_changed_or_something_waits(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(watch, "request_look", lambda root, project: asked.append(root))  # Prefect's part
    watcher = watch.Watcher(
        tmp_path, Config.model_validate({"project": {"name": "small"}, "rollout": {"look_seconds": 5}})
    )
    monkeypatch.setitem(BODY, "text", b"{}")
    assert watcher.glance() and not watcher.glance(), "the first sight is a change"
    monkeypatch.setattr(watcher, "_looked", watcher._looked - 6)
    assert not watcher.glance()
    write_files(tmp_path, {str(AGAIN): ""})
    assert watcher.glance() and not watcher.glance()
    monkeypatch.setitem(BODY, "text", b'{"aliases": []}')
    assert watcher.glance() and asked == [tmp_path] * 3


def test_a_registry_that_tells_nothing_is_looked_at_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(watch, "request_look", lambda root, project: asked.append(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    watcher = watch.Watcher(
        tmp_path, Config.model_validate({"project": {"name": "small"}, "rollout": {"look_seconds": 5}})
    )
    monkeypatch.setattr(watcher, "_looked", watcher._looked - 1e9)
    assert watcher.glance() and not watcher.glance()


def test_a_look_is_asked_for_while_mlflows_alias_is_not_at_the_champion(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own promotion may have been killed before it told MLflow, with or without a note of it."""
    asked: list[Path] = []
    monkeypatch.setattr(watch, "request_look", lambda root, project: asked.append(root))
    watcher = watch.Watcher(
        tmp_path, Config.model_validate({"project": {"name": "small"}, "rollout": {"look_seconds": 5}})
    )
    line = GateLine("promote", None)
    at = ("c", "k", "r", "a", [], Data(), line, "t", "b", "w", "promote", 1)
    write_champion(tmp_path, Champion("small", 2, 1, *at))

    def looks(alias: int) -> bool:
        model = {"name": "small", "aliases": [{"alias": "champion", "version": str(alias)}]}
        monkeypatch.setitem(BODY, "text", json.dumps({"registered_models": [model]}).encode())
        watcher.glance()  # which may have seen a change
        monkeypatch.setattr(watcher, "_looked", watcher._looked - 6)
        return watcher.glance()

    assert [looks(alias) for alias in (2, 1, 2)] == [False, True, False]
    write_files(tmp_path, {PENDING: "v1\n"})
    assert not looks(2), "a move to v1 was killed before it landed"
    write_files(tmp_path, {PENDING: "v2\n"})
    assert looks(2)
