"""The fleet follows champion.json and the rollout with the engine `local`; nobody's request fails, and no
answer is of two versions.

The bundles lie there already, as `ratchet.serving.bundle.make_bundle` leaves them
(tests/serving/test_bundle.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from patience import scaled
from places import commit, make_repository
from safetensors.torch import load_file, save_file

from ratchet.config.params import Config
from ratchet.data.examples import Message
from ratchet.engines.local_engine import LocalEngine
from ratchet.errors import ServiceError
from ratchet.files import read_json, write_bytes, write_json
from ratchet.gateway.routing import Choice, Fleet
from ratchet.models.loading import MANIFEST, WEIGHTS, adapter_sha256
from ratchet.promotion.champion import FILE as CHAMPION
from ratchet.promotion.champion import Champion, write_champion
from ratchet.promotion.rollout import FILE as ROLLOUT
from ratchet.promotion.rollout import Rollout, position, read_rollout, write_rollout
from ratchet.serving.bundle import SERVING, Bundle, make_bundle, read_state
from ratchet.serving.engine import Ask, Piece

ASKED = [
    (Message("user", f"Which module documents this? Return the list of {word}."),)
    for word in ("handlers", "messages", "modules", "headers", "levels")
]
A_SECOND, SWAPS = 50, 20


class Place:
    """A checkout with versions: every second one is the candidate turned round, every third has the same
    longest answer.
    """

    def __init__(self, root: Path, base: Path, candidate: Path) -> None:
        self.root, self._candidate = root, candidate
        self._digests: dict[int, str] = {}  # of the versions that were made
        shutil.copytree(base, root / SERVING / "bases/base")

    def make(self, version: int, strength: float | None = None) -> None:
        folder = self.root / SERVING / f"new-{version}"
        shutil.copytree(self._candidate, folder / "adapter")
        strength = (1.0, -10.0)[version % 2] if strength is None else strength
        weights = {
            name: weight * (strength if "lora_B" in name else 1)
            for name, weight in load_file(folder / "adapter" / WEIGHTS).items()
        }
        save_file(weights, folder / "adapter" / WEIGHTS, metadata={"format": "pt"})
        sha = self._digests[version] = adapter_sha256(folder / "adapter")
        manifest = read_json(folder / "adapter" / MANIFEST)
        write_json(folder / "adapter" / MANIFEST, manifest | {"files": manifest["files"] | {WEIGHTS: sha}})
        write_json(
            folder / "serving.json",
            {"commit": "0" * 40, "base": "base", "max_new_tokens": 5 + version % 3, "max_length": 96},
        )
        folder.rename(folder.with_name(f"v{version}-{sha[:12]}"))

    def digest(self, version: int) -> str:
        return self._digests.get(version, digest(version))

    def bundle(self, version: int) -> Bundle:
        return make_bundle(
            self.root, name="small", version=version, commit="0" * 40, adapter_sha256=self.digest(version)
        )

    def crown(self, version: int, previous: int | None = None) -> None:
        kept: dict[str, Any] = {
            "run_key": "",
            "run_id": "",
            "batches": [],
            "data": {},
            "gate": {"verdict": "promote", "rival": None},
            "at": "",
            "by": "Ana",
            "why": "",
            "move": "promote",
            "replaced": previous,
        }
        write_champion(
            self.root,
            Champion(
                name="small",
                version=version,
                previous=previous,
                commit="0" * 40,
                adapter_sha256=self.digest(version),
                **kept,
            ),
        )

    def roll_out(self, version: int, champion: int, share: float) -> None:
        write_rollout(
            self.root,
            Rollout(
                "r1",
                "small",
                version,
                champion,
                "0" * 40,
                self.digest(version),
                "salt",
                0,
                [share, 1.0],
                "open",
                0.0,
                0.0,
            ),
        )

    def state(self) -> dict[str, Any]:
        state = read_state(self.root)
        return msgspec.to_builtins(state) if state else {}


def digest(version: int) -> str:
    return hashlib.sha256(b"%d" % version).hexdigest()


@pytest.fixture
def place(tmp_path: Path, tiny_base: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("ratchet.gateway.routing.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("ratchet.gateway.routing.GRACE_SECONDS", 0.1)
    return Place(tmp_path / "checkout", tiny_base, candidate)


def follow(
    place: Place, work: Callable[[Fleet, LocalEngine], Awaitable[None]], engine: LocalEngine | None = None
) -> None:
    """`work` with a running fleet."""

    async def whole() -> None:
        config = Config.model_validate({"gateway": {"max_queue": 1000}})
        used = engine or LocalEngine(config)
        fleet = Fleet(place.root, config, used)
        await fleet.start()
        try:
            await asyncio.wait_for(work(fleet, used), 120)
        finally:
            await fleet.close()
            await used.close()

    asyncio.run(whole())


async def until(said: Callable[[], bool], seconds: float = 30.0) -> None:
    began = time.monotonic()
    while not said():
        assert time.monotonic() - began < scaled(seconds), "it never came"
        await asyncio.sleep(0.01)


async def answer(fleet: Fleet, engine: LocalEngine, unit: str, number: int = 0) -> tuple[int, str]:
    choice = fleet.choose(unit)
    async with fleet.hold(choice.version):
        return choice.version, await say(engine, choice.version, number)


async def say(engine: LocalEngine, version: int, number: int) -> str:
    """Drawn with a seed: the small model's likeliest answers are too much alike to tell versions apart."""
    asked = Ask(f"r{number}", version, ASKED[number], temperature=1.5, seed=number)
    return "".join([piece.text async for piece in engine.answer(asked) if isinstance(piece, Piece)])


def test_before_the_first_champion_nobody_answers_and_the_reason_is_said(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        with pytest.raises(ServiceError, match="ratchet retrain"):
            fleet.choose("ana")
        place.make(1)
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        assert fleet.choose("ana") == Choice(1, "champion", "", -1)
        await until(lambda: place.state().get("champion") == 1)
        state = place.state()
        assert abs(state.pop("at") - time.time()) < 60
        assert state == {
            "champion": 1,
            "challenger": None,
            "share": 0.0,
            "rollout": "",
            "loaded": [1],
            "refused": {},
            "refused_since": {},
        }

    follow(place, work)


def test_twenty_swaps_under_load_fail_nobody_and_mix_nothing(place: Place) -> None:
    """Each swap is to a version that has to be loaded first, and one that nobody wants any more is unloaded
    meanwhile.
    """
    for version in range(1, SWAPS + 2):
        place.make(version)
    alone = asyncio.run(ask_alone(place, [1, 2, 3, 4, 5, 6]))  # the seventh is made as the first
    assert len({tuple(answers) for answers in alone.values()}) == 6, "or the test would tell nothing"
    found: dict[int, set[tuple[int, str]]] = {}

    async def client(fleet: Fleet, engine: LocalEngine, number: int) -> None:
        version, text = await answer(fleet, engine, f"user{number}", number % len(ASKED))
        found.setdefault(version, set()).add((number % len(ASKED), text))

    async def load(fleet: Fleet, engine: LocalEngine, done: asyncio.Event) -> int:
        """Open loop: a slow answer holds back no later request."""
        asked: list[asyncio.Task[None]] = []
        while not done.is_set():
            asked.append(asyncio.create_task(client(fleet, engine, len(asked))))
            await asyncio.sleep(1 / A_SECOND)
        await asyncio.gather(*asked)
        return len(asked)

    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        done = asyncio.Event()
        loading = asyncio.create_task(load(fleet, engine, done))
        for version in range(2, SWAPS + 2):
            place.crown(version, previous=version - 1)
            await until(lambda version=version: fleet.table.champion == version)
            await asyncio.sleep(0.1)
        done.set()
        assert await loading > 2 * A_SECOND
        await until(lambda: place.state()["loaded"] == [SWAPS, SWAPS + 1])

    follow(place, work)
    assert set(found) == set(range(1, SWAPS + 2)), "every version answered"
    for version, answers in found.items():
        assert all(text == alone[(version - 1) % 6 + 1][number] for number, text in answers), (
            f"an answer of v{version} is not its own"
        )


async def ask_alone(place: Place, versions: list[int]) -> dict[int, list[str]]:
    """What each version says of everything that is asked, with nobody beside it."""
    said: dict[int, list[str]] = {}
    for version in versions:
        engine = LocalEngine(Config())
        await engine.load(place.bundle(version))
        said[version] = [await say(engine, version, number) for number in range(len(ASKED))]
        await engine.close()
    return said


def test_a_rollback_waits_for_no_loading(place: Place) -> None:
    going, decided = asyncio.Event(), asyncio.Event()

    class Slow(LocalEngine):
        async def load(self, bundle: Bundle) -> None:
            if bundle.version == 3:
                going.set()
                await decided.wait()
            await super().load(bundle)

    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        place.crown(2, previous=1)
        await until(lambda: fleet.table.champion == 2)
        place.roll_out(3, champion=2, share=0.5)
        await going.wait()
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        assert (await answer(fleet, engine, "ana"))[0] == 1
        decided.set()

    for version in (1, 2, 3):
        place.make(version)
    follow(place, work, Slow(Config()))


def test_a_rollout_gives_each_user_one_arm_and_a_growing_share_takes_nobody_back(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        place.roll_out(2, champion=1, share=0.3)
        await until(lambda: fleet.table.challenger == 2)
        users = [f"user{number}" for number in range(2000)]
        first = {user for user in users if fleet.choose(user).arm == "challenger"}
        assert abs(len(first) / 2000 - 0.3) < 0.05
        assert first == {user for user in users if position("salt", user) < 0.3}
        assert {fleet.choose(user) for user in users} == {
            Choice(2, "challenger", "r1", 0),
            Choice(1, "champion", "r1", 0),
        }
        place.roll_out(2, champion=1, share=0.6)
        await until(lambda: fleet.table.share == 0.6)
        assert first < {user for user in users if fleet.choose(user).arm == "challenger"}
        (place.root / ROLLOUT).unlink()
        await until(lambda: fleet.table.challenger is None)
        assert {fleet.choose(user).version for user in users} == {1}
        await until(lambda: place.state()["loaded"] == [1])

    place.make(1)
    place.make(2)
    follow(place, work)


def test_a_paused_rollout_counts_nobody_and_its_version_stays_ready(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        place.roll_out(2, champion=1, share=0.5)
        await until(lambda: fleet.table.challenger == 2)
        rollout = read_rollout(place.root)
        assert rollout is not None
        write_rollout(place.root, msgspec.structs.replace(rollout, state="paused"))
        await until(lambda: fleet.table.challenger is None)
        assert {fleet.choose(f"user{number}") for number in range(50)} == {Choice(1, "champion", "", -1)}
        await asyncio.sleep(0.5)
        assert place.state()["loaded"] == [1, 2]

    place.make(1)
    place.make(2)
    follow(place, work)


def test_a_challenger_that_is_broken_is_refused_with_its_reason_and_the_champion_serves(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        place.roll_out(2, champion=1, share=0.9)
        await until(lambda: "v2" in place.state().get("refused", {}))
        assert (
            "not finite" in place.state()["refused"]["v2"]
            and abs(place.state()["refused_since"]["v2"] - time.time()) < 60
        )
        assert {fleet.choose(f"user{number}").version for number in range(50)} == {1}
        (place.root / ROLLOUT).unlink()
        await until(lambda: place.state()["refused"] == {})

    place.make(1)
    place.make(2, strength=float("nan"))
    follow(place, work)


def test_a_champion_that_cannot_be_loaded_leaves_the_one_before_in_charge(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        place.crown(2, previous=1)
        await until(lambda: 2 in fleet.refused)
        assert (await answer(fleet, engine, "ana"))[0] == 1

    place.make(1)
    place.make(2, strength=float("inf"))
    follow(place, work)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CHAMPION, '{"version": "two"'),
        (CHAMPION, "null"),
        (CHAMPION, None),
        (ROLLOUT, "\0garbage"),
        (ROLLOUT, "[]"),
        (ROLLOUT, "a step that there is not"),
    ],
)
def test_a_file_that_is_garbage_or_gone_changes_nothing_and_is_said_once(
    name: str | Path, text: str | None, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        place.roll_out(2, champion=1, share=0.5)
        await until(lambda: fleet.table.challenger == 2)
        table, path = fleet.table, place.root / name
        if text is None:
            path.unlink()
        else:
            new = path.read_text().replace('"step": 0', '"step": 7') if "step" in text else text
            write_bytes(path, [new.encode()])  # whole: half of it would be another fault
        await until(lambda: path.name in caplog.text)
        await asyncio.sleep(0.3)
        assert fleet.table == table and len(caplog.records) == 1
        assert (await answer(fleet, engine, "ana"))[0] in (1, 2)

    place.make(1)
    place.make(2)
    follow(place, work)


def test_a_rollout_file_that_is_garbage_from_the_start_keeps_no_champion_from_serving(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        await until(lambda: fleet.table.champion == 1)

    place.make(1)
    place.crown(1)
    place.roll_out(2, champion=1, share=0.5)
    (place.root / ROLLOUT).write_text("garbage")
    follow(place, work)


def test_the_predecessor_is_loaded_at_the_start_and_let_go_when_it_is_none_any_more(
    place: Place, tmp_path: Path
) -> None:
    repository = make_repository(tmp_path / "repository")
    shutil.copytree(place.root, repository, dirs_exist_ok=True)
    place.root = repository
    for version in (1, 2, 3):
        place.make(version)
        place.crown(version, previous=version - 1 or None)
        commit(repository, f"Promote v{version}")
    place.crown(2, previous=1)

    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        await until(lambda: place.state().get("loaded") == [1, 2])
        place.crown(3, previous=2)
        await until(lambda: place.state()["loaded"] == [2, 3])
        os.utime(next((repository / SERVING).glob("v1-*")), (0, 0))
        place.crown(3)
        await until(lambda: place.state()["loaded"] == [3])
        await until(lambda: not list((repository / SERVING).glob("v1-*")))

    follow(place, work)


def test_a_version_is_not_unloaded_while_a_request_holds_it(place: Place) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        place.crown(1)
        await until(lambda: fleet.table.champion == 1)
        async with fleet.hold(1):
            place.crown(2)
            await until(lambda: fleet.table.champion == 2)
            await asyncio.sleep(0.5)
            assert place.state()["loaded"] == [1, 2]
        await until(lambda: place.state()["loaded"] == [2])

    place.make(1)
    place.make(2)
    follow(place, work)
