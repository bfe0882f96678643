"""Rows of files and databases, as JSON Lines: whatever the format, a batch holds one object per line.

Lines of JSON Lines are passed on as bytes, without parsing. They end at `\\n` only: `str.splitlines()` would
also cut rows at U+2028 and U+0085.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ratchet.config.data import JsonlSource, SqlSource
from ratchet.data.batches import Original
from ratchet.data.examples import RowError
from ratchet.data.forms import MAX_LINE, read_row
from ratchet.errors import ConfigError
from ratchet.files import sha256_json
from ratchet.sources import sql, streams
from ratchet.sources.columns import Columns
from ratchet.sources.formats import BOM, tell_format
from ratchet.sources.json_documents import read_document
from ratchet.sources.streams import Stream, find_files, open_stream, shown
from ratchet.sources.tables import encode_row, read_columnar, read_csv, unfold

__all__ = ["Harvest", "read_database", "read_files", "read_lines", "shown"]


class Harvest(NamedTuple):
    """The lines of all files, a record of each file, and messages on what was left out (`said`)."""

    lines: list[bytes]
    files: tuple[Original, ...]
    said: tuple[str, ...] = ()


class _Content(NamedTuple):
    format: str
    lines: Iterable[bytes]
    said: tuple[str, ...] = ()


def read_lines(settings: JsonlSource) -> Iterator[bytes]:
    """Read the rows of all files, one line each. Raises DataError for no file, or a format without rows."""
    for opened in find_files(settings.path):
        with open_stream(opened) as stream:
            yield from _read(stream, Columns({})).lines


def read_files(path: str, mapping: dict[str, str], extra: Collection[str] = ()) -> Harvest:
    """Read the rows of all files, with columns renamed by `mapping`; `extra`: further keys of the rows.

    Raises DataError as `read_lines`, and for a mapped column that a file does not have.
    """
    lines: list[bytes] = []
    files: list[Original] = []
    said: list[str] = []
    for opened in find_files(path):
        columns = Columns(mapping, extra)
        with open_stream(opened) as stream:
            content = _read(stream, columns)
            before = len(lines)
            lines += content.lines
            said += [*content.said, *columns.check(stream.name)]
            kind = ", ".join(filter(None, (content.format, stream.codec)))
            name = streams.base_name(opened.path)
            files.append(Original(name, kind, stream.sha256(), len(lines) - before))
    return Harvest(lines, tuple(files), tuple(said))


def read_database(
    settings: SqlSource, root: Path, mapping: dict[str, str], extra: Collection[str] = ()
) -> Harvest:
    """Read the result of the query. Raises ConfigError, DataError."""
    if not settings.url:
        raise ConfigError(
            "`ingest.sql.url` is empty", remedy="wanted: postgresql+psycopg://USER@HOST/DATABASE"
        )
    place, columns = sql.address(settings.url), Columns(mapping, extra)
    table = sql.read_query(settings.url, settings.query, root)
    columns.seen.update(dict.fromkeys(table.columns))
    lines = list(_encoded(table.rows, columns, place))
    asked = Original(place, "SQL", sha256_json(settings.query), len(lines))
    return Harvest(lines, (asked,), columns.check(place))


def _read(stream: Stream, columns: Columns) -> _Content:
    kind, dialect = tell_format(stream, columns.mapped)
    if kind == "JSON Lines":
        return _Content(kind, _renamed(_lines(stream.handle), columns))
    if kind == "JSON":
        content = stream.read()
        document = read_document(content, stream.name, mapped=bool(columns))
        if document is None:
            return _Content("JSON Lines", _renamed(_lines(io.BytesIO(content)), columns))
        if document.rows is None:
            lines = _renamed((line[:MAX_LINE] for line in document.lines), columns)
        else:
            lines = _encoded(document.rows, columns, stream.name)
        return _Content(document.format, lines, document.said)
    if dialect:
        table = read_csv(stream, dialect, columns.reads)
    else:
        table = read_columnar(stream, kind, columns.reads)
    columns.seen.update(dict.fromkeys(table.columns))
    return _Content(dialect.name if dialect else kind, _encoded(table.rows, columns, stream.name))


def _lines(handle: BinaryIO) -> Iterator[bytes]:
    """Yield the lines that are not blank; a line over MAX_LINE is cut, which preparation rejects."""
    first = True
    while line := handle.readline(MAX_LINE):
        cut = len(line) == MAX_LINE and not line.endswith(b"\n")
        while cut and (rest := handle.readline(MAX_LINE)):
            if rest.endswith(b"\n"):
                break
        if first:
            line = line.removeprefix(BOM)
            first = not line.strip()
        if line.strip():
            yield line.rstrip(b"\n") if cut else line.rstrip(b"\r\n")


def _renamed(lines: Iterable[bytes], columns: Columns) -> Iterator[bytes]:
    if not columns:
        yield from lines
        return
    for line in lines:
        try:
            row = read_row(line)
        except RowError:
            yield line  # preparation rejects and counts it
        else:
            yield encode_row(unfold(columns.take(row)))[:MAX_LINE]


def _encoded(rows: Iterable[Any], columns: Columns, name: str) -> Iterator[bytes]:
    """Encode the rows of a table; a row that is no object is passed on for preparation to reject.

    Raises DataError over MOST_UNPACKED bytes: a Parquet file of 1 MB can hold a text a million times.
    """
    count = 0
    for row in rows:
        line = encode_row(unfold(columns.take(row)) if isinstance(row, dict) else row)[:MAX_LINE]
        count += len(line)
        if count > streams.MOST_UNPACKED:
            raise streams.too_large(name)
        yield line
