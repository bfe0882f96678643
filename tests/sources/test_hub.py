"""Rows come over HTTP, and from the hub through its filesystem for fsspec, here on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from patience import scaled

ROOT = Path(__file__).parents[2]
FILES = {
    "README.md": b"# Rows\n",
    "data/train-0.csv": b"prompt,completion\na,b\nc,d\n",
    "data/train-1.csv": b"prompt,completion\ne,f\n",
}
READ = """
import sys
from ratchet.config.params import Config
from ratchet.errors import DataError
from tasks.ingest import pull
for path in sys.argv[1:]:
    try:
        pulled = pull(Config(), path=path)
        print(len(pulled.lines), [file.name for file in pulled.files])
    except DataError as error:
        print(repr(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """What the filesystem asks of a hub: a data set, its tree, its files."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, _, asked = self.path.partition("?")
        if "/resolve/" in path:
            self._send(FILES[path.partition("/resolve/")[2].partition("/")[2]])
        elif "/tree/" in path:
            under = path.partition("/tree/")[2].partition("/")[2]
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                for name, content in FILES.items()
            ]
            entries.append({"type": "directory", "path": "data", "oid": "c" * 40})
            assert "recursive=false" in asked
            self._send([entry for entry in entries if str(entry["path"]).rpartition("/")[0] == under])
        elif path == "/api/datasets/org/rows":
            self._send({"id": "org/rows", "sha": "a" * 40, "private": False, "tags": [], "siblings": []})
        elif path == "/rows.csv":
            self._send(FILES["data/train-0.csv"])
        else:
            self._send(b"", 403)

    def _send(self, content: object, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read(endpoint: str, *paths: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=scaled(90),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_files_of_the_hub_are_read_by_name_and_by_glob(hub):
    place = "hf://datasets/org/rows"
    one, all_of_them, folder, missing = read(
        hub, f"{place}/data/train-0.csv", f"{place}/data/*.csv", place, f"{place}/none.csv"
    )
    assert one == "2 ['train-0.csv']"
    assert all_of_them == "3 ['train-0.csv', 'train-1.csv']"
    assert "is a folder" in folder and f"{place}/data/*.csv" in folder
    assert "none.csv does not exist" in missing


def test_a_signature_is_told_neither_when_it_is_right_nor_when_it_is_refused(hub):
    right, refused = read(hub, f"{hub}/rows.csv?signature=hidden", f"{hub}/away.csv?signature=hidden")
    assert right == "2 ['rows.csv']"
    assert "HTTP status 403" in refused and "away.csv" in refused and "hidden" not in refused


def test_a_hub_that_does_not_answer_is_an_error_of_the_place():
    (said,) = read("http://127.0.0.1:1", "hf://datasets/org/rows/rows.csv")
    assert "hf://datasets/org/rows/rows.csv" in said and "ConnectError" in said
