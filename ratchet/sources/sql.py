"""Rows of a database: the result of one query, by SQLAlchemy.

The password comes only from RATCHET_SQL_PASSWORD, because addresses stand in params.yaml, commits and logs.
The transaction is never committed, so the database rolls back what a query changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ratchet.data.examples import RawRow
from ratchet.errors import ConfigError, DataError
from ratchet.sources.tables import Table

if TYPE_CHECKING:
    from sqlalchemy import URL

PASSWORD = "RATCHET_SQL_PASSWORD"  # noqa: S105
AT_ONCE = 1000  # rows fetched together
SQLITE = "sqlite"


def is_database(url: str) -> bool:
    """Tell whether a URL's scheme is one of SQLAlchemy's databases, with or without a driver."""
    scheme = url.partition("://")[0].partition("+")[0] if "://" in url else ""
    return scheme in (SQLITE, "postgresql", "mysql", "mariadb", "mssql", "oracle", "duckdb", "snowflake")


def read_query(url: str, query: str, root: Path) -> Table:
    """Run the query; a relative path of SQLite counts from `root`.

    Raises ConfigError for an empty query, an address that cannot be used, or one with a password; DataError
    for an error of the database.
    """
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if not query.strip():
        raise ConfigError(
            f"`ingest.sql.query` is empty, wanted one for {address(url)}",
            remedy="--query 'SELECT question AS prompt, answer AS completion FROM tickets'",
        )
    place = _place(url, root)
    try:
        engine = create_engine(place)
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise ConfigError(
            f"{address(url)} names no database that can be reached: {error}",
            remedy="postgresql+psycopg:// needs the extra `store`, others the driver that SQLAlchemy names",
        ) from None

    with ExitStack() as opened:
        opened.callback(engine.dispose)  # which leaves a connection in use open
        try:
            connection = opened.enter_context(engine.connect())
            connection = connection.execution_options(stream_results=True, yield_per=AT_ONCE)
            found = connection.execute(text(query))
            if not found.returns_rows:
                raise DataError("`ingest.sql.query` returns no rows", remedy="it has to be a SELECT")
            columns = tuple(found.keys())
        except SQLAlchemyError as error:
            raise _complaint(url, error) from None
        if len(set(columns)) < len(columns):
            raise DataError(
                f"the query gives a column twice: {', '.join(columns)}", remedy="name them with AS"
            )
        kept = opened.pop_all()  # until the rows are read

    def rows() -> Iterator[RawRow]:
        with kept:
            try:
                yield from map(dict, found.mappings())
            except SQLAlchemyError as error:
                raise _complaint(url, error) from None

    return Table(columns, ({key: value for key, value in row.items() if value is not None} for row in rows()))


def address(url: str) -> str:
    """Return the address for messages and manifests, without the login and the query string."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError
    from sqlalchemy.util import immutabledict

    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        return "the database"
    return found._replace(username=None, password=None, query=immutabledict()).render_as_string()


def _place(url: str, root: Path) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(
            "`ingest.sql.url` is no address of a database",
            remedy="wanted: postgresql+psycopg://USER@HOST/DATABASE, sqlite:///FILE",
        ) from None
    if found.password is not None or any("password" in key.lower() for key in found.query):
        raise ConfigError(
            f"the address of {address(url)} holds a password, which would stand in logs and commits",
            remedy=f"put it into the variable {PASSWORD}, and leave it out of the address",
        )
    if found.get_backend_name() == SQLITE:
        file = root / (found.database or "")
        if not file.is_file():
            raise DataError(
                f"{found.database or 'the database'} does not exist",
                remedy="check `ingest.sql.url`; a relative path counts from the checkout's root",
            )
        return found.set(database=f"file:{quote(str(file))}", query={"mode": "ro", "uri": "true"})
    return found.set(password=os.environ.get(PASSWORD))


def _complaint(url: str, error: Any) -> DataError:
    said = str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__]
    secret = os.environ.get(PASSWORD)
    line = said[0].replace(secret, "…") if secret else said[0]
    return DataError(
        f"{address(url)}: {line[:300]}",
        remedy=f"check `ingest.sql.url` and `.query`; the password comes from {PASSWORD}",
    )
