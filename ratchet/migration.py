"""Tables, and columns that a database of an earlier release lacks: those are added with their defaults. Nothing is ever dropped.

Several processes may do it at once: who is told that it is there already looks again.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine, MetaData, Table

TRIES = 10
SOMEBODY_WAS_FASTER = re.compile(r"already exists|duplicate column|duplicate key", re.IGNORECASE)


def make_tables(engine: Engine, metadata: MetaData) -> None:
    """Raises SQLAlchemyError when the database does not answer."""
    from sqlalchemy.exc import DatabaseError

    for tries_left in reversed(range(TRIES)):
        try:
            metadata.create_all(engine)
            for table in metadata.tables.values():
                _add_columns(engine, table)
            return
        except DatabaseError as error:
            if not tries_left or not SOMEBODY_WAS_FASTER.search(str(error.orig)):
                raise


def _add_columns(engine: Engine, table: Table) -> None:
    from sqlalchemy import inspect, text
    from sqlalchemy.schema import CreateColumn

    known = {column["name"] for column in inspect(engine).get_columns(table.name)}
    for column in [column for column in table.columns if column.name not in known]:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {table.name} ADD COLUMN {CreateColumn(column).compile(dialect=engine.dialect)}"))
