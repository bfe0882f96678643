"""The review's tables, in `.ratchet/review.db` or the shared database, and transactions that raise our own
errors.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.errors import ServiceError
from ratchet.storage.database import find_database, make_tables, shown

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

FILE = Path(".ratchet/review.db")


class Store:
    """The review database, safe for several threads and processes.

    The first transaction creates the tables.
    """

    def __init__(self, root: Path) -> None:
        """Open the database. Raises ConfigError for a malformed `storage.url`."""
        self._shared = find_database(root)
        if self._shared:
            self._engine, self._name, tables = self._shared.engine, shown(self._shared.url), shared_tables()
        else:
            self._engine, self._name, tables = make_engine(root / FILE), str(FILE), file_tables()
        self.items, self.decisions, self.history, self.taken = (
            tables[name] for name in ("items", "decisions", "history", "taken")
        )
        self._ready = False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction. Raises ServiceError if the database cannot be used."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            if not self._ready:
                self._make_tables()
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            cause = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
            raise ServiceError(
                f"{self._name} cannot be used: {cause}",
                remedy="start the database" if self._shared else "check the file and the room on the disk",
            ) from error

    def _make_tables(self) -> None:
        """Create missing tables by CREATE TABLE IF NOT EXISTS, which is atomic.

        `metadata.create_all` checks first, so another process may create a table in between.
        """
        from sqlalchemy.schema import CreateTable

        if self._shared:
            with self._shared.transaction() as connection:  # it also checks whose database it is
                make_tables(connection, {"items": self.items})
            self._ready = True
            return
        with self._engine.begin() as connection:
            for table in self.items.metadata.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
        self._ready = True

    def insert(self, table: Table) -> Any:
        """Begin an INSERT with this database's ON CONFLICT."""
        from sqlalchemy.dialects import postgresql, sqlite

        return postgresql.insert(table) if self._shared else sqlite.insert(table)

    def close(self) -> None:
        if not self._shared:  # other parts of this process use the shared one
            self._engine.dispose()


def make_engine(path: Path) -> Engine:
    """Make an engine on a SQLite file, which is made if there is none."""
    from sqlalchemy import create_engine, event

    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # people's rows; SQLite gives its other files the same mode
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _settle(connection: Any, _record: Any) -> None:
        # Decisions are few and cost people's time: unlike request records, each is synced to disk at once.
        connection.execute("PRAGMA busy_timeout=5000")
        connection.execute("PRAGMA synchronous=FULL")
        # The file keeps this mode. "Locked" means that another connection is setting it; SQLite does not wait
        # for that.
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode=WAL")

    return engine


def file_tables() -> dict[str, Table]:
    """Return the tables as the file names them."""
    return _make_tables()


def shared_tables() -> dict[str, Table]:
    """Return the tables as the shared database names them."""
    return _make_tables("review_")


def _make_tables(prefix: str = "") -> dict[str, Table]:
    from sqlalchemy import Column, Integer, MetaData, String, Table, Text, UniqueConstraint

    metadata = MetaData()

    def said() -> list[Any]:
        return [Column(name, String) for name in ("verdict", "by", "at")] + [
            Column(name, Text) for name in ("messages", "why")
        ]

    place: list[Any] = [Column("place", Integer, primary_key=True), Column("draft", String)]
    flags: list[Any] = [
        Column("kind", String),
        Column("doubtful", Integer),
        Column("sampled", Integer),
        Column("body", Text),
    ]
    tables = [
        Table(
            f"{prefix}items", metadata, *place, Column("id", String), *flags, UniqueConstraint("draft", "id")
        ),
        Table(
            f"{prefix}decisions",
            metadata,
            Column("draft", String, primary_key=True),
            Column("item", String, primary_key=True),
            *said(),
        ),
        Table(
            f"{prefix}history",
            metadata,
            Column("place", Integer, primary_key=True),
            Column("draft", String),
            Column("item", String),
            *said(),
        ),
        Table(
            f"{prefix}taken",
            metadata,
            Column("draft", String, primary_key=True),
            *(Column(name, String) for name in ("batch", "content", "at")),
        ),
    ]
    return {table.name.removeprefix(prefix): table for table in tables}
