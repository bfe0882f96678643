"""Make a checkout as the gateway sees it, and run the gateway on it.

There is no git in it: versions that are fetched already, who is in charge, an open rollout.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import openai
from patience import scaled
from servers import serving
from stub_upstream import Stub

from ratchet.config.params import Config
from ratchet.engines import make_engine
from ratchet.engines.upstream_engine import UpstreamEngine
from ratchet.files import write_bytes, write_json
from ratchet.gateway.app import create_app
from ratchet.gateway.connections import Connection
from ratchet.gateway.routing import Fleet
from ratchet.models.loading import WEIGHTS, adapter_sha256
from ratchet.monitoring.request_log import RequestLog, open_log
from ratchet.promotion.champion import Champion, write_champion
from ratchet.promotion.rollout import Rollout, write_rollout
from ratchet.serving.bundle import SERVING, ServingState, read_state

NAME = "pydoc"


class Gateway(NamedTuple):
    url: str
    root: Path
    stub: Stub
    log: RequestLog
    http: httpx.Client  # one for all: a new one reads the system's certificates each time, 40 ms

    def ask(self, prompt: str = "hello", **more: Any) -> httpx.Response:
        body = {"model": NAME, "messages": [{"role": "user", "content": prompt}]}
        headers = more.pop("headers", {})
        return self.http.post("/v1/chat/completions", json=body | more, headers=headers)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.http.get(path, **more)

    def say(self, **feedback: Any) -> httpx.Response:
        headers = feedback.pop("headers", {})
        return self.http.post("/v1/feedback", json=feedback, headers=headers)

    def logged(self) -> list[Any]:
        assert self.log.flush()
        return self.log.window(limit=1000)


@contextmanager
def running_gateway(
    root: Path, *, stub: Stub | None = None, version: int | None = 1, **sections: dict[str, Any]
) -> Iterator[Gateway]:
    """Run the real fleet, log and engine `openai` on a stub, and wait until `version` is in charge."""
    stub = stub or Stub(needs_loading=True)
    if version is not None:
        put_in_charge(root, version)
    with ExitStack() as stack:
        upstream = stack.enter_context(serving(stub))
        gateway = {"engine": "openai", "upstream": f"{upstream}/v1", **sections.pop("gateway", {})}
        config = Config.model_validate({"project": {"name": NAME}, "gateway": gateway, **sections})
        engine, log = UpstreamEngine(config), open_log(root, config)
        app = create_app(root, config, engine, Fleet(root, config, engine), log)
        url = stack.enter_context(serving(app, http=Connection))
        running = Gateway(
            url,
            root,
            stub,
            log,
            stack.enter_context(httpx.Client(base_url=url, timeout=scaled(20), trust_env=False)),
        )
        if version is not None:
            wait_for(lambda: running.get("/readyz").status_code == 200)
        yield running


def put_in_charge(
    root: Path, version: int, *, previous: int | None = None, adapter: Path | None = None
) -> None:
    """Put a version in charge; `adapter` holds its weights, where a model answers."""
    sha = make_served(root, version, adapter)
    kept = {
        "run_key": "",
        "run_id": "",
        "batches": [],
        "data": {},
        "gate": {"verdict": "promote", "rival": None},
        "at": "",
        "by": "tests",
        "why": "",
        "move": "promote",
        "replaced": previous,
    }
    write_champion(
        root,
        Champion(
            name=NAME,
            version=version,
            previous=previous,
            commit="0" * 40,
            adapter_sha256=sha,
            **kept,
        ),
    )


def open_rollout(root: Path, *, champion: int, version: int, share: float) -> None:
    make_served(root, version)
    now = time.time()
    more = {"salt": "s", "step": 0, "shares": [share], "state": "open", "opened": now, "step_since": now}
    write_rollout(
        root,
        Rollout(
            id="r1",
            name=NAME,
            version=version,
            champion=champion,
            commit="0" * 40,
            adapter_sha256=digest(version),
            **more,
        ),
    )


def make_served(root: Path, version: int, adapter: Path | None = None) -> str:
    """Leave a version as `ratchet.serving.bundle.make_bundle` does, and return the sha256 of its weights.

    Without an adapter its weights are no model's: the stub asks for none.
    """
    write_json(root / SERVING / "bases/base/manifest.json", {})
    sha = adapter_sha256(adapter) if adapter else digest(version)
    folder = root / SERVING / f"v{version}-{sha[:12]}"
    if adapter:
        shutil.copytree(adapter, folder / "adapter", dirs_exist_ok=True)
    else:
        write_bytes(folder / "adapter" / WEIGHTS, [_weights(version)])
    write_json(
        folder / "serving.json", {"commit": "0" * 40, "base": "base", "max_new_tokens": 8, "max_length": 96}
    )
    return sha


def _weights(version: int) -> bytes:
    return b"%d" % version


def digest(version: int) -> str:
    return hashlib.sha256(_weights(version)).hexdigest()


def wait_until_served(root: Path, **wanted: Any) -> None:
    """Until the fleet says of itself that it is so, such as champion=2."""
    wait_for(lambda: wanted.items() <= msgspec.structs.asdict(read_state(root) or ServingState()).items())


def wait_for(holds: Any, seconds: float = 30) -> None:
    until = time.monotonic() + scaled(seconds)
    while not holds():
        assert time.monotonic() < until, "it did not come in time"
        time.sleep(0.01)


@contextmanager
def serving_candidate(root: Path, candidate: Path, base: Path, config: Config) -> Iterator[openai.OpenAI]:
    """Serve a candidate as v1, with the real engine, and yield a client of it."""
    put_in_charge(root, 1, adapter=candidate)
    served = root / SERVING / f"v1-{adapter_sha256(candidate)[:12]}"
    shutil.copytree(base, root / SERVING / "bases/base", dirs_exist_ok=True)
    settings = {"max_new_tokens": config.evaluate.max_new_tokens, "max_length": 384}
    write_json(served / "serving.json", {"commit": "0" * 40, "base": "base"} | settings)
    engine, log = make_engine(config), open_log(root, config)
    app = create_app(root, config, engine, fleet := Fleet(root, config, engine), log)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        wait_for(lambda: fleet.table.champion == 1)
        yield client
