"""Run the gateway: `python -m ratchet.gateway.server` in the project's folder, or with RATCHET_ROOT naming
it.

`ratchet up` starts this.

SIGTERM: no new requests, running answers get `gateway.drain_seconds` to end, the log is written out, exit 0.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratchet.config.params import Config, load_config
from ratchet.engines import make_engine
from ratchet.errors import RatchetError, UserError
from ratchet.gateway.auth import list_keys
from ratchet.gateway.state import is_loopback
from ratchet.pipeline.stage import project_root

KEEP_ALIVE_SECONDS = 75  # over the 60 s after which load balancers let go of a quiet connection
SWITCH_SECONDS = 0.0005
LISTEN = "RATCHET_GATEWAY_LISTEN"  # address to listen on in place of `gateway.host`


def main() -> None:
    root = project_root()
    try:
        serve(root, load_config(root / "params.yaml"))
    except RatchetError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


def serve(root: Path, config: Config) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises UserError: the port is taken, or it would listen beyond loopback without keys.
    """
    import uvicorn

    from ratchet.gateway.app import create_app
    from ratchet.gateway.connections import Connection, most_requests
    from ratchet.gateway.routing import Fleet
    from ratchet.monitoring.request_log import open_log

    gateway = config.gateway
    _require_keys(root, gateway.host)
    # In a container every address is behind what the container publishes, so `gateway.host` says who may ask.
    listener = _listen(os.environ.get(LISTEN) or gateway.host, gateway.port)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("ratchet").setLevel(logging.INFO)
    engine = make_engine(config)
    app = create_app(root, config, engine, Fleet(root, config, engine), open_log(root, config))
    Connection.most = most_requests()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            http=Connection,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(gateway.drain_seconds),
        )
    )
    _keep_pauses_short()
    logging.getLogger("ratchet.gateway").info(
        "%s on http://%s:%d, engine %s", config.project.name, gateway.host, gateway.port, gateway.engine
    )
    with _exit_quietly():
        server.run(sockets=[listener])


def _require_keys(root: Path, host: str) -> None:
    if not is_loopback(host) and not list_keys(root):
        raise UserError(
            f"gateway.host is {host}, which others reach, and there is no API key",
            remedy="make one with `ratchet keys add NAME`, or set gateway.host to 127.0.0.1",
        )


def _listen(host: str, port: int) -> socket.socket:
    """Bind the port before the model is loaded, so that a taken one is reported at once. Raises UserError."""
    from ratchet.services.processes import find_port_fault

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"the gateway cannot listen on {host}:{port}: {find_port_fault(port) or error.strerror}",
            remedy="stop that, or set gateway.port (gateway.host) in params.yaml to another",
        ) from None
    return listener


def _keep_pauses_short() -> None:
    """Freeze what is loaded now, so that the collector need not walk it while requests wait.

    A working thread also gives way after 0.5 ms instead of 5.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_SECONDS)


@contextmanager
def _exit_quietly() -> Iterator[None]:
    """Ignore the signal that uvicorn raises once more when it is done.

    So the process ends with 0, and not by that signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
