"""Open the shared database that `storage.url` names. Without it the project's state is in `.ratchet`.

One database belongs to one project: the first process that opens it writes the project's name into it.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratchet.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine, Table

URL_VARIABLE = "RATCHET_STORAGE_URL"
CONNECT_SECONDS = 5
# A database whose machine vanishes sends no error. Without these limits a connection waits for the kernel's
# timeout of a quarter of an hour.
STAY_AWAKE = {
    "tcp_user_timeout": 5000,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}  # milliseconds, seconds
CREATION = 7_160_294_018  # the advisory lock under which tables are made, so that two starts do not collide
PROJECT, MOVED, MOVING = "project", "moved to", "moving"  # names in the table `about`

_opened: dict[tuple[str, str], Database] = {}
_lock = threading.Lock()


class Database:
    """A project's shared database, safe for several threads. Nothing is connected before the first query."""

    def __init__(self, url: str, project: str) -> None:
        """Prepare connections. Raises ConfigError without PostgreSQL's driver."""
        self.url, self.project = url, project
        try:
            self.engine = connect(url)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"storage.url needs the package {error.name}", remedy="pip install 'ratchet[store]' brings it"
            ) from None
        self.tables = define_tables()
        self._ready = False

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction.

        Raises ServiceError while the database does not answer, ConfigError when it is another project's or
        its content was moved elsewhere.
        """
        with answering(self.url):
            if not self._ready:
                with self.engine.begin() as connection:
                    make_tables(connection, self.tables)
                    _claim(connection, self.tables["about"], self.project, self.url)
                self._ready = True
            with self.engine.begin() as connection:
                yield connection


@contextmanager
def answering(url: str) -> Iterator[None]:
    """Turn SQLAlchemy's errors into a ServiceError that names the database without its password."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        cause = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
        raise ServiceError(
            f"the shared storage {shown(url)} cannot be used: {cause}",
            remedy="start it; storage.url in params.yaml (or RATCHET_STORAGE_URL) says where it is",
        ) from error


def find_database(root: Path) -> Database | None:
    """Return the project's shared database; None where its state is in files.

    Raises ConfigError for a malformed `storage.url`, or one that is no PostgreSQL.
    """
    url, project = find_url(root)
    return open_database(url, project) if url else None


def open_database(url: str, project: str) -> Database:
    """Return the one Database object of this process for a URL and a project."""
    with _lock:
        if (url, project) not in _opened:
            _opened[url, project] = Database(url, project)
        return _opened[url, project]


@atexit.register
def close_databases() -> None:
    """Close this process's connections to shared databases; the next use opens them anew."""
    with _lock:
        for database in _opened.values():
            database.engine.dispose()
        _opened.clear()


def find_url(root: Path) -> tuple[str, str]:
    """Return the URL of the shared storage, empty for files, and the project's name."""
    path, given = root / "params.yaml", os.environ.get(URL_VARIABLE, "")
    try:
        stat = path.stat()
    except OSError:
        version = None
    else:
        version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return _read_settings(path, version, given)


@lru_cache(maxsize=64)
def _read_settings(path: Path, version: tuple[int, ...] | None, given: str) -> tuple[str, str]:
    """Read `storage.url` and the project's name; `version` tells a changed file from the one read before.

    Most projects keep their state in files; for those the settings' types, slow to import, are not loaded.
    """
    if not given and (version is None or b"storage" not in path.read_bytes()):
        return "", ""
    from ratchet.config.params import Config, load_config

    config = load_config(path) if version else Config()
    url = given or config.storage.url
    return (complete(url) if url else ""), config.project.name


def complete(url: str) -> str:
    """Return a URL with the driver that we bring. Raises ConfigError: malformed, or no PostgreSQL."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "storage.url is no SQLAlchemy URL", remedy="such as postgresql+psycopg://user@host/claims"
        ) from None
    if parsed.drivername == "postgres":  # as some hosts write it
        parsed = parsed.set(drivername="postgresql")
    if parsed.get_backend_name() != "postgresql":
        raise ConfigError(
            f"storage.url names {parsed.get_backend_name()}, and only PostgreSQL keeps shared state",
            remedy="such as postgresql+psycopg://user@host/claims; empty: files in .ratchet",
        )
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return parsed.render_as_string(hide_password=False)


def shown(url: str) -> str:
    """Return a URL as messages show it, without the password."""
    from sqlalchemy import make_url

    return make_url(url).render_as_string(hide_password=True)


def connect(url: str) -> Engine:
    """Make an engine of PostgreSQL that notices a vanished server. Raises ModuleNotFoundError: no driver."""
    from sqlalchemy import create_engine

    return create_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=CONNECT_SECONDS,
        connect_args={"connect_timeout": CONNECT_SECONDS, **STAY_AWAKE},
    )


def define_tables() -> dict[str, Table]:
    from sqlalchemy import BigInteger, Column, Float, LargeBinary, MetaData, String, Table

    metadata = MetaData()
    tables = [
        Table("about", metadata, Column("name", String, primary_key=True), Column("value", String)),
        Table(
            "documents",
            metadata,
            Column("name", String, primary_key=True),
            Column("body", LargeBinary, nullable=False),
            Column("at", Float, nullable=False),  # seconds since 1970, by the database's clock
        ),
        Table(
            "leases",
            metadata,
            Column("name", String, primary_key=True),
            Column("token", BigInteger, nullable=False),  # grows with each holder
            Column("holder", String, nullable=False),  # empty: nobody
            Column("until", Float, nullable=False),
        ),
    ]
    return {table.name: table for table in tables}


def make_tables(connection: Connection, tables: dict[str, Table]) -> None:
    from sqlalchemy import func, select

    connection.execute(select(func.pg_advisory_xact_lock(CREATION)))
    next(iter(tables.values())).metadata.create_all(connection)


def clock() -> Any:
    """Return the SQL expression of the database's time, in seconds since 1970."""
    from sqlalchemy import func

    return func.extract("epoch", func.clock_timestamp())


def _claim(connection: Connection, about: Table, project: str, url: str) -> None:
    from sqlalchemy import select

    known = {row.name: row.value for row in connection.execute(select(about))}
    if PROJECT not in known:
        connection.execute(about.insert().values(name=PROJECT, value=project))
    elif known[PROJECT] != project:
        raise ConfigError(
            f"the database {shown(url)} belongs to the project {known[PROJECT]!r}, this one is {project!r}",
            remedy="make a database for each project (createdb), and name it in storage.url",
        )
    if MOVED in known:
        raise ConfigError(
            f"the state of {project} was moved from {shown(url)} to {known[MOVED]}",
            remedy="bring this checkout's params.yaml up to date (git pull), or RATCHET_STORAGE_URL",
        )
