"""A real uvicorn on a free port of 127.0.0.1 in a thread, for tests of the gateway."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from patience import scaled


@contextmanager
def serving(app: Any, *, drain_seconds: int = 5, http: Any = "auto") -> Iterator[str]:
    """The address, `http://127.0.0.1:PORT`, as long as the block runs."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http=http,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=drain_seconds,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            _wait_until(lambda: server.started or not thread.is_alive())
            assert thread.is_alive(), "the server did not start"
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=scaled(20))
            assert not thread.is_alive(), "the server did not stop"


def _wait_until(holds: Any, seconds: float = 20) -> None:
    until = time.monotonic() + scaled(seconds)
    while not holds() and time.monotonic() < until:
        time.sleep(0.005)
