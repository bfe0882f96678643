"""Load versions, and choose the one that answers a request, as champion.json and .ratchet/rollout.json say;
both are read three times a second, from files or from the database that several gateways share.

Two loops: one watches them and replaces the routing table in one step; the other loads missing versions
and unloads unused ones. The champion's predecessor stays loaded, so that a rollback waits for no loading. If
one cannot be read or a version cannot be loaded, the last good table stays in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.errors import CheckoutError, RatchetError, ServiceError
from ratchet.promotion.champion import FILE as CHAMPION
from ratchet.promotion.champion import Champion, decode_champion, last_entry
from ratchet.promotion.rollout import FILE as ROLLOUT
from ratchet.promotion.rollout import Rollout, decode_rollout, position
from ratchet.serving.bundle import (
    SAY_SECONDS,
    ServingState,
    drop_state,
    forget_bundles,
    make_bundle,
    write_state,
)
from ratchet.serving.engine import Engine
from ratchet.storage.database import find_database
from ratchet.storage.documents import read_documents

# Between two looks at the files; before a failed load is repeated; before an unused version is unloaded.
LOOK_SECONDS, AGAIN_SECONDS, GRACE_SECONDS = 0.3, 60.0, 5.0
NOBODY = "no version is in charge yet: `ratchet retrain` makes the first"
log = logging.getLogger("ratchet.gateway")


class Choice(NamedTuple):
    """The version that answers a request, and the arm, rollout and step for which it does."""

    version: int
    arm: str  # as in the request log
    rollout_id: str
    step: int


class Table(NamedTuple):
    """Who answers, and the challenger's share of the users; `why`: the reason if `champion` is None."""

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


class Refusal(NamedTuple):
    why: str
    until: float  # when it is tried again, on the monotonic clock
    since: float  # when it failed first, in seconds since 1970


class Fleet:
    """The loaded versions and the routing to them, for one event loop."""

    def __init__(self, root: Path, config: Config, engine: Engine) -> None:
        self._root, self._engine = root, engine
        self._table = Table()
        self._name = f"{socket.gethostname()}-{config.gateway.port}"  # among gateways that share a database
        self._seen: tuple[bytes | None, bytes | None] | None = None
        self._champion: Champion | None = None  # as last read without an error
        self._rollout: Rollout | None = None
        self._entries: dict[int, Wanted | None] = {}  # predecessors, from the ledger
        self._loaded: dict[int, str] = {}  # version → its adapter's sha256
        self._refused: dict[Wanted, Refusal] = {}
        self._under_way: Counter[int] = Counter()
        self._left: dict[int, float] = {}  # version → since when nobody wants it
        self._told: ServingState | None = None
        self._told_at = 0.0  # on the monotonic clock
        self._faults: list[str] = []  # met since the files last changed
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def table(self) -> Table:
        return self._table

    @property
    def refused(self) -> dict[int, str]:
        return {wanted.version: refusal.why for wanted, refusal in self._refused.items()}

    async def start(self) -> None:
        """Start the fleet and return at once; the first version is loaded in the background."""
        self._tasks = [
            asyncio.create_task(self._repeat(work), name=f"fleet {work.__name__}")
            for work in (self._watch, self._tend)
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(drop_state, self._root, self._name)

    def choose(self, unit: str) -> Choice:
        """Choose the version that answers, by `unit` (a user or a request) alone.

        Raises ServiceError while nobody is in charge.
        """
        table = self._table
        if table.champion is None:
            raise ServiceError(
                table.why,
                remedy="try again in a few seconds; `ratchet status` tells which version is in charge",
            )
        if table.challenger is not None and position(table.salt, unit) < table.share:
            return Choice(table.challenger, "challenger", table.rollout_id, table.step)
        return Choice(table.champion, "champion", table.rollout_id, table.step)

    @contextlib.asynccontextmanager
    async def hold(self, version: int) -> AsyncIterator[None]:
        """Keep the version loaded while a request is under way."""
        self._under_way[version] += 1
        try:
            yield
        finally:
            self._under_way[version] -= 1

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except (RatchetError, OSError) as error:
                self._warn(str(error))
            except Exception as error:  # noqa: BLE001  (logged; the loop goes on)
                self._warn(f"the fleet goes on after {error!r}", trace=True)
            await asyncio.sleep(LOOK_SECONDS)

    # --- watching: nothing here takes long ------------------------------------------------------------------

    async def _watch(self) -> None:
        try:
            seen = await asyncio.to_thread(_read_documents, self._root)
        except ServiceError as error:  # the last good table stays in use
            self._warn(str(error))
            self._swap()
            return
        if seen != self._seen:
            self._seen, self._faults, self._entries = seen, [], {}
            self._read(*seen)
        self._swap()
        await self._tell()

    def _read(self, champion_json: bytes | None, rollout_json: bytes | None) -> None:
        """Read champion.json and the rollout.

        A document that cannot be read changes nothing. Nor does a missing champion.json, since git removes
        the file for a moment when it replaces it.
        """
        try:
            champion = None if champion_json is None else decode_champion(champion_json, CHAMPION)
            if champion is None and self._champion:
                self._warn(
                    f"{CHAMPION} is gone, v{self._champion.version} answers on; git checkout HEAD --"
                    f" {CHAMPION}"
                )
            self._champion = champion or self._champion
        except RatchetError as error:
            self._warn(str(error))
        try:
            rollout = decode_rollout(self._root, rollout_json)
            if rollout and not 0 <= rollout.step < len(rollout.shares):
                raise CheckoutError(
                    f"{ROLLOUT} is at step {rollout.step} of {len(rollout.shares)}",
                    remedy="remove it: the champion answers everybody",
                )
            self._rollout = rollout
        except RatchetError as error:
            self._warn(str(error))

    def _swap(self) -> None:
        """Put the wanted versions that are loaded into the table.

        A rollout is valid only against its own champion: after a promotion or a rollback, its challenger gets
        no requests, until the flow ends the rollout.
        """
        champion, rollout = self._champion, self._rollout
        serving = champion.version if champion and self._has(_of_champion(champion)) else self._table.champion
        if serving is None:
            table = Table(why=self._what_is_in_the_way(champion))
        elif (
            rollout
            and rollout.state == "open"
            and rollout.champion == serving
            and self._has(_of_rollout(rollout))
        ):
            table = Table(serving, rollout.version, rollout.share, rollout.salt, rollout.id, rollout.step, "")
        else:  # while a rollout is paused, requests count for no arm
            table = Table(serving, why="")
        if table != self._table:
            self._table = table
            log.info("%s", _describe(table))

    def _what_is_in_the_way(self, champion: Champion | None) -> str:
        if champion is None:
            return self._faults[-1] if self._faults else NOBODY
        refusal = self._refused.get(_of_champion(champion))
        return (
            f"v{champion.version} is in charge and cannot be loaded: {refusal.why}"
            if refusal
            else f"v{champion.version} is being loaded"
        )

    async def _tell(self) -> None:
        table = self._table
        state = ServingState(
            table.champion,
            table.challenger,
            table.share,
            table.rollout_id,
            sorted(self._loaded),
            {f"v{version}": why for version, why in sorted(self.refused.items())},
            {f"v{one.version}": refusal.since for one, refusal in self._refused.items()},
        )
        shared = find_database(self._root) is not None
        if state != self._told or (shared and time.monotonic() - self._told_at >= SAY_SECONDS):
            written = msgspec.structs.replace(state, at=time.time())
            await asyncio.to_thread(write_state, self._root, written, self._name)
            self._told, self._told_at = state, time.monotonic()

    # --- tending: may take long -----------------------------------------------------------------------------

    async def _tend(self) -> None:
        seen, before, champion = self._seen, set(self._loaded), self._champion
        wanted = await self._wanted()
        self._refused = {one: refusal for one, refusal in self._refused.items() if one in wanted}
        for one in wanted:
            if self._seen is seen:  # otherwise other versions may be wanted by now
                await self._load(one)
        kept = {one.version for one in wanted} | (
            {champion.previous} if champion and champion.previous is not None else set()
        )
        await self._unload(kept)
        if set(self._loaded) != before:
            await asyncio.to_thread(forget_bundles, self._root, {*self._loaded, *kept})

    async def _wanted(self) -> list[Wanted]:
        """Return those of the champion, the challenger and the champion's predecessor that exist."""
        champion, rollout = self._champion, self._rollout
        if champion is None:
            return []
        found = [_of_champion(champion)]
        if rollout and rollout.champion == champion.version:
            found.append(_of_rollout(rollout))
        if champion.previous is not None and (entry := await self._find_predecessor(champion.previous)):
            found.append(entry)
        return found

    async def _find_predecessor(self, version: int) -> Wanted | None:
        """Return what to load for an earlier version, by the ledger; None if the ledger cannot tell.

        The ledger is read again only when the files change.
        """
        if version not in self._entries:
            self._entries[version] = None
            try:
                entry = await asyncio.to_thread(last_entry, self._root, version)
            except RatchetError as error:
                self._warn(str(error))
                return None
            self._entries[version] = _of_champion(entry) if entry else None
        return self._entries[version]

    async def _load(self, wanted: Wanted) -> None:
        """Load a version; after a failure, keep the reason, and try again later, since it may pass."""
        refusal = self._refused.get(wanted)
        if self._has(wanted) or (refusal and time.monotonic() < refusal.until):
            return
        try:
            bundle = await asyncio.to_thread(make_bundle, self._root, **wanted._asdict())
            await self._engine.load(bundle)
        except Exception as error:  # noqa: BLE001  (it is recorded as the reason)
            why = str(error) if isinstance(error, RatchetError | OSError) else repr(error)
            self._refused[wanted] = Refusal(
                why, time.monotonic() + AGAIN_SECONDS, refusal.since if refusal else time.time()
            )
            log.warning("v%d is refused: %s", wanted.version, _one_line(why))
            return
        self._loaded[wanted.version] = wanted.adapter_sha256
        self._refused.pop(wanted, None)
        self._swap()

    async def _unload(self, wanted: set[int]) -> None:
        """Unload versions that are not wanted and answer no request.

        The grace period is for requests that have chosen a version but do not hold it yet.
        """
        needed, now = (
            wanted
            | {version for version in (self._table.champion, self._table.challenger) if version is not None},
            time.monotonic(),
        )
        self._left = {
            version: self._left.get(version, now) for version in self._loaded if version not in needed
        }
        for version, since in self._left.items():
            if version in (self._table.champion, self._table.challenger):
                continue  # it took charge while another version was being unloaded
            if not self._under_way[version] and now - since >= GRACE_SECONDS:
                del self._loaded[version]
                del self._under_way[version]
                await self._engine.unload(version)

    def _has(self, wanted: Wanted) -> bool:
        return self._loaded.get(wanted.version) == wanted.adapter_sha256

    def _warn(self, message: str, *, trace: bool = False) -> None:
        """Log a warning, but not again until the files change."""
        if message not in self._faults:
            self._faults.append(message)
            log.warning("%s", _one_line(message), exc_info=trace)


def _read_documents(root: Path) -> tuple[bytes | None, bytes | None]:
    """Read champion.json and the rollout; until a champion was published, the checkout's own file counts."""
    found = read_documents(root, [Path(CHAMPION), ROLLOUT])
    champion = found[Path(CHAMPION)]
    if champion is None and (root / CHAMPION).exists():
        champion = (root / CHAMPION).read_bytes()
    return champion, found[ROLLOUT]


def _describe(table: Table) -> str:
    if table.champion is None:
        return _one_line(table.why)
    return f"v{table.champion} answers" + (
        f", v{table.challenger} {table.share:.0%} of the users" if table.challenger is not None else ""
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _of_champion(champion: Champion) -> Wanted:
    return Wanted(champion.name, champion.version, champion.commit, champion.adapter_sha256)


def _of_rollout(rollout: Rollout) -> Wanted:
    return Wanted(rollout.name, rollout.version, rollout.commit, rollout.adapter_sha256)
