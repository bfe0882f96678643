"""A federation on one machine without Flower: nodes as folders, and a link that calls each one's command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.params import Config
from ratchet.data.batches import write_batch
from ratchet.federation.records import NODE, SETTINGS, Node
from ratchet.files import read_json, write_json, write_text
from ratchet.models.manifests import MANIFEST, Together


def make_node(root: Path, config: Config, rows: list[dict[str, Any]], **limits: Any) -> Path:
    """A checkout of a node with one batch of rows."""
    write_text(root / "params.yaml", json.dumps(config.model_dump(mode="json")))
    write_batch(
        root / "data/raw",
        [msgspec.json.encode(row) for row in rows],
        source="pydoc",
        label="rows",
        time="2026-01-01T00:00:00Z",
        licence="PSF-2.0",
        who="tests",
        form="messages",
    )
    (root / "data/golden.jsonl").touch()
    (root / "data/forgotten.jsonl").touch()
    join(root, **limits)
    return root


def join(root: Path, **limits: Any) -> None:
    settings = Node(root.name, "127.0.0.1:1", **limits)
    (root / NODE).mkdir(parents=True, exist_ok=True)
    write_json(root / NODE / SETTINGS, msgspec.to_builtins(settings))


def make_version(folder: Path, trained: Path, run: str = "run", nodes: Sequence[str] = ("north",)) -> Path:
    """Copy a trained version to `folder` as if `nodes` had trained it together."""
    shutil.copytree(trained, folder)
    together = msgspec.to_builtins(Together(run, list(nodes), 2, 140))
    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"federation": together})
    return folder


class Direct:
    """A link that starts the command of each node, as its SuperNode would, and keeps all that is said."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)
        self.requests: list[tuple[str, str, bytes]] = []
        self.replies: list[tuple[str, str, bytes | str]] = []
        self.away: set[tuple[str, str]] = set()  # node, the end of a step's name

    def nodes(self) -> dict[str, str]:
        return {f"{number}": name for number, name in enumerate(sorted(self.roots), start=1)}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        names, found = self.nodes(), {}
        for node, request in requests.items():
            who = names[node]
            self.requests.append((who, name, request))
            gone = any(who == away and name.endswith(step) for away, step in self.away)
            found[node] = "no reply within 1 s" if gone else self.call(self.roots[who], request)
            self.replies.append((who, name, found[node]))
        return found

    def forget(self, name: str) -> None:
        """Nothing is kept here."""

    def call(self, root: Path, request: bytes) -> bytes | str:
        asked, reply = root / NODE / "request", root / NODE / "reply"
        asked.write_bytes(request)
        reply.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "RATCHET_ROOT"}
        done = subprocess.run(
            [sys.executable, "-m", "ratchet.federation.node", str(asked), str(reply)],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.log = done.stdout + done.stderr
        return reply.read_bytes() if reply.exists() else f"code {done.returncode}"
