"""`python -m ratchet.gateway.server` as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import scaled
from served import put_in_charge, wait_for
from servers import serving
from stub_upstream import Stub

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.gateway.server import serve
from ratchet.services.processes import free_port


def config_of(**gateway: Any) -> Config:
    return Config.model_validate(
        {
            "project": {"name": "pydoc"},
            "gateway": {"engine": "openai", "upstream": "http://127.0.0.1:9/v1", **gateway},
        }
    )


@contextlib.contextmanager
def process(root: Path, config: Config) -> Iterator[subprocess.Popen[str]]:
    (root / "params.yaml").write_text(render_params(config), encoding="utf-8")
    command = [sys.executable, "-m", "ratchet.gateway.server"]
    started = subprocess.Popen(
        command,
        env={**os.environ, "RATCHET_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@contextlib.contextmanager
def ready(root: Path, **gateway: Any) -> Iterator[tuple[subprocess.Popen[str], httpx.Client, Stub]]:
    """A gateway of its own process that answers with v1."""
    port, stub = free_port(), Stub()
    put_in_charge(root, 1)
    with (
        serving(stub) as upstream,
        process(root, config_of(upstream=f"{upstream}/v1", port=port, **gateway)) as started,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=scaled(20), trust_env=False) as http,
    ):
        wait_for(lambda: answers(http, "/readyz") or started.poll() is not None, seconds=30)
        assert started.poll() is None, started.communicate()[0]
        yield started, http, stub


def answers(http: httpx.Client, path: str) -> bool:
    try:
        return http.get(path).status_code == 200
    except httpx.TransportError:
        return False


def stream(http: httpx.Client, prompt: str) -> str:
    body = {"model": "pydoc", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    return http.post("/v1/chat/completions", json=body).text


def logged(root: Path) -> list[tuple[int, str]]:
    with contextlib.closing(sqlite3.connect(root / ".ratchet/requests.db")) as database:
        return database.execute("select status, finish from requests order by at").fetchall()


def test_sigterm_lets_running_streams_end_and_exits_with_0(tmp_path):
    with ready(tmp_path) as (started, http, stub), ThreadPoolExecutor(3) as pool:
        running = [pool.submit(stream, http, f"wait:{scaled(1.5)} words:30") for _ in range(3)]
        wait_for(lambda: stub.running == 3)
        started.send_signal(signal.SIGTERM)
        wait_for(lambda: not answers(http, "/healthz"))
        assert started.poll() is None, "it went before its answers ended"
        texts = [one.result() for one in running]
        output, _ = started.communicate(timeout=scaled(10))

    assert all(text.endswith("data: [DONE]\n\n") and text.count("pydoc@v1") > 30 for text in texts)
    assert started.returncode == 0
    assert logged(tmp_path) == [(200, "stop")] * 3
    assert output.count("\n") <= 4 and "Traceback" not in output, output


def test_what_outlasts_the_drain_is_told_so_and_logged(tmp_path):
    with ready(tmp_path, drain_seconds=1) as (started, http, stub), ThreadPoolExecutor(1) as pool:
        running = pool.submit(stream, http, "wait:60 words:300")
        wait_for(lambda: stub.running == 1)
        time.sleep(0.3)
        started.send_signal(signal.SIGTERM)
        text = running.result()
        output, _ = started.communicate(timeout=scaled(10))

    assert '"code":"stopping"' in text and "[DONE]" not in text
    assert started.returncode == 0 and logged(tmp_path) == [(503, "error")]
    assert "Traceback" not in output, output


def test_a_taken_port_is_named_with_who_has_it(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with process(tmp_path, config_of(port=holder.getsockname()[1])) as started:
            output, _ = started.communicate(timeout=scaled(30))

    assert (
        started.returncode == 2
        and f"it is in use by process {os.getpid()}" in output
        and "gateway.port" in output
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one loopback address alone")
def test_in_a_container_it_listens_elsewhere_and_lets_in_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("RATCHET_GATEWAY_LISTEN", "127.0.0.2")
    config = config_of(port=free_port())
    put_in_charge(tmp_path, 1)
    url = f"http://127.0.0.2:{config.gateway.port}"
    with process(tmp_path, config) as started, httpx.Client(base_url=url, trust_env=False) as http:
        wait_for(lambda: answers(http, "/healthz") or started.poll() is not None, seconds=30)
        published = http.get("/metrics", headers={"host": f"127.0.0.1:{config.gateway.port}"})
        other = http.get("/metrics")

    assert (published.status_code, other.status_code) == (200, 403)


def test_beyond_loopback_it_does_not_start_without_a_key(tmp_path):
    with pytest.raises(UserError, match=r"gateway\.host is 0\.0\.0\.0.*no API key"):
        serve(tmp_path, config_of(host="0.0.0.0", port=free_port()))


def test_a_kill_loses_only_the_newest_rows_of_the_log(tmp_path):
    """Those that the writer gathers (`request_log.GATHER_SECONDS`) or is writing.

    With a pause of 0.2 s, 91 of 200 were kept. A busy machine may hold the writer up, so one of three times
    is enough.
    """
    kept = []
    for number in range(3):
        (root := tmp_path / str(number)).mkdir()
        with ready(root) as (started, http, _), ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(ask, http), map(str, range(200))))
            started.kill()
            started.wait()
        kept.append(len(logged(root)))
        if kept[-1] >= 170:
            return
    pytest.fail(f"of 200 rows there were {kept}")


def ask(http: httpx.Client, prompt: str) -> None:
    body = {"model": "pydoc", "messages": [{"role": "user", "content": prompt}]}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
