"""Move a project's shared state between files and PostgreSQL, and tell where it is.

Everything is copied before anything changes: into one transaction of the target database, or into a folder
beside the files. Then `storage.url` in params.yaml is set, and only that puts the target in charge, so an
interrupted move leaves the source as it was; the same command then begins anew.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import ValidationError

from ratchet.config.edit import edit_params
from ratchet.config.params import Config
from ratchet.config.serving import StorageConfig
from ratchet.errors import RatchetError, UserError
from ratchet.files import write_private, write_text
from ratchet.gateway.auth import FILE as KEYS
from ratchet.gateway.identity import FILE as GATEWAY_KEY
from ratchet.monitoring import request_records, retrain_budget
from ratchet.monitoring.request_log import FILE as LOG
from ratchet.monitoring.request_log import URL_VARIABLE as LOG_URL
from ratchet.pipeline.checkout import Say, locked
from ratchet.promotion import rollout
from ratchet.promotion.champion import publish_newer
from ratchet.review import store as review
from ratchet.services.supervisor import running_services
from ratchet.serving.bundle import read_states
from ratchet.storage.database import (
    MOVED,
    MOVING,
    URL_VARIABLE,
    Database,
    answering,
    complete,
    find_database,
    make_tables,
    open_database,
    shown,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

FILES = "files"  # the target that is no URL
DOCUMENTS = (
    *(rollout.FILE, rollout.ENDED, rollout.AGAIN, retrain_budget.FILE, retrain_budget.ASKED),
    *(GATEWAY_KEY, KEYS),
)
ARRIVING = Path(".ratchet/arriving")  # holds what will be files, until all of it is there
PLACING = "placing"  # exists while the files are renamed into their places
LOCKS = ("promote", "retrain", "ingest", "synthesize", "sweep", "compare", "federate")
CHUNK = 500  # rows of one INSERT

Content = dict[str, "Table"]  # a table's name in files → the table


class Moved(msgspec.Struct, frozen=True):
    """How much was moved; `source` and `target` are URLs without passwords, or `files`."""

    source: str
    target: str
    documents: int
    rows: dict[str, int]  # by table


class Where(msgspec.Struct, frozen=True):
    """Where the state is, and how much of it there is."""

    storage: str
    documents: int
    rows: dict[str, int]


def move_storage(root: Path, config: Config, to: str, say: Say) -> Moved:
    """Move the state to the URL of a database, or to `files`.

    Raises UserError: it is there already, the target holds something, services still run, or the URL cannot
    be taken; ServiceError: a database does not answer.
    """
    target, source = _target(config, to), find_database(root)
    if (target.url if target else "") == (source.url if source else ""):
        raise UserError(f"the state of {config.project.name} is in {_name(target)} already")
    _require_quiet(root, config, source)
    takes_log = not (os.environ.get(LOG_URL) or config.request_log.url)
    if not takes_log:
        say("the request log stays in request_log.url")
    with ExitStack() as stack:
        for lock in LOCKS:
            stack.enter_context(locked(root, lock, wait=False))
        reader = stack.enter_context(_reading(root, source, takes_log))
        moved = _to_database(root, reader, source, target) if target else _to_files(root, reader, source)
        _switch(root, to if target else "")
    if source:
        _mark_moved(source, _name(target, here=True))
    else:
        say(f"the files as they were are in {_put_aside(root, takes_log)}; they hold people's texts")
    if target:
        _set_about(target, MOVING, None)
        publish_newer(root)
    else:
        shutil.rmtree(root / ARRIVING)
    return moved


def where(root: Path, config: Config) -> Where:
    """Count what the project's state holds. Raises ServiceError."""
    source = find_database(root)
    takes_log = not (os.environ.get(LOG_URL) or config.request_log.url)
    with _reading(root, source, takes_log) as reader:
        rows = {name: _count(connection, table) for name, (connection, table) in reader.tables.items()}
        return Where(_name(source), len(reader.documents), rows)


def _target(config: Config, to: str) -> Database | None:
    if os.environ.get(URL_VARIABLE):
        raise UserError(
            f"{URL_VARIABLE} is set, and overrides the key storage.url that a move changes",
            remedy="unset it; a password comes from PGPASSWORD, PGPASSFILE or ~/.pgpass as well",
        )
    if to == FILES:
        return None
    try:
        StorageConfig(url=to)
    except ValidationError:
        raise UserError(
            "the URL holds a password, which params.yaml and the list of processes would show",
            remedy="leave it out of the URL and set PGPASSWORD, PGPASSFILE or ~/.pgpass",
        ) from None
    return open_database(complete(to), config.project.name)


def _require_quiet(root: Path, config: Config, source: Database | None) -> None:
    """Raise UserError while something could write to the source during the move."""
    if running := [service.name for service in running_services(root, config)]:
        raise UserError(
            f"{', '.join(running)} still run here", remedy="ratchet down, then move, then ratchet up"
        )
    if source and (states := read_states(root)):
        raise UserError(
            f"{len(states)} gateway(s) with this database still answer, or were killed in the last minutes",
            remedy="stop them, wait two minutes, then move",
        )


# --- reading ------------------------------------------------------------------------------------------------


class Reader(msgspec.Struct):
    """An open source: its documents with their times, and a connection for each table."""

    documents: dict[Path, tuple[bytes, float]]
    tables: dict[str, tuple[Any, Any]]  # name → (connection, table)


@contextmanager
def _reading(root: Path, source: Database | None, takes_log: bool) -> Iterator[Reader]:
    """Open the source, as it is at one moment."""
    with ExitStack() as stack:
        if source:
            with source.transaction() as connection:  # checks whose it is
                _make_all(connection)
            stack.enter_context(answering(source.url))
            snapshot = source.engine.execution_options(isolation_level="REPEATABLE READ")
            connection = stack.enter_context(snapshot.begin())
            found = connection.execute(source.tables["documents"].select())
            documents = {Path(row.name): (bytes(row.body), row.at) for row in found}
            tables = {name: (connection, table) for name, table in _shared_tables(takes_log).items()}
            yield Reader({name: documents[name] for name in DOCUMENTS if name in documents}, tables)
            return
        documents = {
            name: ((root / name).read_bytes(), (root / name).stat().st_mtime)
            for name in DOCUMENTS
            if (root / name).exists()
        }
        tables = _open_files(root, stack, takes_log, only_existing=True)
        yield Reader(documents, tables)


def _open_files(
    folder: Path, stack: ExitStack, takes_log: bool, *, only_existing: bool = False
) -> dict[str, tuple[Connection, Table]]:
    """Open the SQLite files with their tables, made if they are missing unless `only_existing`."""
    tables: dict[str, tuple[Connection, Table]] = {}
    contents = [(review.FILE, review.file_tables())]
    if takes_log:
        contents.append((LOG, request_records.table_definitions()))
    for file, content in contents:
        if only_existing and not (folder / file).exists():
            continue
        engine = review.make_engine(folder / file)
        stack.callback(engine.dispose)
        request_records.update_tables(engine, next(iter(content.values())).metadata)
        connection = stack.enter_context(engine.begin())
        tables |= {name: (connection, table) for name, table in content.items()}
    return tables


def _shared_tables(takes_log: bool) -> Content:
    return review.shared_tables() | (request_records.table_definitions() if takes_log else {})


def _make_all(connection: Connection) -> None:
    for content in (review.shared_tables(), request_records.table_definitions()):
        make_tables(connection, content)


# --- writing ------------------------------------------------------------------------------------------------


def _to_database(root: Path, reader: Reader, source: Database | None, target: Database) -> Moved:
    """Copy everything in one transaction. Raises UserError when the target holds something."""
    tables = _shared_tables(takes_log=True)
    with target.transaction() as connection:
        _make_all(connection)
        about, documents = target.tables["about"], target.tables["documents"]
        unfinished = connection.execute(about.select().where(about.c.name == MOVING)).first()
        everything = [documents, *tables.values()]
        if unfinished:  # by a move that was interrupted before it took effect
            for table in everything:
                connection.execute(table.delete())
            connection.execute(about.delete().where(about.c.name == MOVING))
        elif filled := [table.name for table in everything if _count(connection, table)]:
            raise UserError(
                f"{shown(target.url)} holds {', '.join(filled)} of this project already",
                remedy="move to an empty database (createdb); nothing was changed",
            )
        connection.execute(about.insert().values(name=MOVING, value=f"from {_name(source, here=True)}"))
        for path, (body, at) in reader.documents.items():
            connection.execute(documents.insert().values(name=path.as_posix(), body=body, at=at))
        rows = {
            name: _copy(read, table, connection, tables[name])
            for name, (read, table) in reader.tables.items()
        }
        for name in ("items", "history"):
            _go_on_counting(connection, tables[name])
    return Moved(_name(source), _name(target), len(reader.documents), rows)


def _to_files(root: Path, reader: Reader, source: Database | None) -> Moved:
    """Write everything into a folder, then rename it into place. Raises UserError when files are there."""
    arriving = root / ARRIVING
    with_log = "requests" in reader.tables
    targets = [*DOCUMENTS, review.FILE, *([LOG] if with_log else [])]
    if (arriving / PLACING).exists():  # by a move that was interrupted before it took effect
        for name in targets:
            (root / name).unlink(missing_ok=True)
    elif filled := [name.as_posix() for name in targets if (root / name).exists()]:
        raise UserError(
            f"{', '.join(filled)} exist(s) already", remedy=f"move them out of {root}; nothing was changed"
        )
    shutil.rmtree(arriving, ignore_errors=True)
    arriving.mkdir(parents=True, mode=0o700)
    for name, (body, at) in reader.documents.items():
        write_private(arriving / name, body)
        os.utime(arriving / name, (at, at))
    with ExitStack() as stack:
        opened = _open_files(arriving, stack, with_log)
        rows = {name: _copy(read, table, *opened[name]) for name, (read, table) in reader.tables.items()}
    (arriving / PLACING).touch()
    for path in [path for path in (arriving / ".ratchet").iterdir() if path.is_file()]:
        path.replace(root / ".ratchet" / path.name)
    return Moved(_name(source), FILES, len(reader.documents), rows)


def _copy(read: Connection, table: Table, write: Connection, into: Table) -> int:
    """Copy all rows, and return their number."""
    names = [column.name for column in into.columns]
    found = read.execution_options(yield_per=CHUNK).execute(table.select())
    copied = 0
    for chunk in found.partitions(CHUNK):
        write.execute(into.insert(), [_plain({name: getattr(row, name) for name in names}) for row in chunk])
        copied += len(chunk)
    if (seen := _count(write, into)) != copied:
        raise RatchetError(f"{copied} rows of {table.name} were copied, the target has {seen}")
    return copied


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Replace NUL, which PostgreSQL's texts do not hold."""
    return {
        name: value.replace("\0", "\ufffd") if isinstance(value, str) else value
        for name, value in row.items()
    }


def _count(connection: Connection, table: Table) -> int:
    from sqlalchemy import func, select

    return int(connection.execute(select(func.count()).select_from(table)).scalar_one())


def _go_on_counting(connection: Connection, table: Table) -> None:
    """Let the numbers of new rows follow those that were copied."""
    from sqlalchemy import func, select

    last = connection.execute(select(func.max(table.c.place))).scalar_one()
    if last is not None:
        sequence = func.pg_get_serial_sequence(table.name, "place")
        connection.execute(select(func.setval(sequence, last)))


# --- taking effect ------------------------------------------------------------------------------------------


def _switch(root: Path, url: str) -> None:
    """Put the target in charge: one atomic change of params.yaml."""
    path = root / "params.yaml"
    write_text(path, edit_params(path.read_text(encoding="utf-8"), {"storage.url": url}))


def _put_aside(root: Path, takes_log: bool) -> Path:
    """Move the files that are no longer in charge into a folder, and return it."""
    aside = root / ".ratchet" / f"moved-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    aside.mkdir(mode=0o700)
    for name in [*DOCUMENTS, review.FILE, *([LOG] if takes_log else [])]:
        for path in [root / name, *(root / f"{name}{ending}" for ending in ("-wal", "-shm"))]:
            if path.exists():
                path.replace(aside / path.name)
    return aside


def _mark_moved(source: Database, to: str) -> None:
    """Refuse those who still use the source from now on."""
    _set_about(source, MOVED, to)


def _set_about(database: Database, name: str, value: str | None) -> None:
    about = database.tables["about"]
    with database.transaction() as connection:
        connection.execute(about.delete().where(about.c.name == name))
        if value is not None:
            connection.execute(about.insert().values(name=name, value=value))


def _name(database: Database | None, *, here: bool = False) -> str:
    if database:
        return shown(database.url)
    return f"files on {socket.gethostname()}" if here else FILES
