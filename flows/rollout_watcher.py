"""Start the flow `rollout` when there is something to look at, from a thread that costs almost nothing
otherwise.

A flow run each minute would load the machine with imports all day. So the thread itself looks at the file of
the open rollout and at the registry's answer about our model, as one hash. It requests a run from Prefect
when a look is due or the registry changed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import httpx

from ratchet.config.params import Config
from ratchet.errors import CheckoutError
from ratchet.promotion.champion import Champion, alias_is_pending, publish_newer, read_champion
from ratchet.promotion.rollout import AGAIN, FILE
from ratchet.storage.documents import read_documents
from ratchet.tracking.registry import CHAMPION

SECONDS = 10.0  # between two glances
BLIND_FACTOR = (
    5  # times between looks, as a factor, while the registry does not answer (down, needs credentials)
)
TIMEOUT = 5.0  # seconds for the registry's answer


class Watcher:
    """The thread, which is started once and ends with its process."""

    def __init__(self, root: Path, config: Config) -> None:
        self._root, self._config = root, config
        self._seen: Seen | None = None
        self._looked = 0.0

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(SECONDS)
            try:
                self.glance()
            except Exception as error:  # noqa: BLE001  (reported; without the thread there are no looks)
                sys.stderr.write(f"rollout: no look this time: {error}\n")  # the service's log
                sys.stderr.flush()

    def glance(self) -> bool:
        """Request a look if one is due or the registry changed, and return whether it was requested."""
        publish_newer(self._root)
        now, seen = time.monotonic(), see_registry(self._config.project.name)
        documents = read_documents(self._root, [FILE, AGAIN])
        champion = self._champion()
        waits = (
            seen is None  # looks are due by the clock alone
            or alias_is_pending(self._root)
            or (champion is not None and seen.champion != champion.version)
            or any(content is not None for content in documents.values())
        )
        due = waits and now - self._looked >= self._config.rollout.look_seconds * (
            BLIND_FACTOR if seen is None else 1
        )
        changed = seen is not None and seen != self._seen
        if not (due or changed):
            return False
        request_look(self._root, self._config.project.name)
        self._looked, self._seen = now, seen or self._seen
        return True

    def _champion(self) -> Champion | None:
        """Return the champion; None for a file that holds none, of which a look tells."""
        try:
            return read_champion(self._root)
        except CheckoutError:
            return None


class Seen(NamedTuple):
    """MLflow's answers about the registered model and its versions; `champion` has that alias."""

    fingerprint: str
    champion: int | None


def see_registry(name: str) -> Seen | None:
    """Ask MLflow about the registered model; None when it does not answer.

    MLflow itself is not imported, because that takes seconds and memory.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not server.startswith("http"):
        return None
    hasher, champion = hashlib.sha256(), None
    try:
        for path in ("registered-models/search", "model-versions/search"):
            answer = httpx.get(
                f"{server.rstrip('/')}/api/2.0/mlflow/{path}",
                params={"filter": f"name='{name}'", "max_results": 1000},
                timeout=TIMEOUT,
            )
            hasher.update(answer.raise_for_status().content)
            for model in answer.json().get("registered_models", []):
                aliases = {one["alias"]: int(one["version"]) for one in model.get("aliases", [])}
                champion = aliases.get(CHAMPION, champion)
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):  # no answer, or not MLflow's
        return None
    return Seen(hasher.hexdigest(), champion)


def request_look(root: Path, project: str) -> None:
    """Request one run of the project's deployment of `rollout`.

    It waits for a run that is under way, because that one may have read the registry before the change.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(f"rollout/{project}")
        client.create_flow_run_from_deployment(deployment.id, parameters={"root": str(root)})
