"""The database `.ratchet/review.db`: its tables, and transactions that raise our own errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.errors import ServiceError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

FILE = Path(".ratchet/review.db")


class Store:
    """The review database, safe for several threads and processes.

    The first transaction creates the tables.
    """

    def __init__(self, root: Path) -> None:
        path = root / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # people's rows; SQLite gives its other files the same mode
        self._engine, tables = _make_engine(path), _make_tables()
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
                f"{FILE} cannot be used: {cause}", remedy="check the file and the room on the disk"
            ) from error

    def _make_tables(self) -> None:
        """Create missing tables by CREATE TABLE IF NOT EXISTS, which is atomic.

        `metadata.create_all` checks first, so another process may create a table in between.
        """
        from sqlalchemy.schema import CreateTable

        with self._engine.begin() as connection:
            for table in self.items.metadata.sorted_tables:
                connection.execute(CreateTable(table, if_not_exists=True))
        self._ready = True

    def close(self) -> None:
        self._engine.dispose()


def _make_engine(path: Path) -> Engine:
    from sqlalchemy import create_engine, event

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


def _make_tables() -> dict[str, Table]:
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
        Table("items", metadata, *place, Column("id", String), *flags, UniqueConstraint("draft", "id")),
        Table(
            "decisions",
            metadata,
            Column("draft", String, primary_key=True),
            Column("item", String, primary_key=True),
            *said(),
        ),
        Table(
            "history",
            metadata,
            Column("place", Integer, primary_key=True),
            Column("draft", String),
            Column("item", String),
            *said(),
        ),
        Table(
            "taken",
            metadata,
            Column("draft", String, primary_key=True),
            *(Column(name, String) for name in ("batch", "content", "at")),
        ),
    ]
    return {table.name: table for table in tables}
