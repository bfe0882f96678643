"""Recognise a file's format by its first bytes, whatever its name is, and refuse formats without rows.

A refusal says what the file is and which command helps.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from ratchet.data.examples import RowError
from ratchet.data.forms import MAX_LINE, recognise_form
from ratchet.errors import DataError
from ratchet.sources.streams import Stream

Format = Literal["JSON Lines", "JSON", "CSV", "Parquet", "Arrow", "Arrow stream"]
TABLES: dict[bytes, Format] = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xff\xff\xff": "Arrow stream",
}
UNPACK = "unpack it and name the files; gzip or zstd of a single file is read as it is"
AS_CSV = "save it as CSV (UTF-8), and name that file"
DRAFT = "ratchet synthesize --documents FILE lets a teacher write rows about a text (docs/synthesis.md)"
WANTED = "JSON (lines, an array or columns), CSV, TSV, Parquet or Arrow"
# Formats without rows, by their first bytes: what the file is, and what to do instead.
OTHERS: dict[bytes, tuple[str, str]] = {
    b"PK\x05\x06": ("an archive (zip)", UNPACK),
    b"7z\xbc\xaf": ("an archive (7z)", UNPACK),
    b"BZh": ("an archive (bzip2)", UNPACK),
    b"\xfd7zXZ": ("an archive (xz)", UNPACK),
    b"Rar!": ("an archive (rar)", UNPACK),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", AS_CSV),
    b"SQLite format 3\x00": (
        "an SQLite database",
        "ratchet ingest --path sqlite:///FILE --query 'SELECT question AS prompt, answer AS completion …'",
    ),
    b"%PDF": ("a PDF", f"save its text; {DRAFT}"),
    b"\x89PNG": ("a picture (PNG)", "name the file of the rows that show it"),
    b"\xff\xd8\xff": ("a picture (JPEG)", "name the file of the rows that show it"),
    b"GIF8": ("a picture (GIF)", "name the file of the rows that show it"),
    b"RIFF": ("a picture or a recording (RIFF)", "name the file of the rows that have it"),
    b"ID3": ("a recording (MP3)", "name the file of the rows that have it"),
    b"OggS": ("a recording (Ogg)", "name the file of the rows that have it"),
    b"fLaC": ("a recording (FLAC)", "name the file of the rows that have it"),
    b"FEA1": ("a Feather file of version 1", "write it again as version 2, or as Parquet"),
    b"ORC": ("an ORC file", "save it as Parquet, and name that file"),
    b"Obj\x01": ("an Avro file", "save it as Parquet, and name that file"),
    b"GGUF": ("a model (GGUF)", "`base.model` in params.yaml takes it"),
    b"\x93NUMPY": ("an array of NumPy", "save the texts as CSV or Parquet"),
    b"\x89HDF": ("an HDF5 file", "save it as Parquet, and name that file"),
    b"\x80\x04": ("a pickle", "a pickle can run code, and is never read: save it as Parquet"),
    b"\x80\x05": ("a pickle", "a pickle can run code, and is never read: save it as Parquet"),
}
OFFICE = {
    b"xl/": "an Excel workbook (xlsx)",
    b"word/": "a Word document (docx)",
    b"content.xml": "an ODF file",
}
TAR_AT, TAR = 257, b"ustar"  # a tar's magic stands at this offset
BOM = b"\xef\xbb\xbf"
DELIMITERS = {",": "CSV", ";": "CSV", "\t": "TSV", "|": "CSV"}
ONE_COLUMN = ("text", "messages", "conversations")  # headers of a CSV with one column
LONGEST_NAME = 100  # of a column
LEAST_EVEN = 0.9  # share of rows with as many cells as the header, from which a text counts as a table
LEAST_EVEN_KNOWN = 0.5  # the same under a header that is a known form
SHORT = 2**16  # bytes by which most tables are recognised; tried before the whole head, which takes longer


class Dialect(NamedTuple):
    """How the cells of a text table are separated and quoted."""

    delimiter: str
    quoted: bool
    header: tuple[str, ...]
    skip: int = 0  # lines before the header

    @property
    def name(self) -> str:
        return DELIMITERS[self.delimiter]


def tell_format(stream: Stream, columns: tuple[str, ...] = ()) -> tuple[Format, Dialect | None]:
    """Return the format, and the dialect of a CSV.

    `columns`: names of columns that the file must have. Raises DataError for a format without rows.
    """
    head = stream.head
    for magic, found in TABLES.items():
        if head.startswith(magic):
            return found, None
    _refuse_others(stream)
    text = head.removeprefix(BOM).lstrip(b" \t\r\n")
    if not text:
        return "JSON Lines", None  # an empty file; the caller reports that there are no rows
    _refuse_encodings(head, text, stream)
    if text.startswith(b"["):
        return "JSON", None
    if text.startswith(b"{"):
        return ("JSON Lines" if _has_whole_first_line(text) or _holds_media(text) else "JSON"), None
    lines = [line for line in text.splitlines()[:100] if line.strip()]
    if 2 * sum(line.lstrip().startswith(b"{") for line in lines) >= len(lines):
        return "JSON Lines", None  # with broken rows, which preparation rejects and counts
    if text.startswith(b"<"):
        raise _refusal(stream, "a page (HTML or XML)", f"a login page in place of the file? {DRAFT}")
    for size in (SHORT, len(head)):
        part = head[:size].removeprefix(BOM).decode(errors="replace")
        if dialect := sniff(part, stream.is_whole and size >= len(head), columns):
            return "CSV", dialect
    if b"\x00" in head:
        raise _refusal(stream, "a binary file", f"save it as one of them; its first bytes: {head[:12]!r}")
    first = lines[0][:60].decode(errors="replace")
    raise _refusal(stream, f"a text that begins with {first!r}", f"a CSV needs a header; {DRAFT}")


def _holds_media(text: bytes) -> bool:
    """Tell whether the first line is as long as it is because a picture or recording stands in it."""
    return b"\n" not in text and (b";base64," in text or b'"input_audio"' in text)


def _refuse_others(stream: Stream) -> None:
    head = stream.head
    for magic, (what, remedy) in OTHERS.items():
        if head.startswith(magic):
            raise _refusal(stream, what, remedy)
    if head.startswith(b"PK\x03\x04"):
        office = next((what for inside, what in OFFICE.items() if inside in head), None)
        raise _refusal(stream, office or "an archive (zip)", AS_CSV if office else UNPACK)
    if head[TAR_AT : TAR_AT + len(TAR)] == TAR:
        raise _refusal(stream, "an archive (tar)", UNPACK)


def _refusal(stream: Stream, what: str, remedy: str) -> DataError:
    return DataError(f"{stream.name} is {what}, wanted rows: {WANTED}", remedy=remedy)


def _refuse_encodings(head: bytes, text: bytes, stream: Stream) -> None:
    # UTF-16 with a byte order mark, or without one: `{` as two bytes.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in text[:2]:
        raise DataError(
            f"{stream.name} is UTF-16, wanted UTF-8",
            remedy=f"convert it: iconv -f UTF-16 -t UTF-8 {stream.name}",
        )
    if text.partition(b"\n")[0].count(b"}\r{"):
        raise DataError(
            f"{stream.name} ends its lines with a carriage return alone, wanted a line feed",
            remedy=f"convert it: tr '\\r' '\\n' < {stream.name}",
        )


def _has_whole_first_line(text: bytes) -> bool:
    """Tell whether the first line is a JSON value and another line follows."""
    line, _, rest = text.partition(b"\n")
    if not rest.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def sniff(text: str, is_whole: bool, columns: tuple[str, ...] = ()) -> Dialect | None:
    """Find the dialect of a text table; None where the text is no table.

    A table has a header with a name for each column, and rows of as many cells.
    """
    skip = 0
    if match := re.match(r"sep=(.)\r?\n", text):  # Excel's own hint
        skip, text = 1, text[match.end() :]
    found = []
    for delimiter in DELIMITERS:
        for quoted in (True, False) if delimiter == "\t" else (True,):
            header, share = _measure(text, is_whole, delimiter, quoted, columns)
            least = LEAST_EVEN_KNOWN if _is_known(header, columns) else LEAST_EVEN
            if share >= least and len(header) > 1:
                found.append((share, len(header), quoted, Dialect(delimiter, quoted, header, skip)))
    if found:
        # The most even rows win, then the most columns, then quoting.
        return max(found, key=lambda one: one[:3])[3]
    header, share = _measure(text, is_whole, ",", True, columns)
    alone = len(header) == 1 and header[0] in (*ONE_COLUMN, *columns) and share == 1.0
    return Dialect(",", True, header, skip) if alone else None


def _is_known(header: tuple[str, ...], columns: tuple[str, ...]) -> bool:
    try:
        return bool(recognise_form(dict.fromkeys(header)))
    except RowError:
        return bool(columns) and set(columns) <= set(header)


def _measure(
    text: str, is_whole: bool, delimiter: str, quoted: bool, columns: tuple[str, ...]
) -> tuple[tuple[str, ...], float]:
    """Return the header, and the share of rows with as many cells; no header where it names no columns.

    A text under a known header counts as a table even with a misplaced quote, which its reader then reports
    with the line.
    """
    rows: list[list[str]] = []
    broken = False
    try:
        for row in read_cells(io.StringIO(text, newline=""), delimiter, quoted=quoted):
            if any(map(str.strip, row)):
                rows.append(row)
    except csv.Error as error:
        broken = is_whole or "end of data" not in str(error)  # a cut text may end within quotes
    if not is_whole and not broken:
        rows = rows[:-1]  # the last row is cut off
    header = _header(rows[0]) if rows else ()
    if not header or (broken and delimiter == "\t"):  # read without quoting, it may still be a table
        return (), 0.0
    if broken or len(rows) < 2:
        return (header, 1.0) if _is_known(header, columns) else ((), 0.0)
    return header, sum(len(row) == len(rows[0]) for row in rows[1:]) / (len(rows) - 1)


def _header(cells: list[str]) -> tuple[str, ...]:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:  # a delimiter at each line's end
        names.pop()
    if not all(names) or len(set(names)) < len(names) or max(map(len, names), default=0) > LONGEST_NAME:
        return ()
    return tuple(names)


def read_cells(text: Iterable[str], delimiter: str, *, quoted: bool) -> Any:
    """Return a csv.reader, strict where cells are quoted: a misplaced quote would otherwise swallow rows."""
    csv.field_size_limit(MAX_LINE)
    if quoted:
        return csv.reader(text, delimiter=delimiter, strict=True)
    return csv.reader(text, delimiter=delimiter, quoting=csv.QUOTE_NONE)
