"""When the served deployments ask for a look at the rollout: a real small server plays the registry."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.watch import registry_fingerprint

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


def test_the_fingerprint_changes_with_what_the_registry_says(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BODY, "text", b'{"model_versions": [{"tags": []}]}')
    before = registry_fingerprint("small")
    assert before == registry_fingerprint("small")
    monkeypatch.setitem(BODY, "text", b'{"model_versions": [{"tags": [{"key": "decision", "value": "approve"}]}]}')
    assert registry_fingerprint("small") not in (before, None)


def test_a_registry_that_is_away_or_no_server_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert registry_fingerprint("small") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    assert registry_fingerprint("small") is None
