"""Carry messages between the coordinator and its nodes with Flower, which has an environment of its own.

The coordinator runs a SuperLink on loopback, a proxy that shows nodes their part (`fleet_proxy.py`), and
a ServerApp that moves bytes between files and nodes (`relay.py`). A node runs a SuperNode and a loop
that calls its own command (`node_app.py`). Each side is one service (`ratchet.federation.link.party`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ratchet.config.federation import FederateConfig
from ratchet.errors import ServiceError, UserError
from ratchet.files import read_json, write_bytes, write_json, write_text
from ratchet.services.environment import HOST, NO_TELEMETRY

FOLDER = Path(".ratchet/federation/coordinator")
LINK = Path(__file__).parent
POLL = 0.2  # seconds between two looks for replies
ALIVE_SECONDS = 60.0  # without a sign of the relay after which it counts as gone
APP = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "relay"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "ratchet"

[tool.flwr.app.components]
serverapp = "relay:app"
clientapp = "relay:nothing"
"""


def flower(program: str) -> str:
    """Return the path of a program of Flower's environment. Raises UserError: there is none."""
    path = Path(sys.prefix).parent / f"{Path(sys.prefix).name}-federated" / "bin" / program
    if not path.exists():
        raise UserError(
            "Flower, which carries the messages of a federation, is not installed",
            remedy="make federated, which gives it an environment of its own",
        )
    return str(path)


def flower_environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of Flower's programs: their home, and no telemetry."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FLWR_", "MLFLOW_", "PREFECT_", "RATCHET_", "VIRTUAL_ENV"))
    }
    programs = str(Path(flower("python")).parent)
    return {
        **kept,
        **NO_TELEMETRY,
        "PATH": f"{programs}{os.pathsep}{kept.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **more,
    }


class Control:
    """Commands to the SuperLink: take a node in, put it out, start the relay."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._home = folder, folder / "superlink"
        self._home.mkdir(parents=True, exist_ok=True)
        write_text(
            self._home / "config.toml",
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{HOST}:{port}"\n'
            f"root-certificates = {json.dumps(str(folder / 'tls/authority.pem'))}\n",
        )

    def register(self, name: str, public_key: Path) -> str:
        """Take a node in, and return its id."""
        return str(self._call("supernode", "register", str(public_key), "here", "--name", name)["node-id"])

    def unregister(self, node: str) -> None:
        self._call("supernode", "unregister", node, "here")

    def start_relay(self) -> None:
        app = self._folder / "app"
        shutil.rmtree(app, ignore_errors=True)
        app.mkdir()
        write_text(app / "pyproject.toml", APP)
        shutil.copy(LINK / "relay.py", app / "relay.py")
        self._call("run", str(app), "here")

    def _call(self, *arguments: str) -> Any:
        done = subprocess.run(
            [flower("flwr"), *arguments, "--format", "json"],
            env=flower_environment(self._home),
            capture_output=True,
            text=True,
            check=False,
        )
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {"error-message": (done.stdout + done.stderr)[-500:]}
        if not found.get("success"):
            why = " ".join(str(found.get("error-message")).split())
            raise ServiceError(
                f"Flower's SuperLink did not take `flwr {arguments[0]}`: {why}",
                remedy="ratchet federate status; its log is .ratchet/logs/federation.log",
            )
        return found


class FlowerLink:
    """The nodes of this coordinator, through the folder of its relay."""

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER
        self._exchange = self._folder / "exchange"

    def nodes(self) -> dict[str, str]:
        """Return the invited nodes that are connected: id → name."""
        self._check_alive()
        names, path = read_names(self._folder), self._exchange / "nodes.json"
        connected = read_json(path) if path.exists() else []
        return {node: names[node] for node in connected if node in names}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        folder = self._exchange / f"ask-{name}"
        if not (folder / "request.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for node, request in requests.items():
                write_bytes(folder / f"{node}.request", [request])
            write_json(folder / "request.json", {"seconds": seconds})
        while not (folder / "done").exists():
            self._check_alive()
            time.sleep(POLL)
        found: dict[str, bytes | str] = {}
        for node in requests:
            reply, error = folder / f"{node}.reply", folder / f"{node}.error"
            found[node] = (
                reply.read_bytes() if reply.exists() else error.read_text() if error.exists() else "no reply"
            )
        return found

    def forget(self, name: str) -> None:
        for left in self._exchange.glob("old-*"):
            shutil.rmtree(left)
        for folder in self._exchange.glob(f"ask-{name}*"):
            # Renamed first: the relay finds all of it or nothing.
            shutil.rmtree(folder.rename(folder.with_name(f"old-{folder.name}")))

    def _check_alive(self) -> None:
        sign = self._exchange / "alive"
        if not sign.exists() or time.time() - sign.stat().st_mtime > ALIVE_SECONDS:
            raise ServiceError(
                "the coordinator's link to its nodes does not run",
                remedy="`ratchet federate up` starts it; .ratchet/logs/federation.log says why it ended",
            )


def read_names(folder: Path) -> dict[str, str]:
    """Return the invited nodes: id → name."""
    path = folder / "nodes.json"
    found: dict[str, str] = read_json(path) if path.exists() else {}
    return found


def check_invited(names: Collection[str], settings: FederateConfig) -> None:
    """Raise UserError if fewer nodes are invited than have to take part, since no wait would help."""
    if len(names) < settings.min_nodes:
        raise UserError(
            f"{len(names)} nodes are invited ({', '.join(sorted(names)) or 'none'}); "
            f"`federate.min_nodes` asks for {settings.min_nodes}",
            remedy="ratchet federate invite NAME takes one in; or lower federate.min_nodes",
        )
