"""Rows of files and databases, as JSON Lines: whatever the format, a batch holds one object per line.

Lines of JSON Lines are passed on as bytes, without parsing. They end at `\\n` only: `str.splitlines()` would
also cut rows at U+2028 and U+0085.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
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
from ratchet.sources.media import HINT, MOST_LINE, MediaIntake, Rows
from ratchet.sources.streams import Stream, find_files, open_stream, shown
from ratchet.sources.tables import encode_row, read_columnar, read_csv, unfold

__all__ = ["Harvest", "read_database", "read_files", "read_lines", "shown"]


class Harvest(NamedTuple):
    """The lines of all files, a record of each file, messages on what was left out (`said`), the pictures.

    `at` holds for each row the line of its file on which it begins, from 1; 0 where a format has no lines.
    """

    lines: list[bytes]
    files: tuple[Original, ...]
    said: tuple[str, ...] = ()
    media: Mapping[str, bytes] = MappingProxyType({})
    at: Sequence[int] = ()


class Place(NamedTuple):
    """Where a row stands: its number among the rows of its file, and the line on which it begins.

    Both count from 1. `line` is 0 in formats without lines; `file` is empty if all rows are of one file.
    """

    row: int
    line: int = 0
    file: str = ""

    def __str__(self) -> str:
        told = f"line {self.line} (row {self.row})" if self.line else f"row {self.row}"
        told = f"line {self.line}" if self.line == self.row else told
        return f"{self.file}, {told}" if self.file else told


class _Content(NamedTuple):
    format: str
    lines: Iterable[bytes]
    said: tuple[str, ...] = ()
    at: Sequence[int] = ()  # filled while `lines` are read


def find_place(row: int, files: Sequence[Original], at: Sequence[int]) -> Place:
    """Return where row number `row` of all files, from 1, stands in its own file."""
    line, number = at[row - 1] if row <= len(at) else 0, row
    for file in files if len(files) > 1 else ():
        if number <= file.rows:
            return Place(number, line, file.name)
        number -= file.rows
    return Place(number, line)


def read_lines(settings: JsonlSource) -> Iterator[bytes]:
    """Read the rows of all files, one line each. Raises DataError for no file, or a format without rows."""
    for opened in find_files(settings.path):
        with open_stream(opened) as stream:
            yield from _read(stream, Columns({}), None).lines


def read_files(
    path: str, mapping: dict[str, str], extra: Collection[str] = (), pictures: MediaIntake | None = None
) -> Harvest:
    """Read the rows of all files, with columns renamed by `mapping`; `extra`: further keys of the rows.

    Without `pictures`, references to pictures stay as they are. Raises DataError as `read_lines`, and for a
    mapped column that a file does not have.
    """
    lines: list[bytes] = []
    at = array("Q")
    files: list[Original] = []
    said: list[str] = []
    for opened in find_files(path):
        columns = Columns(mapping, extra)
        with open_stream(opened) as stream:
            rows = pictures.beside(opened.fs, opened.path) if pictures else None
            content = _read(stream, columns, rows)
            before = len(lines)
            lines += content.lines
            at.extend(content.at or [0] * (len(lines) - before))
            said += [*content.said, *columns.check(stream.name)]
            kind = ", ".join(filter(None, (content.format, stream.codec)))
            name = streams.base_name(opened.path)
            files.append(Original(name, kind, stream.sha256(), len(lines) - before))
    return _harvest(lines, files, said, pictures)._replace(at=at)


def _harvest(
    lines: list[bytes], files: list[Original], said: Iterable[str], pictures: MediaIntake | None
) -> Harvest:
    if pictures is None:
        return Harvest(lines, tuple(files), tuple(said))
    return Harvest(lines, tuple(files), (*said, *pictures.tell()), pictures.spool)


def read_database(
    settings: SqlSource,
    root: Path,
    mapping: dict[str, str],
    extra: Collection[str] = (),
    pictures: MediaIntake | None = None,
) -> Harvest:
    """Read the result of the query. Raises ConfigError, DataError."""
    if not settings.url:
        raise ConfigError(
            "`ingest.sql.url` is empty", remedy="wanted: postgresql+psycopg://USER@HOST/DATABASE"
        )
    place, columns = sql.address(settings.url), Columns(mapping, extra)
    table = sql.read_query(settings.url, settings.query, root)
    columns.seen.update(dict.fromkeys(table.columns))
    rows = pictures.without_file() if pictures else None
    lines = list(_encoded(table.rows, columns, place, rows))
    asked = Original(place, "SQL", sha256_json(settings.query), len(lines))
    return _harvest(lines, [asked], columns.check(place), pictures)


def _read(stream: Stream, columns: Columns, shown: Rows | None) -> _Content:
    """Read the rows of a file; `shown` takes in the pictures that they refer to."""
    kind, dialect = tell_format(stream, columns.mapped)
    at = array("Q")
    if kind == "JSON Lines":
        return _Content(kind, _renamed(_lines(stream.handle, at, _longest(shown)), columns, shown), at=at)
    if kind == "JSON":
        content = stream.read()
        document = read_document(content, stream.name, mapped=bool(columns))
        if document is None:
            found = _lines(io.BytesIO(content), at, _longest(shown))
            return _Content("JSON Lines", _renamed(found, columns, shown), at=at)
        if document.rows is None:
            lines = _renamed((line[: _longest(shown)] for line in document.lines), columns, shown)
        else:
            lines = _encoded(document.rows, columns, stream.name, shown)
        return _Content(document.format, lines, document.said)
    if dialect:
        table = read_csv(stream, dialect, columns.reads, at)
    else:
        table = read_columnar(stream, kind, columns.reads, columns.shows if shown else _nothing)
    columns.seen.update(dict.fromkeys(table.columns))
    lines = _encoded(table.rows, columns, stream.name, shown, columns.of_media(table.columns))
    return _Content(dialect.name if dialect else kind, lines, at=at)


def _nothing(_: str) -> bool:
    return False


def _longest(shown: Rows | None) -> int:
    return MOST_LINE if shown else MAX_LINE


def _lines(handle: BinaryIO, at: array[int], most: int = MAX_LINE) -> Iterator[bytes]:
    """Yield the lines that are not blank, and add the number of each to `at`.

    A line may have MAX_LINE bytes, or `most` if pictures stand in it as base64; a longer one is cut, which
    preparation rejects.
    """
    first, number = True, 0
    while line := handle.readline(MAX_LINE):
        number += 1
        if most > MAX_LINE and _is_cut(line, MAX_LINE) and HINT.search(line):
            line += handle.readline(most - len(line))
            cut = _is_cut(line, most)
        else:
            cut = _is_cut(line, MAX_LINE)
        while cut and (rest := handle.readline(MAX_LINE)):
            if rest.endswith(b"\n"):
                break
        if first:
            line = line.removeprefix(BOM)
            first = not line.strip()
        if line.strip():
            at.append(number)
            yield line.rstrip(b"\n") if cut else line.rstrip(b"\r\n")


def _is_cut(line: bytes, most: int) -> bool:
    return len(line) == most and not line.endswith(b"\n")


def _renamed(lines: Iterable[bytes], columns: Columns, shown: Rows | None) -> Iterator[bytes]:
    """Rename the columns of rows, and take in their pictures; other lines are passed on as they are."""
    for line in lines:
        if not columns and not (shown and HINT.search(line)):
            yield line[:MAX_LINE]
            continue
        try:
            row = read_row(line, most=_longest(shown) + 1)
        except RowError:
            yield line[:MAX_LINE]  # preparation rejects and counts it
            continue
        new = unfold(columns.take(row)) if columns else row
        if shown:
            new = shown.take(new)
        yield line[:MAX_LINE] if new is row and not columns else encode_row(new)[:MAX_LINE]


def _encoded(
    rows: Iterable[Any], columns: Columns, name: str, shown: Rows | None, of_media: Collection[str] = ()
) -> Iterator[bytes]:
    """Encode the rows of a table; a row that is no object is passed on for preparation to reject.

    `of_media`: keys of pictures and recordings for which the table has a column; rows lack those whose cell
    is empty. Raises DataError over MOST_UNPACKED bytes: a Parquet file of 1 MB can hold a text a million
    times.
    """
    count = 0
    for row in rows:
        if isinstance(row, dict):
            row = unfold(columns.take(row))
            row = shown.take(row, of_media) if shown else row
        line = encode_row(row)[:MAX_LINE]
        count += len(line)
        if count > streams.MOST_UNPACKED:
            raise streams.too_large(name)
        yield line
