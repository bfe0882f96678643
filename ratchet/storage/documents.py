"""Read and write the project's small documents: files below the checkout, or rows of the shared database.

A document has the same name in both, its path below the checkout, such as `.ratchet/rollout.json`. A write
replaces it completely or not at all. In the database a write is fenced: it is refused when a lock that the
writer holds has been taken over by another process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ratchet.files import write_bytes, write_private
from ratchet.storage.database import clock, find_database
from ratchet.storage.leases import check_held


def read_document(root: Path, name: Path) -> bytes | None:
    """Return a document's content; None when there is none. Raises ServiceError."""
    return read_documents(root, [name])[name]


def read_documents(root: Path, names: Iterable[Path]) -> dict[Path, bytes | None]:
    """Return the content of several documents, from the database with one query. Raises ServiceError."""
    if (database := find_database(root)) is None:
        return {name: _read_file(root / name) for name in names}
    from sqlalchemy import select

    wanted, table = list(names), database.tables["documents"]
    query = select(table.c.name, table.c.body).where(table.c.name.in_([name.as_posix() for name in wanted]))
    with database.transaction() as connection:
        found = {Path(row.name): bytes(row.body) for row in connection.execute(query)}
    return {name: found.get(name) for name in wanted}


def list_documents(root: Path, folder: Path) -> dict[Path, bytes]:
    """Return the documents of the shared database whose names are in `folder`; empty without a database."""
    if (database := find_database(root)) is None:
        return {}
    from sqlalchemy import select

    table = database.tables["documents"]
    query = select(table.c.name, table.c.body).where(
        table.c.name.startswith(f"{folder.as_posix()}/", autoescape=True)
    )
    with database.transaction() as connection:
        return {Path(row.name): bytes(row.body) for row in connection.execute(query)}


def write_document(root: Path, name: Path, content: bytes, *, private: bool = False) -> None:
    """Replace a document. `private`: only the owner can read the file.

    Raises ServiceError, LeaseError.
    """
    if (database := find_database(root)) is None:
        if private:
            write_private(root / name, content)
        else:
            write_bytes(root / name, [content])
        return
    from sqlalchemy.dialects.postgresql import insert

    row = {"name": name.as_posix(), "body": content, "at": clock()}
    with database.transaction() as connection:
        check_held(connection, database)
        connection.execute(
            insert(database.tables["documents"])
            .values(row)
            .on_conflict_do_update(index_elements=["name"], set_=row)
        )


def make_document(root: Path, name: Path, content: bytes) -> bytes:
    """Write a private document unless there is one, and return the one that is there now."""
    if (database := find_database(root)) is None:
        if not (root / name).exists():
            write_private(root / name, content)
        return (root / name).read_bytes()
    from sqlalchemy.dialects.postgresql import insert

    row = {"name": name.as_posix(), "body": content, "at": clock()}
    with database.transaction() as connection:
        connection.execute(insert(database.tables["documents"]).values(row).on_conflict_do_nothing())
    return read_document(root, name) or content


def remove_document(root: Path, name: Path) -> None:
    """Remove a document if it exists. Raises ServiceError, LeaseError."""
    if (database := find_database(root)) is None:
        (root / name).unlink(missing_ok=True)
        return
    table = database.tables["documents"]
    with database.transaction() as connection:
        check_held(connection, database)
        connection.execute(table.delete().where(table.c.name == name.as_posix()))


def written_at(root: Path, name: Path) -> float | None:
    """Return when a document was last written, in seconds since 1970; None when there is none."""
    if (database := find_database(root)) is None:
        return (root / name).stat().st_mtime if (root / name).exists() else None
    from sqlalchemy import select

    table = database.tables["documents"]
    with database.transaction() as connection:
        return connection.execute(
            select(table.c.at).where(table.c.name == name.as_posix())
        ).scalar_one_or_none()


def _read_file(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
