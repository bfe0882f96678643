"""Rows of CSV, TSV, Parquet and Arrow files, as the objects that JSON would hold.

Text stays text: an id such as 007 keeps its zeros, since nothing in a CSV says what is a number. Empty cells
and nulls are absent keys. Bytes are read only from columns of pictures.
"""

from __future__ import annotations

import csv
import io
import json
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.data.examples import RawRow
from ratchet.errors import DataError
from ratchet.sources.formats import Dialect, read_cells
from ratchet.sources.streams import Stream

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1024  # rows of a batch
PICTURES_AT_ONCE = 16  # rows of a batch with pictures, each of which may have megabytes
LISTS = ("messages", "conversations", "tools")  # a cell with the text of a JSON list is read as that list
Reads = Callable[[str], bool]  # whether a column is wanted


class Table(NamedTuple):
    """The names of all columns, and the rows with the wanted columns; a list of cells is no valid row."""

    columns: tuple[str, ...]
    rows: Iterator[RawRow | list[str]]


def read_csv(stream: Stream, dialect: Dialect, reads: Reads, at: array[int]) -> Table:
    """Read a table of text; a row with more cells than the header comes as a list, for later rejection.

    The line on which a row begins is added to `at`; a cell in quotes may hold line breaks.
    """
    return Table(dialect.header, _csv_rows(stream, dialect, reads, at))


def _csv_rows(stream: Stream, dialect: Dialect, reads: Reads, at: array[int]) -> Iterator[RawRow | list[str]]:
    wanted = [(place, name) for place, name in enumerate(dialect.header) if reads(name)]
    text = io.TextIOWrapper(stream.handle, encoding="utf-8-sig", newline="")
    for _ in range(dialect.skip):
        text.readline()
    reader = read_cells(text, dialect.delimiter, quoted=dialect.quoted)
    seen_header, end = False, dialect.skip
    try:
        for cells in reader:
            start, end = end + 1, dialect.skip + reader.line_num
            if not any(map(str.strip, cells)):
                continue
            if not seen_header:
                seen_header = True
                continue
            at.append(start)
            if len(cells) > len(dialect.header) and any(map(str.strip, cells[len(dialect.header) :])):
                yield cells
            else:
                yield {name: cells[place] for place, name in wanted if place < len(cells) and cells[place]}
    except csv.Error as error:
        raise DataError(
            f"{stream.name} is a broken {dialect.name}: line {dialect.skip + reader.line_num}: {error}",
            remedy='a quote within a cell is written twice (""), and a cell with one stands in quotes; '
            "a cell has less than 1 MiB",
        ) from None
    except UnicodeDecodeError:
        raise DataError(
            f"{stream.name} is no UTF-8 after line {dialect.skip + reader.line_num}",
            remedy=f"save it as `CSV UTF-8`, or convert it: iconv -f WINDOWS-1252 -t UTF-8 {stream.name}",
        ) from None


def read_columnar(stream: Stream, kind: str, reads: Reads, shows: Reads = lambda _: False) -> Table:
    """Read a Parquet or Arrow file; `shows` tells which columns hold pictures.

    Raises DataError for a broken file, and for a column of bytes that are no pictures.
    """
    file = stream.spool()
    try:
        with _whole(stream.name, kind):
            schema, batches = _open(file, kind)
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{stream.name} has a column twice: {', '.join(schema.names)}")
        names = [name for name in schema.names if reads(name)]
        pictured = {name for name in names if shows(name) or _is_picture(schema.field(name).type)}
        readers = {
            name: _picture if name in pictured else _reader(schema.field(name), _classes(schema, name))
            for name in names
        }
        at_once = PICTURES_AT_ONCE if pictured else AT_ONCE
    except BaseException:
        file.close()
        raise

    def rows() -> Iterator[RawRow]:
        with file, _whole(stream.name, kind):
            yield from _batch_rows(batches(names, at_once), readers)

    return Table(tuple(schema.names), rows())


@contextmanager
def _whole(name: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        said = str(error).partition("\n")[0][:200]
        raise DataError(f"{name} is a broken {kind} file: {said}", remedy="fetch it again") from None


def _is_picture(kind: pa.DataType) -> bool:
    """Tell whether a column holds pictures, or lists of them, as `datasets` writes them."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_picture(kind.value_type)
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _picture(value: Any) -> Any:
    """Drop what is null in a picture's object."""
    if isinstance(value, list):
        return [_picture(one) for one in value if one is not None]
    if isinstance(value, dict):
        return {name: part for name, part in value.items() if part is not None} or None
    return value


def _open(file: Any, kind: str) -> tuple[pa.Schema, Callable[[list[str], int], Iterator[pa.RecordBatch]]]:
    """Return the schema, and a function from names of columns and a number of rows to batches of them."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    if kind == "Parquet":
        opened = parquet.ParquetFile(file)
        # `columns=` takes a name with a dot for a nested field, so such files are read whole, then selected.
        return opened.schema_arrow, lambda names, at_once: (
            batch.select(names)
            for batch in opened.iter_batches(
                at_once, columns=None if any("." in name for name in names) else names
            )
        )
    found = ipc.open_stream(file) if kind == "Arrow stream" else ipc.open_file(file)

    def batches(names: list[str], at_once: int) -> Iterator[pa.RecordBatch]:
        count = None if kind == "Arrow stream" else found.num_record_batches
        whole = found if count is None else map(found.get_batch, range(count))
        for batch in whole:
            batch.validate(full=True)  # offsets outside the buffers would crash the process
            yield from pa.Table.from_batches([batch.select(names)]).to_batches(at_once)

    return found.schema, batches


def _classes(schema: pa.Schema, name: str) -> list[str] | None:
    """Return the class names of a column that `datasets` stores as numbers; None for other columns."""
    try:
        known = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][name]
    except (KeyError, ValueError, TypeError):
        return None
    names = known.get("names") if isinstance(known, dict) and known.get("_type") == "ClassLabel" else None
    return [str(one) for one in names] if isinstance(names, list) else None


def _batch_rows(batches: Iterator[pa.RecordBatch], readers: dict[str, Any]) -> Iterator[RawRow]:
    for batch in batches:
        columns = [
            values if reader is None else [None if value is None else reader(value) for value in values]
            for (name, reader) in readers.items()
            for values in [batch.column(name).to_pylist()]
        ]
        for cells in zip(*columns, strict=True):
            yield {
                name: cell
                for name, cell in zip(readers, cells, strict=True)
                if cell is not None and cell != ""
            }


def _reader(field: pa.Field, classes: list[str] | None = None) -> Callable[[Any], Any] | None:
    """Return a function that turns a column's values into JSON's; None where they are JSON's already."""
    import pyarrow as pa

    kind = field.type
    if classes is not None:
        return lambda value: classes[value] if 0 <= value < len(classes) else None
    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if isinstance(kind, pa.BaseExtensionType):
        return _reader(pa.field(field.name, kind.storage_type))
    if pa.types.is_dictionary(kind):
        return _reader(pa.field(field.name, kind.value_type))
    if pa.types.is_struct(kind):
        inside = {part.name: _reader(part) or _same for part in kind}
        return lambda value: {
            name: inside[name](part) for name, part in value.items() if part is not None
        }  # Arrow gives each struct every field, so a null stands for an absent one
    if pa.types.is_map(kind):
        of = _reader(kind.item_field) or _same
        return lambda value: {str(name): None if part is None else of(part) for name, part in value}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        one = _reader(kind.value_field) or _same
        return lambda value: [None if part is None else one(part) for part in value]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        raise DataError(
            f"the column {field.name!r} holds bytes, wanted text",
            remedy="name the columns that are rows: --columns prompt=COLUMN,completion=COLUMN",
        )
    if pa.types.is_floating(kind):
        return lambda value: None if math.isnan(value) else value  # pandas writes an empty cell as NaN
    return None


def _same(value: Any) -> Any:
    return value


def unfold(row: RawRow) -> RawRow:
    """Read the lists that a table can hold only as text, such as `messages` as JSON in one cell."""
    for key in LISTS:
        if isinstance(text := row.get(key), str) and text.lstrip().startswith("["):
            try:
                row[key] = json.loads(text)
            except (ValueError, RecursionError):
                continue  # preparation says that it is no list
    return row


def _encode(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        raise DataError("a cell holds bytes, wanted text", remedy="leave that column out: ingest.columns")
    return str(value.isoformat() if hasattr(value, "isoformat") else value)


ENCODER = json.JSONEncoder(ensure_ascii=False, default=_encode)


def encode_row(row: Any) -> bytes:
    """Encode a row as `json.dumps` writes it, so that the same rows are the same bytes in every format.

    Raises DataError for bytes.
    """
    return ENCODER.encode(row).encode("utf-8", "surrogatepass")
