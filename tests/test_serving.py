"""Versions made ready from git and the DVC cache, and the fleet that follows champion.json and the rollout. A real repository, the real engine."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from places import commit, make_repository, write_files
from safetensors.torch import load_file, save_file

from ratchet.champion import Champion, write_champion
from ratchet.config import Config
from ratchet.errors import BaseModelError, CheckoutError
from ratchet.examples import Message
from ratchet.gateway.engine import Ask, Piece
from ratchet.gateway.fleet import Fleet
from ratchet.gateway.local import LocalEngine
from ratchet.models import WEIGHTS, adapter_sha256
from ratchet.rollout import FILE, Rollout, position, write_rollout
from ratchet.serving import check_adapter, forget_bundles, make_bundle, read_state
from ratchet.workspace import dvc, git

PIPELINE = """
stages:
  base: {cmd: cp -r ../made/base models/base, outs: [models/base]}
  train: {cmd: cp -r ../made/candidate models/candidate, deps: [strength], outs: [models/candidate]}
"""
ASKED = (Message("user", "Which module documents this? Return the list of handlers."),)


class Made:
    """A repository with two trained versions, as a retraining leaves them."""

    def __init__(self, place: Path, base: Path, candidate: Path) -> None:
        self.root, self._made = make_repository(place / "repository"), place / "made"
        shutil.copytree(base, self._made / "base")
        shutil.copytree(candidate, self._made / "candidate")
        self.commits: dict[int, str] = {}
        self.hashes: dict[int, str] = {}
        for version, strength in ((1, 1.0), (2, -10.0), (3, float("nan"))):
            self._train(version, strength)

    def _train(self, version: int, strength: float) -> None:
        original = load_file(self._made / "candidate" / WEIGHTS)
        save_file({name: weight * strength if "lora_B" in name else weight for name, weight in original.items()}, self._made / "candidate" / WEIGHTS, metadata={"format": "pt"})
        params = f"evaluate:\n  max_new_tokens: {4 + version}\nan_older_key: 1\n"
        write_files(self.root, {"dvc.yaml": PIPELINE, "params.yaml": params, "strength": str(strength), "models/.gitignore": ""})
        dvc(self.root, "repro", "--quiet")
        self.commits[version] = commit(self.root, f"Train v{version}")
        self.hashes[version] = adapter_sha256(self.root / "models/candidate")

    def crown(self, version: int, previous: int | None = None) -> None:
        gate = {"verdict": "promote", "rival": None, "metric": "exact_match", "mean": 0.2, "low": 0.1, "high": 0.3}
        entry = Champion(
            "small", version, previous, self.commits[version], "key", "run", self.hashes[version], [], {}, gate, "2026-01-02T03:04:05Z", "Ana", "why", "promote", previous
        )
        write_champion(self.root, entry)
        commit(self.root, f"Promote v{version}")

    def roll_out(self, version: int, champion: int, share: float) -> None:
        write_rollout(self.root, Rollout("r1", "small", version, champion, self.commits[version], self.hashes[version], "salt", 0, [share, 1.0], "open", 0.0, 0.0))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, candidate: Path) -> Made:
    return Made(tmp_path_factory.mktemp("serving"), tiny_base, candidate)


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    copy = object.__new__(Made)
    copy.__dict__ = original.__dict__ | {"root": tmp_path / "repository"}
    shutil.copytree(original.root, copy.root, symlinks=True)
    return copy


def test_a_bundle_holds_the_adapter_its_base_and_the_settings_of_its_own_commit(made: Made) -> None:
    found = {version: make_bundle(made.root, name="small", version=version, commit=made.commits[version], adapter_sha256=made.hashes[version]) for version in (1, 2)}
    assert [adapter_sha256(found[version].adapter) for version in (1, 2)] == [made.hashes[1], made.hashes[2]]
    assert [found[version].generation.max_new_tokens for version in (1, 2)] == [5, 6]
    assert found[1].base == found[2].base and (found[1].base / "manifest.json").exists(), "one base for both"
    assert found[1].max_length == 256, "the context of the base"


def test_a_bundle_that_is_there_asks_neither_git_nor_dvc(made: Made) -> None:
    wanted = make_bundle(made.root, name="small", version=1, commit=made.commits[1], adapter_sha256=made.hashes[1])
    shutil.rmtree(made.root / ".git")
    assert make_bundle(made.root, name="small", version=1, commit=made.commits[1], adapter_sha256=made.hashes[1]) == wanted


def test_an_adapter_with_other_bytes_than_the_ledgers_leaves_nothing_behind(made: Made) -> None:
    with pytest.raises(BaseModelError, match="the ledger says ffffffffffff"):
        make_bundle(made.root, name="small", version=1, commit=made.commits[1], adapter_sha256="f" * 64)
    with pytest.raises(CheckoutError, match="the commit 00000000 cannot be read"):
        make_bundle(made.root, name="small", version=1, commit="0" * 40, adapter_sha256="f" * 64)
    assert not list((made.root / ".ratchet/serving").glob("*v1*"))


def test_pickled_files_and_code_of_a_models_own_are_refused(candidate: Path, tmp_path: Path) -> None:
    for name, text, words in (("training_args.bin", "x", "pickled files"), ("config.json", '{"auto_map": {"AutoModel": "evil.Model"}}', "code of its own")):
        folder = tmp_path / name
        shutil.copytree(candidate, folder)
        (folder / name).write_text(text)
        with pytest.raises(BaseModelError, match=words):
            check_adapter(folder, adapter_sha256(folder))


def test_old_bundles_are_forgotten_and_the_base_of_the_others_stays(made: Made) -> None:
    for version in (1, 2):
        make_bundle(made.root, name="small", version=version, commit=made.commits[version], adapter_sha256=made.hashes[version])
    forget_bundles(made.root, keep={2})
    left = make_bundle(made.root, name="small", version=2, commit=made.commits[2], adapter_sha256=made.hashes[2])
    assert left.base.exists() and not list((made.root / ".ratchet/serving").glob("v1-*"))


def follow(made: Made, work: Callable[[Fleet, LocalEngine], Awaitable[None]]) -> None:
    """`work` with a running fleet."""

    async def whole() -> None:
        engine = LocalEngine(Config())
        fleet = Fleet(made.root, Config(), engine)
        await fleet.start()
        try:
            await work(fleet, engine)
        finally:
            await fleet.close()
            await engine.close()

    asyncio.run(whole())


async def until(said: Callable[[], bool], seconds: float = 30.0) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not said():
        assert time.monotonic() - began < seconds, "it never came"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


async def answer(fleet: Fleet, engine: LocalEngine, unit: str) -> tuple[int, str]:
    choice = fleet.choose(unit)
    async with fleet.hold(choice.version):
        return choice.version, "".join([piece.text async for piece in engine.answer(Ask(unit, choice.version, ASKED)) if isinstance(piece, Piece)])


def test_a_promotion_and_a_rollback_reach_the_users_with_no_request_lost(made: Made) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        assert fleet.table.champion is None and "no version is in charge" in fleet.table.why
        made.crown(1)
        await until(lambda: fleet.table.champion == 1)
        answers = {1: (await answer(fleet, engine, "ana"))[1]}
        stop, failed, said = asyncio.Event(), list[str](), set[tuple[int, str]]()

        async def client(name: str) -> None:
            while not stop.is_set():
                said.add(await answer(fleet, engine, name))

        clients = [asyncio.create_task(client(f"user{number}")) for number in range(4)]
        made.crown(2, previous=1)
        await until(lambda: fleet.table.champion == 2)
        answers[2] = (await answer(fleet, engine, "ana"))[1]
        await asyncio.sleep(0.3)
        made.crown(1)
        back = await until(lambda: fleet.table.champion == 1)
        await asyncio.sleep(0.2)
        stop.set()
        await asyncio.gather(*clients)
        print(f"after the rollback's commit v1 answered within {back:.2f} s")
        assert failed == [] and said == set(answers.items()), "each answer is wholly its version's"
        assert answers[1] != answers[2]
        state = read_state(made.root)
        assert state is not None and state["champion"] == 1 and 2 in state["loaded"]

    follow(made, work)


def test_a_rollout_gives_each_user_one_arm_and_a_growing_share_takes_nobody_back(made: Made) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        made.crown(1)
        made.roll_out(2, champion=1, share=0.3)
        await until(lambda: fleet.table.challenger == 2)
        users = [f"user{number}" for number in range(2000)]
        first = {user for user in users if fleet.choose(user).arm == "challenger"}
        assert abs(len(first) / 2000 - 0.3) < 0.05
        assert first == {user for user in users if position("salt", user) < 0.3} and fleet.choose(users[0]) == fleet.choose(users[0])
        made.roll_out(2, champion=1, share=0.6)
        await until(lambda: fleet.table.share == 0.6)
        assert first < {user for user in users if fleet.choose(user).arm == "challenger"}
        (made.root / FILE).unlink()
        await until(lambda: fleet.table.challenger is None)
        assert {fleet.choose(user).version for user in users} == {1}

    follow(made, work)


def test_a_challenger_that_is_broken_is_refused_with_its_reason_and_the_champion_serves(made: Made) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        made.crown(1)
        made.roll_out(3, champion=1, share=0.9)
        await until(lambda: 3 in fleet.refused)
        await until(lambda: fleet.table.champion == 1)
        assert {fleet.choose(f"user{number}").version for number in range(50)} == {1}
        await until(lambda: bool((read_state(made.root) or {}).get("refused")))
        assert "not finite" in (read_state(made.root) or {})["refused"]["v3"]

    follow(made, work)


@pytest.mark.parametrize("name", ["champion.json", ".ratchet/rollout.json"])
def test_a_file_that_is_garbage_changes_nothing(name: str, made: Made, caplog: pytest.LogCaptureFixture) -> None:
    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        made.crown(1)
        await until(lambda: fleet.table.champion == 1)
        (made.root / name).write_text('{"version": "two"')
        await until(lambda: name.rpartition("/")[2] in caplog.text)
        assert fleet.table.champion == 1
        assert (await answer(fleet, engine, "ana"))[0] == 1

    follow(made, work)


def test_a_predecessor_stays_loaded_and_older_ones_go(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet.gateway.fleet.GRACE_SECONDS", 0.1)

    async def work(fleet: Fleet, engine: LocalEngine) -> None:
        made.crown(1)
        await until(lambda: fleet.table.champion == 1)
        made.crown(2, previous=1)
        await until(lambda: fleet.table.champion == 2)
        await asyncio.sleep(1.0)
        assert (read_state(made.root) or {})["loaded"] == [1, 2]
        made.crown(2, previous=None)
        await until(lambda: (read_state(made.root) or {})["loaded"] == [2])

    follow(made, work)


def test_git_and_dvc_leave_the_checkout_as_it_was(made: Made) -> None:
    make_bundle(made.root, name="small", version=1, commit=made.commits[1], adapter_sha256=made.hashes[1])
    assert git(made.root, "status", "--porcelain").strip() == ""
