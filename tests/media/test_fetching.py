"""Pictures are fetched from the hosts that params name, and from no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from media_models import picture

from ratchet.config.data import MediaConfig
from ratchet.data.examples import MEDIA
from ratchet.errors import RowError
from ratchet.sources.media import MediaIntake, fetch

PICTURE = picture(5)


class Host(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        failed_before = self.asked.count("/flaky.png") > 2
        status = {
            "/away.png": 302,
            "/none.png": 404,
            "/broken.png": 503,
            "/flaky.png": 200 if failed_before else 500,
        }
        self.send_response(status.get(self.path, 200))
        if self.path == "/away.png":
            self.send_header("Location", "http://169.254.169.254/secret.png")
        self.send_header("Content-Length", str(len(PICTURE)))
        self.end_headers()
        self.wfile.write(PICTURE)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    Host.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def limits(*hosts: str, **more: int) -> MediaConfig:
    return MediaConfig.model_validate({"hosts": list(hosts), **more})


def test_a_picture_of_a_named_host_becomes_the_row_s(host: str) -> None:
    intake = MediaIntake(limits(host))
    rows = intake.without_file()
    row = {"image": f"http://{host}/a.png?size=2", "question": "What?", "answer": "red"}
    taken = rows.take(row)
    name = taken["image"].removeprefix(MEDIA)
    assert intake.spool[name] == PICTURE
    assert Host.asked == ["/a.png?size=2"]


@pytest.mark.parametrize(
    "address",
    [
        "http://{host}/a.png",
        "http://user:secret@{host}/a.png",
        "https://example.org/a.png",
        "http://example.org/a.png",
        "ftp://{host}/a.png",
        "file:///etc/passwd",
        "//example.org/a.png",
        "http://[::1",
        "media:../../x.png",
    ],
)
def test_other_addresses_are_refused_and_nothing_is_asked(host: str, address: str) -> None:
    named = () if address == "http://{host}/a.png" else (host, "files.example.com")
    with pytest.raises(RowError) as refused:
        fetch(address.format(host=host), limits(*named), "picture")
    assert refused.value.reason == "media_url"
    assert "hosts" in str(refused.value) and "secret" not in str(refused.value)
    assert Host.asked == []


def test_only_https_is_used_beyond_this_machine() -> None:
    with pytest.raises(RowError, match="only HTTPS"):
        fetch("http://files.example.com/a.png", limits("files.example.com"), "picture")


@pytest.mark.parametrize(
    ("path", "said", "tries"),
    [
        ("/away.png", "answered 302", 1),
        ("/none.png", "answered 404", 1),
        ("/broken.png", "answered 503", 3),
    ],
)
def test_what_cannot_be_had_is_told_and_no_redirect_is_followed(
    host: str, path: str, said: str, tries: int
) -> None:
    with pytest.raises(RowError, match=said) as missing:
        fetch(f"http://{host}{path}", limits(host), "picture")
    assert missing.value.reason == "media_missing"
    assert Host.asked == [path] * tries


def test_an_error_of_the_server_is_tried_again(host: str) -> None:
    assert fetch(f"http://{host}/flaky.png", limits(host), "picture") == PICTURE


def test_a_host_that_does_not_answer_is_told() -> None:
    with pytest.raises(RowError, match="did not answer"):
        fetch("http://127.0.0.1:9/a.png", limits("127.0.0.1:9"), "picture")


def test_no_more_is_read_than_may_be_taken(host: str) -> None:
    small = limits(host, max_bytes=100)
    assert len(fetch(f"http://{host}/a.png", small, "picture")) == 101
    row = {"image": f"http://{host}/a.png", "question": "What?", "answer": "red"}
    assert "media_size" in MediaIntake(small).without_file().take(row)["image"]
