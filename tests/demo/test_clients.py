"""Clients with known answers, against a real small server that speaks as much of the protocol as they use."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ratchet.demo.clients import Question, ask_gateway, summarise
from ratchet.errors import ServiceError

TOLD: list[dict[str, Any]] = []
SHOWN: list[list[dict[str, Any]]] = []  # contents with pictures


class Gateway(BaseHTTPRequestHandler):
    """Answers `right`, by the version that the user's name ends with; user 9 finds it full."""

    def do_GET(self) -> None:
        self._send(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/feedback":
            TOLD.append(body)
            self._send(200, {})
        elif body["user"].endswith("9"):
            self._send(429, {"error": {"message": "the queue is full"}})
        else:
            if isinstance(content := body["messages"][0]["content"], list):
                SHOWN.append(content)
            self._send(
                200,
                {"choices": [{"message": {"content": "right"}}]},
                {"x-ratchet-version": body["user"][-1], "x-request-id": f"id-{body['user']}"},
            )

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    TOLD.clear()
    SHOWN.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_answers_are_scored_told_and_counted_by_version_and_kind(url: str) -> None:
    asked = [Question("a", "right", "old"), Question("b", "wrong", "old"), Question("c", "right", "new")]

    replies = ask_gateway(url, "small", asked, users=["u1", "u1", "u2"], parallel=2)

    assert [(reply.version, reply.right, reply.fault) for reply in replies] == [
        (1, True, ""),
        (1, False, ""),
        (2, True, ""),
    ]
    assert [tuple(score) for score in summarise(replies)] == [(1, "old", 2, 1), (2, "new", 1, 1)]
    assert sorted((said["request_id"], said["user"], said["score"]) for said in TOLD) == [
        ("id-u1", "u1", 0.0),
        ("id-u1", "u1", 1.0),
        ("id-u2", "u2", 1.0),
    ]


def test_who_shows_a_picture_sends_it_as_a_part_and_corrects_what_is_wrong(url: str) -> None:
    asked = [Question("a", "right", "bars", b"PNG"), Question("b", "wrong", "bars", b"PNG")]

    replies = ask_gateway(url, "small", asked, users=["u1", "u2"], parallel=1)

    assert [reply.right for reply in replies] == [True, False]
    assert [
        [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,UE5H"}},
            {"type": "text", "text": text},
        ]
        for text in ("a", "b")
    ] == SHOWN
    assert [(said["score"], said.get("answer")) for said in TOLD] == [(1.0, None), (0.0, "wrong")]


def test_a_refused_request_is_a_reply_with_its_fault_and_no_feedback(url: str) -> None:
    [reply] = ask_gateway(url, "small", [Question("a", "right", "old")], users=["u9"], parallel=1)
    assert reply.version == 0 and "429" in reply.fault and "the queue is full" in reply.fault
    assert TOLD == []


def test_nobody_at_the_address_is_said() -> None:
    with pytest.raises(ServiceError, match="nothing answers at"):
        ask_gateway("http://127.0.0.1:1", "small", [Question("a", "b", "c")], users=["u"], parallel=1)
