"""Kill what runs, start it again as people do, and the rounds end in the same bytes as without a kill.

Four kills; `RATCHET_TRIES=20` asks for more, and `-s` shows them.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from calm import Calm
from live import Live, find, kill, party, wait_until
from parties import make_node
from patience import scaled
from safetensors.torch import load_file

from ratchet.config.federation import FederateConfig
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.federation.aggregation import Aggregate
from ratchet.federation.link.flower import FOLDER, FlowerLink
from ratchet.federation.node import identity
from ratchet.federation.rounds import STATE, Plan, run_rounds
from ratchet.files import read_json
from ratchet.models.adapters import load_trainable, save_trained
from ratchet.services.specs import FEDERATION
from ratchet.services.supervisor import is_running
from tasks.base import make_base
from tasks.federate import SECTIONS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
TRIES = int(os.environ.get("RATCHET_TRIES", "4"))
A_RUN = 4  # kills in one run of rounds
ROUNDS = 2
SETTINGS = {
    "plain": FederateConfig(rounds=ROUNDS, min_nodes=3),
    "secure": FederateConfig(rounds=ROUNDS, min_nodes=3, secure=True, aggregation="alternate"),
}
KINDS = ("run", "link", "SuperLink", "coordinator's service", "node", "SuperNode", "training")


class Place(NamedTuple):
    live: Live
    plan: Plan
    start: Path
    homes: Mapping[str, Path]

    def of(self, kind: str, run: str) -> Plan:
        return self.plan._replace(run=run, settings=SETTINGS[kind])


@pytest.fixture(scope="module")
def place(tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ratchet-survival-") as scratch:
        folder = Path(scratch)
        config = tiny_config.model_copy(
            update={
                "base": BaseConfig(model=str(tiny_base)),
                "prepare": tiny_config.prepare.model_copy(update={"test_share": 0.0}),
                "train": tiny_config.train.model_copy(update={"checkpoint_minutes": 0.0}),
                "federate": SETTINGS["plain"],
            }
        )
        base = folder / "base"
        make_base(base, config)
        model = load_trainable(base, None, config.adapter, seed=config.train.seed)
        save_trained(model, base, folder / "start")
        params = {name: getattr(config, name).model_dump(mode="json") for name in SECTIONS}
        described = read_json(folder / "start/adapter_config.json")
        plan = Plan("calm", params, identity(base), described, 2.0, config.federate)
        homes = {
            name: make_node(folder / name, config, raw_rows[number::3][:70])
            for number, name in enumerate(("north", "south", "west"))
        }
        live = Live(folder / "coordinator", config)
        try:
            live.up()
            for home in homes.values():
                live.join(home, live.invite(home))
            yield Place(live, plan, folder / "start/adapter_model.safetensors", homes)
        finally:
            live.stop()


@pytest.fixture(scope="module")
def calm(place: Place) -> Iterator[dict[str, bytes]]:
    """The bytes that rounds without any kill end in."""
    found = {}
    for kind in SETTINGS:  # a run that ends before its kills are done is followed by one of the other kind
        folder = place.live.root / f"calm-{kind}"
        start = Aggregate(load_file(place.start), {})
        run_rounds(Calm(place.homes), folder, start, place.of(kind, f"calm-{kind}"), print)
        found[kind] = last(folder)
    yield found


def last(folder: Path) -> bytes:
    return (folder / f"round-{ROUNDS}" / STATE).read_bytes()


class Attempt:
    """One run of rounds in which things are killed."""

    def __init__(self, place: Place, kind: str, name: str, chance: random.Random) -> None:
        self.live, self.chance = place.live, chance
        self._folder, self._start, self._plan = place.live.root / name, place.start, place.of(kind, name)
        self.process = self._go()

    def _go(self) -> subprocess.Popen[str]:
        return self.live.start_run(self._folder, self._start, self._plan)

    def goes_on(self) -> bool:
        """Whether the rounds go on; a run that was killed, or that says so, is started again."""
        if self.process.poll() in (None, 0):
            return self.process.returncode is None
        said = self._folder.with_suffix(".log").read_text()
        again = "link to its nodes does not run", "start the training again"
        assert self.process.returncode == -9 or any(words in said for words in again), said
        self.process = self._go()
        return True

    def strike(self, what: str) -> bool:
        """Kill it, and start again what a person would; return whether it was there."""
        home = self.chance.choice(sorted(self.live.nodes.values()))
        match what:
            case "run":
                self.process.kill()
                self.process.wait()
            case "link":
                service = party(self.live.root)
                kill(service, *service.children(recursive=True))
                self.live.up()
            case "coordinator's service":
                kill(party(self.live.root))
                self.live.up()
            case "SuperLink":
                self._kill_part(self.live.root, "flower-superlink")
                self.live.up()
            case "node":
                service = party(home)
                kill(service, *service.children(recursive=True))
                self.live.join(home)
            case "SuperNode":
                self._kill_part(home, "flower-supernode")
            case _:
                return self._kill_training()
        return True

    def _kill_part(self, home: Path, words: str) -> None:
        """Kill one process below a link: the coordinator's ends then, a node's starts another."""
        wait_until(lambda: find(home, words), 30, f"there is no {words}")
        kill(*filter(None, [find(home, words)]))
        wait_until(lambda: not is_running(home, FEDERATION) or find(home, words), 60, "the link only waits")

    def _kill_training(self) -> bool:
        """Kill a node's command, the training that it started, or both, once there is a training."""
        until, found = time.monotonic() + scaled(20), []
        while not found and time.monotonic() < until and self.goes_on():
            for home in self.live.nodes.values():
                if training := find(home, "tasks.train"):
                    command = find(home, "ratchet.federation.node")
                    found = [training, *([command] if command else [])]
            time.sleep(0.1)
        time.sleep(self.chance.uniform(0, 3))
        parts = self.chance.choice((found[:1], found[1:], found))
        kill(*parts)
        return bool(parts)


def draw(chance: random.Random, count: int) -> list[str]:
    """Every kind once before one comes again."""
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += chance.sample(KINDS, len(KINDS))
    return kinds[:count]


def test_whatever_is_killed_the_rounds_end_in_the_same_bytes(place: Place, calm: dict[str, bytes]) -> None:
    chance, left, number = random.Random(20), draw(random.Random(20), TRIES), 0
    while left:
        kind = "secure" if number % 2 else "plain"
        began, name = time.monotonic(), f"run{number}"
        attempt, struck = Attempt(place, kind, name, chance), []
        while attempt.goes_on():
            time.sleep(chance.uniform(0, 15) if len(struck) < A_RUN and left else 0.2)
            if len(struck) < A_RUN and left and attempt.goes_on():
                at = time.monotonic() - began
                if attempt.strike(left[0]):
                    struck.append(f"{left.pop(0)} at {at:.0f} s")
                    print(f"killed: {struck[-1]}", flush=True)
            assert time.monotonic() - began < scaled(900), attempt.process.args
        print(f"{kind}: {', '.join(struck)}; {time.monotonic() - began:.0f} s")
        assert last(place.live.root / name) == calm[kind], struck
        exchange = place.live.root / FOLDER / "exchange"
        assert len(list(exchange.glob(f"ask-{name}-*"))) == ROUNDS * (1 if kind == "plain" else 5)
        FlowerLink(place.live.root).forget(f"{name}-")
        assert not list(exchange.glob("ask-*"))
        number += 1
