"""A thread of the served deployments that starts the flow `rollout` when there is something to look at, and
costs next to nothing otherwise.

A run of its own each minute would load this machine with imports all day; so it looks by itself at the open
rollout's file and at what the registry says of our model, as one hash, and asks Prefect for a run when a look
is due or the registry changed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from pathlib import Path

import httpx

from ratchet.config.params import Config
from ratchet.promotion.rollout import AGAIN, FILE

SECONDS = 10.0  # between two glances
BLIND_FACTOR = 5  # looks are so many times rarer while the registry gives no answer (down, wants credentials)
TIMEOUT = 5.0  # seconds for the registry's answer


class Watcher:
    """Started once; ends with its process."""

    def __init__(self, root: Path, config: Config) -> None:
        self._root, self._config = root, config
        self._seen: str | None = None
        self._looked = 0.0

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(SECONDS)
            try:
                self.glance()
            except Exception as error:  # noqa: BLE001  (it is said; a thread that ends would end all looks)
                sys.stderr.write(f"rollout: no look this time: {error}\n")  # the service's log
                sys.stderr.flush()

    def glance(self) -> bool:
        """Request a look when one is due or the registry changed, and return whether that was so."""
        now, seen = time.monotonic(), registry_fingerprint(self._config.project.name)
        waits = (
            seen is None or (self._root / FILE).exists() or (self._root / AGAIN).exists()
        )  # a registry that tells nothing is asked by the clock
        due = waits and now - self._looked >= self._config.rollout.look_seconds * (
            BLIND_FACTOR if seen is None else 1
        )
        changed = seen is not None and seen != self._seen
        if not (due or changed):
            return False
        request_look(self._root)
        self._looked, self._seen = now, seen or self._seen
        return True


def registry_fingerprint(name: str) -> str | None:
    """Hash all that MLflow says of the registered model and its versions; None when it does not answer.

    MLflow itself is not imported.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith("http"):
        return None
    hasher = hashlib.sha256()
    try:
        for path in ("registered-models/search", "model-versions/search"):
            answer = httpx.get(
                f"{server.rstrip('/')}/api/2.0/mlflow/{path}",
                params={"filter": f"name='{name}'", "max_results": 1000},
                timeout=TIMEOUT,
            )
            hasher.update(answer.raise_for_status().content)
    except httpx.HTTPError:
        return None
    return hasher.hexdigest()


def request_look(root: Path) -> None:
    """Request one run of the deployment `rollout`.

    It waits for a run that is under way, which may have read the registry before the change.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("rollout/rollout")
        client.create_flow_run_from_deployment(deployment.id, parameters={"root": str(root)})
