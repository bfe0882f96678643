"""Which versions are loaded, and who gets which: the truth is read from champion.json and .ratchet/rollout.json, three times a second.

A new table takes the old one's place at once and whole. A version that left the table is unloaded when its last request ended;
the champion's predecessor stays loaded, so that a rollback needs no loading.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from ratchet.champion import FILE as CHAMPION
from ratchet.champion import Champion, last_entry, read_champion
from ratchet.config import Config
from ratchet.errors import RatchetError
from ratchet.gateway.engine import Engine
from ratchet.rollout import FILE as ROLLOUT
from ratchet.rollout import Rollout, position, read_rollout
from ratchet.serving import Bundle, forget_bundles, make_bundle, write_state

LOOK_SECONDS, AGAIN_SECONDS, GRACE_SECONDS = 0.3, 60.0, 5.0
NOBODY = "no version is in charge yet: `ratchet retrain` makes the first"
log = logging.getLogger("ratchet.gateway")


class Choice(NamedTuple):
    """Who answers a request, and for which arm of which rollout."""

    version: int
    arm: str  # "champion" or "challenger"
    rollout_id: str
    step: int


class Table(NamedTuple):
    """`why` says what is in the way while `champion` is None."""

    champion: int | None = None
    challenger: int | None = None
    share: float = 0.0
    salt: str = ""
    rollout_id: str = ""
    step: int = -1
    why: str = NOBODY


class Wanted(NamedTuple):
    """A version to serve, as the ledger or the rollout names it."""

    name: str
    version: int
    commit: str
    adapter_sha256: str


class Fleet:
    """For one event loop."""

    def __init__(self, root: Path, config: Config, engine: Engine) -> None:
        self._root, self._config, self._engine = root, config, engine
        self._table = Table()
        self._under_way: Counter[int] = Counter()
        self._loaded: dict[int, str] = {}  # version → its adapter's sha256
        self._left: dict[int, float] = {}  # version → when it left the table
        self._refused: dict[int, str] = {}
        self._seen: tuple[bytes, bytes] | None = None
        self._again = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def table(self) -> Table:
        return self._table

    @property
    def refused(self) -> dict[int, str]:
        return dict(self._refused)

    async def start(self) -> None:
        """Returns at once; the first version is loaded meanwhile."""
        self._task = asyncio.create_task(self._watch(), name="fleet")

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def choose(self, unit: str) -> Choice:
        """By the unit alone. Only where a champion is in charge."""
        table = self._table
        assert table.champion is not None, "callers ask the table first"
        if table.challenger is not None and position(table.salt, unit) < table.share:
            return Choice(table.challenger, "challenger", table.rollout_id, table.step)
        return Choice(table.champion, "champion", table.rollout_id, table.step)

    @contextlib.asynccontextmanager
    async def hold(self, version: int) -> AsyncIterator[None]:
        """While a request is under way its version is not unloaded."""
        self._under_way[version] += 1
        try:
            yield
        finally:
            self._under_way[version] -= 1

    async def _watch(self) -> None:
        while True:
            try:
                await self.refresh()
            except (RatchetError, OSError) as error:
                self._fault(str(error))
            await asyncio.sleep(LOOK_SECONDS)

    async def refresh(self) -> None:
        """Read what is wanted, load it, swap. Nothing is done while both files stay as they are and nothing waits."""
        seen = (_content(self._root / CHAMPION), _content(self._root / ROLLOUT))
        changed = seen != self._seen
        if changed or (self._again and time.monotonic() >= self._again):
            self._seen, self._again = seen, 0.0
            if changed:
                self._refused = {}
            await self._follow()
        await self._unload_left()

    async def _follow(self) -> None:
        champion = read_champion(self._root)
        if champion is None:
            self._table = Table()
            return
        if self._table.champion is None:
            self._table = Table(why=f"v{champion.version} is being loaded")
        rollout = self._rollout_of(champion)
        if not await self._load(_of_champion(champion)):
            self._table = self._table._replace(why=f"v{champion.version} is in charge and cannot be loaded: {self._refused.get(champion.version)}")
            self._tell()
            return
        challenger = rollout if rollout and await self._load(_of_rollout(rollout)) else None
        self._swap(champion, challenger)
        await self._keep_predecessor(champion)
        await asyncio.to_thread(forget_bundles, self._root, set(self._loaded))
        self._tell()

    def _rollout_of(self, champion: Champion) -> Rollout | None:
        """One against another champion than today's waits for the flow to end it; a file that is none leaves everybody with the champion."""
        try:
            rollout = read_rollout(self._root)
        except RatchetError as error:
            self._fault(str(error))
            return None
        return rollout if rollout and rollout.champion == champion.version else None

    def _swap(self, champion: Champion, rollout: Rollout | None) -> None:
        before = {version for version in (self._table.champion, self._table.challenger) if version is not None}
        if rollout and rollout.state == "open":  # while it is paused, requests count for no arm
            self._table = Table(champion.version, rollout.version, rollout.share, rollout.salt, rollout.id, rollout.step, "")
        else:
            self._table = Table(champion.version, why="")
        for version in before - {self._table.champion, self._table.challenger}:
            self._left[version] = time.monotonic()
        log.info("v%d answers%s", champion.version, f", v{rollout.version} {rollout.share:.0%} of the users" if rollout else "")

    async def _load(self, wanted: Wanted) -> bool:
        """Whether it is loaded. A failure is remembered with its reason, and tried again later in case it passes."""
        self._left.pop(wanted.version, None)
        if self._loaded.get(wanted.version) == wanted.adapter_sha256:
            return True
        try:
            bundle: Bundle = await asyncio.to_thread(make_bundle, self._root, **wanted._asdict())
            await self._engine.load(bundle)
        except (RatchetError, OSError) as error:
            self._refused[wanted.version] = str(error)
            self._again = time.monotonic() + AGAIN_SECONDS
            self._fault(f"v{wanted.version} is refused: {error}")
            return False
        self._loaded[wanted.version] = wanted.adapter_sha256
        return True

    async def _keep_predecessor(self, champion: Champion) -> None:
        if champion.previous is None or champion.previous in self._loaded:
            return
        entry = await asyncio.to_thread(last_entry, self._root, champion.previous)
        if entry and await self._load(_of_champion(entry)):
            log.info("v%d stays ready for a rollback", entry.version)

    async def _unload_left(self) -> None:
        """The grace is for requests that have chosen a version and not yet taken hold of it."""
        for version, since in list(self._left.items()):
            if self._under_way[version] or time.monotonic() - since < GRACE_SECONDS or version == self._predecessor():
                continue
            del self._left[version]
            if self._loaded.pop(version, None):
                await self._engine.unload(version)
                self._tell()

    def _predecessor(self) -> int | None:
        try:
            champion = read_champion(self._root)
        except RatchetError:
            return None
        return champion.previous if champion else None

    def _tell(self) -> None:
        table = self._table
        state = {
            "champion": table.champion,
            "challenger": table.challenger,
            "share": table.share,
            "loaded": sorted(self._loaded),
            "refused": {f"v{version}": why for version, why in sorted(self._refused.items())},
            "rollout": table.rollout_id,
        }
        write_state(self._root, state)

    def _fault(self, message: str) -> None:
        if self._table.champion is None:
            self._table = Table(why=message)
        log.warning("%s", message.replace("\n", " "))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _of_champion(champion: Champion) -> Wanted:
    return Wanted(champion.name, champion.version, champion.commit, champion.adapter_sha256)


def _of_rollout(rollout: Rollout) -> Wanted:
    return Wanted(rollout.name, rollout.version, rollout.commit, rollout.adapter_sha256)
