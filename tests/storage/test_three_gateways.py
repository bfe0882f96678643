"""Three gateway processes on one PostgreSQL: who answers a user does not depend on which one is asked."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import scaled
from places import commit, make_repository, use_git_without_a_user, use_no_mlflow
from postgres import QUOTED, connect, postgres
from served import NAME, digest, make_served, open_rollout, put_in_charge, wait_for
from servers import serving
from stub_upstream import Stub

from flows.promotion import roll_back
from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.errors import ServiceError
from ratchet.monitoring.request_log import open_log
from ratchet.promotion.champion import publish_newer, read_champion
from ratchet.promotion.rollout import finish, pause, read_rollout, resume
from ratchet.services.processes import free_port
from ratchet.storage.database import URL_VARIABLE

pytestmark = pytest.mark.e2e
CONFIG = Config(project=ProjectConfig(name=NAME))
USERS = [f"user-{number}" for number in range(40)]
SEEN_SECONDS = 1.0  # after which every gateway has to follow


class Gateway:
    """One gateway's process, in a folder of its own, with an upstream of its own."""

    def __init__(self, root: Path, upstream: str, url: str) -> None:
        self.root, self.port = root, free_port()
        root.mkdir()
        for version in (1, 2):
            make_served(root, version)
        gateway = {"engine": "openai", "upstream": f"{upstream}/v1", "port": self.port}
        (root / "params.yaml").write_text(
            json.dumps({"project": {"name": NAME}, "gateway": gateway, "storage": {"url": ""}})
        )
        self.environment = {**os.environ, "RATCHET_ROOT": str(root), URL_VARIABLE: url}
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=scaled(20), trust_env=False
        )
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.root / "gateway.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ratchet.gateway.server"],
                cwd=Path(__file__).parents[2],
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def is_ready(self) -> bool:
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, user: str) -> httpx.Response:
        body = {"model": NAME, "user": user, "messages": [{"role": "user", "content": "hello"}]}
        return self.client.post("/v1/chat/completions", json=body)

    def version_for(self, user: str) -> int:
        answer = self.ask(user)
        assert answer.status_code == 200, answer.text
        return int(answer.headers["x-ratchet-version"])

    def end(self, number: int) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(scaled(60))


class Balancer:
    """Ask one gateway after the other, and the next one where a connection fails, as load balancers do."""

    def __init__(self, gateways: list[Gateway]) -> None:
        self._gateways, self._turn = gateways, itertools.count()

    def ask(self, user: str) -> httpx.Response:
        first = next(self._turn)
        for place in range(len(self._gateways)):
            gateway = self._gateways[(first + place) % len(self._gateways)]
            try:
                answer = gateway.ask(user)
            except httpx.TransportError:
                continue
            if answer.status_code != 503:
                return answer
        raise AssertionError("no gateway answers")


@contextmanager
def traffic(balancer: Balancer) -> Iterator[list[httpx.Response]]:
    """Send requests all the time."""
    answers: list[httpx.Response] = []
    faults: list[BaseException] = []
    ended = threading.Event()

    def send() -> None:
        for user in itertools.cycle(USERS):
            if ended.is_set():
                return
            try:
                answers.append(balancer.ask(user))
            except BaseException as error:  # noqa: BLE001 (shown by the test)
                faults.append(error)
                return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield answers
    finally:
        ended.set()
        thread.join(scaled(60))
    assert not faults, faults
    assert answers and {answer.status_code for answer in answers} == {200}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with postgres() as port:
        with connect(port) as connection:
            connection.execute("CREATE DATABASE gateways")
        found = f"postgresql+psycopg://ana:{QUOTED}@127.0.0.1:{port}/gateways"
        monkeypatch.setenv(URL_VARIABLE, found)
        yield found


@pytest.fixture
def hub(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkout where flows run: its ledger has v1, then v2."""
    use_git_without_a_user(monkeypatch)
    use_no_mlflow(monkeypatch)
    root = make_repository(tmp_path / "hub", {"params.yaml": json.dumps({"project": {"name": NAME}})})
    put_in_charge(root, 1)
    commit(root, "Promote v1")
    return root


@pytest.fixture
def gateways(url: str, hub: Path, tmp_path: Path) -> Iterator[list[Gateway]]:
    publish_newer(hub)
    with ExitStack() as stack:
        started = []
        for name in ("a", "b", "c"):
            upstream = stack.enter_context(serving(Stub(needs_loading=True)))
            started.append(Gateway(tmp_path / name, upstream, url))
            stack.callback(started[-1].client.close)
        for gateway in started:
            gateway.start()
            stack.callback(gateway.end, signal.SIGTERM)
        for gateway in started:
            wait_for(gateway.is_ready, 120)
        yield started


def time_until(gateways: list[Gateway], holds: Callable[[Gateway], Any], since: float) -> float:
    """Return the seconds until the last gateway follows."""
    for gateway in gateways:
        wait_for(lambda gateway=gateway: holds(gateway))
    return time.monotonic() - since


@contextmanager
def away(url: str) -> Iterator[None]:
    """Let the database refuse everybody for a while."""
    name = url.rpartition("/")[2]
    with connect(int(url.rpartition(":")[2].partition("/")[0])) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
        )
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


def test_users_keep_their_version_and_no_request_fails(hub: Path, gateways: list[Gateway], url: str) -> None:
    a, b, c = gateways
    assert {gateway.version_for("ana") for gateway in gateways} == {1}

    # A rollout: after its version is loaded, the same user gets the same version from each.
    open_rollout(hub, champion=1, version=2, share=0.5)
    rollout = read_rollout(hub)
    assert rollout is not None
    wait_for(lambda: all(2 in {gateway.version_for(user) for user in USERS[:8]} for gateway in gateways), 60)
    arms = [[gateway.version_for(user) for user in USERS] for gateway in gateways]
    assert arms[0] == arms[1] == arms[2] and set(arms[0]) == {1, 2}
    tried = USERS[arms[0].index(2)]

    # Feedback reaches the answer, whichever gateway takes it.
    said = b.client.post(
        "/v1/feedback", json={"request_id": a.ask("bo").headers["x-request-id"], "user": "bo", "score": 1}
    )
    assert said.status_code in (200, 201, 204), said.text

    with traffic(Balancer(gateways)):
        pause(hub, "ana")
        paused = time_until(gateways, lambda gateway: gateway.version_for(tried) == 1, time.monotonic())
        resume(hub, "ana")
        resumed = time_until(gateways, lambda gateway: gateway.version_for(tried) == 2, time.monotonic())

    with traffic(Balancer(gateways)) as answers:
        c.end(signal.SIGKILL)
        before = len(answers)
        wait_for(lambda: len(answers) > before + 60)

        # The challenger is promoted, as the flow does it: the ledger first, then the end of the rollout.
        put_in_charge(hub, 2, previous=1)
        commit(hub, "Promote v2")
        since = time.monotonic()
        publish_now(hub)
        kept = USERS[arms[0].index(1)]
        promoted = time_until([a, b], lambda gateway: gateway.version_for(kept) == 2, since)
        finish(hub, rollout, "promoted", why="better", by="ana")

        since = time.monotonic()
        roll_back(hub, CONFIG, reason="worse", say=print)
        done = time.monotonic()
        time_until([a, b], lambda gateway: gateway.version_for(tried) == 1, since)
        returned = max(0.0, time.monotonic() - done)

        c.start()
        wait_for(c.is_ready, 120)
        assert c.version_for(tried) == 1, "who comes back follows at once"
    print(f"seconds: pause {paused:.2f}, resume {resumed:.2f}, promote {promoted:.2f}, back {returned:.2f}")
    assert max(paused, resumed, promoted, returned) <= scaled(SEEN_SECONDS)
    with traffic(Balancer(gateways)) as answers, away(url):
        before = len(answers)
        wait_for(lambda: len(answers) > before + 60)
        with pytest.raises(ServiceError):
            roll_back(hub, CONFIG, reason="worse still", say=print)
    assert b.version_for(tried) == 1

    champion = read_champion(hub)
    assert champion is not None and (champion.version, champion.adapter_sha256) == (1, digest(1))
    log = open_log(hub, CONFIG)
    try:
        wait_for(lambda: {request.version for request in log.window(limit=10_000)} == {1, 2})
        units = {(request.user, request.arm) for request in log.window(limit=10_000) if request.step >= 0}
        assert len({user for user, _ in units}) == len(units), "nobody was in two arms"
    finally:
        log.close()


def publish_now(hub: Path) -> None:
    from ratchet.promotion.champion import publish_champion

    champion = read_champion(hub)
    assert champion is not None
    publish_champion(hub, champion)
