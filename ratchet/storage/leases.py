"""Hold a lock as a lease in the shared database: it ends by itself when its holder is gone.

Each holder gets a token that is higher than all before it. A thread renews the lease; a process that was
paused for longer than the lease finds that the token has moved on, and everything that it still tries to
write is refused (fencing). Times are the database's own, so clocks of machines do not matter.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ratchet.errors import LeaseError, ServiceError
from ratchet.storage.database import Database, clock

if TYPE_CHECKING:
    from sqlalchemy import Connection

SECONDS = 30.0  # after which a lease that nobody renews is free
RENEWALS = 3  # in that time
POLL_SECONDS, MOST_SECONDS = 0.2, 2.0  # between two tries for a lease that another process holds


@dataclass(frozen=True)
class Lease:
    database: Database
    name: str
    token: int


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, and for how many more seconds if it is not renewed."""

    name: str
    seconds: float


_held: ContextVar[tuple[Lease, ...]] = ContextVar("held", default=())


class TakenError(Exception):
    """Another process holds the lease."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(f"{holder.name} holds it for {holder.seconds:.0f} s more, or longer")
        self.holder = holder


@contextmanager
def hold(database: Database, name: str, *, wait: bool) -> Iterator[Lease]:
    """Hold the lease while the block runs.

    Raises TakenError if another process holds it and `wait` is False, ServiceError.
    """
    pause = POLL_SECONDS
    while (found := _take(database, name)) is None or isinstance(found, Holder):
        if found is not None and not wait:
            raise TakenError(found)
        time.sleep(pause)
        pause = min(1.5 * pause, MOST_SECONDS)
    lease, ended = found, threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, ended), name=f"lease {name}", daemon=True)
    renewing.start()
    before = _held.get()
    _held.set((*before, lease))
    try:
        yield lease
    finally:
        _held.set(before)
        ended.set()
        _give_back(lease)


def check_held(connection: Connection, database: Database) -> None:
    """Check that the leases of the caller are still its own, until the transaction ends.

    Raises LeaseError.
    """
    from sqlalchemy import select

    table = database.tables["leases"]
    for lease in [lease for lease in _held.get() if lease.database is database]:
        token = connection.execute(
            select(table.c.token).where(table.c.name == lease.name).with_for_update(read=True)
        ).scalar_one_or_none()
        if token != lease.token:
            raise LeaseError(
                f"this process held `{lease.name}` and was away for longer than {SECONDS:.0f} s; "
                "another process has taken over, and nothing was written",
                remedy="run the command again",
            )


def require_held() -> None:
    """Check the caller's leases before a step outside the database. Raises LeaseError, ServiceError."""
    for database in {lease.database for lease in _held.get()}:
        with database.transaction() as connection:
            check_held(connection, database)


def _take(database: Database, name: str) -> Lease | Holder | None:
    """Take the lease if it is free; otherwise return its holder, or None if that is just changing."""
    from sqlalchemy import select
    from sqlalchemy.dialects.postgresql import insert

    table = database.tables["leases"]
    me = f"{socket.gethostname()}, process {os.getpid()}"
    until = clock() + SECONDS
    taken = (
        insert(table)
        .values(name=name, token=1, holder=me, until=until)
        .on_conflict_do_update(
            index_elements=["name"],
            set_={"token": table.c.token + 1, "holder": me, "until": until},
            where=(table.c.until < clock()) | (table.c.holder == ""),
        )
        .returning(table.c.token)
    )
    with database.transaction() as connection:
        token = connection.execute(taken).scalar_one_or_none()
        if token is not None:
            return Lease(database, name, token)
        row = connection.execute(
            select(table.c.holder, (table.c.until - clock()).label("seconds")).where(table.c.name == name)
        ).one()
    return Holder(row.holder, max(0.0, float(row.seconds))) if row.holder else None


def _renew(lease: Lease, ended: threading.Event) -> None:
    """Renew the lease until it ends; while the database does not answer, try again more often."""
    table, pause = lease.database.tables["leases"], SECONDS / RENEWALS
    while not ended.wait(pause):
        try:
            with lease.database.transaction() as connection:
                kept = connection.execute(
                    table.update()
                    .where(table.c.name == lease.name, table.c.token == lease.token, table.c.holder != "")
                    .values(until=clock() + SECONDS)
                ).rowcount
        except ServiceError:
            pause = SECONDS / RENEWALS / 5
            continue
        pause = SECONDS / RENEWALS
        if not kept:
            return  # lost: `check_held` says so at the next write


def _give_back(lease: Lease) -> None:
    """Free the lease; if the database does not answer, it ends by itself."""
    table = lease.database.tables["leases"]
    try:
        with lease.database.transaction() as connection:
            connection.execute(
                table.update()
                .where(table.c.name == lease.name, table.c.token == lease.token)
                .values(holder="", until=clock())
            )
    except ServiceError:
        pass
