"""JSON that is not one object per line: an array, objects over several lines, a table by columns, an export.

A row keeps its own text, without the line breaks, so that preparation sees its faults and reports them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ratchet.data.examples import RawRow, RowError
from ratchet.data.forms import recognise_form
from ratchet.errors import DataError
from ratchet.sources import label_studio

DECODER = json.JSONDecoder()
BLANK = re.compile(r"[ \t\r\n]*")


class Document(NamedTuple):
    """Rows as text (`lines`), or as objects (`rows`) where the text does not hold them one by one.

    `said`: messages on what was left out.
    """

    format: str
    lines: Iterable[bytes] = ()
    rows: Iterable[RawRow] | None = None
    said: tuple[str, ...] = ()


class Value(NamedTuple):
    """A JSON value with its place in the text, and its key where it is part of an object."""

    value: Any
    start: int
    end: int
    key: str = ""


def read_document(content: bytes, name: str, *, mapped: bool = False) -> Document | None:
    """Read a whole document; None where it is JSON Lines, some of them broken.

    `mapped`: the caller named the columns of question and answer. Raises DataError where the JSON is broken
    in the middle, or where it is not certain which list holds the rows.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if content.lstrip()[:1] == b"{":
            return None
        raise DataError(
            f"{name}: byte {error.start + 1} is no UTF-8",
            remedy=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {name}",
        ) from None
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        return _read_array(text, start, name, mapped)
    first = _decode(text, start)
    if first is None:
        return None
    if _skip(text, first.end) == len(text):
        return _read_single(text, first, name, mapped)
    return Document("JSON objects", _concatenated(text, start, name))


def _read_array(text: str, start: int, name: str, mapped: bool) -> Document:
    elements = _parts(text, start, name)
    first = next(elements, None)
    if first is None:
        return Document("JSON array")
    if not isinstance(first.value, dict):
        raise DataError(
            f"{name} is a JSON array of {type(first.value).__name__}, wanted objects",
            remedy='each row is an object with its keys: [{"prompt": …, "completion": …}, …]',
        )
    if label_studio.is_task(first.value):
        rows, said = label_studio.read_tasks((one.value for one in _parts(text, start, name)), name, mapped)
        return Document("Label Studio", rows=rows, said=said)
    return Document("JSON array", _texts(text, _parts(text, start, name)))


def _read_single(text: str, only: Value, name: str, mapped: bool) -> Document:
    """Read a document of one object: one row, a table by columns, or an object around a list of rows."""
    found: dict[str, Any] = only.value
    if rows := _by_columns(found, name):
        return Document("JSON columns", rows=rows)
    try:
        recognise_form(found)
    except RowError:
        lists = [part for part in _parts(text, only.start, name) if _is_list_of_objects(part.value)]
        if len(lists) == 1:
            if label_studio.is_task(lists[0].value[0]):
                rows, said = label_studio.read_tasks(lists[0].value, name, mapped)
                return Document("Label Studio", rows=rows, said=said)
            elements = _parts(text, lists[0].start, name, to_the_end=False)
            return Document(f"JSON under {lists[0].key[:40]!r}", _texts(text, elements))
        if lists:
            keys = [part.key[:40] for part in lists]
            raise DataError(
                f"{name} holds several lists of objects, {', '.join(keys)}; wanted one",
                remedy=f"write one of them to a file: jq -c '.{keys[0]}[]' {name}",
            ) from None
    row = text[only.start : only.end]
    return Document("JSON objects" if "\n" in row else "JSON Lines", [_on_one_line(row)])


def _by_columns(found: dict[str, Any], name: str) -> list[RawRow] | None:
    """Return the rows of {"prompt": […], "completion": […]}, or of the tables that pandas writes."""
    values = list(found.values())
    if found.keys() in ({"columns", "data"}, {"columns", "index", "data"}):  # orient="split"
        header, rows = found["columns"], found["data"]
        if isinstance(header, list) and isinstance(rows, list) and all(isinstance(row, list) for row in rows):
            if any(len(row) != len(header) for row in rows) or not all(map(_is_text, header)):
                raise DataError(f"{name} is a table whose rows have not as many cells as `columns`")
            return [dict(zip(header, row, strict=True)) for row in rows]
    flat = not any(isinstance(cell, dict) for value in values if isinstance(value, list) for cell in value)
    if values and flat and all(isinstance(value, list) for value in values):
        lengths = {key[:40]: len(value) for key, value in found.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{name} is a table by columns of unequal lengths: {lengths}")
        return [dict(zip(found, row, strict=True)) for row in zip(*values, strict=True)]
    if values and all(isinstance(value, dict) for value in values):  # orient="columns", the default
        index = list(values[0])
        if index and all(key.isdecimal() for key in index) and all(list(value) == index for value in values):
            return [{key: value[number] for key, value in found.items()} for number in index]
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _parts(text: str, start: int, name: str, *, to_the_end: bool = True) -> Iterator[Value]:
    """Yield the parts of the array or object at `start`; with `to_the_end`, only blanks may follow it."""
    is_object, at = text[start] == "{", _skip(text, start + 1)
    closing = "}" if is_object else "]"
    while text[at : at + 1] != closing:
        key = ""
        if is_object:
            name_of = _decode(text, at)
            if name_of is None or text[_skip(text, name_of.end) :][:1] != ":":
                raise _broken(text, at, name)
            key, at = str(name_of.value), _skip(text, _skip(text, name_of.end) + 1)
        part = _decode(text, at)
        if part is None:
            raise _broken(text, at, name)
        yield part._replace(key=key)
        at = _skip(text, part.end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] != closing:
                continue
        if text[at : at + 1] != closing:
            raise _broken(text, at, name)
    if to_the_end and _skip(text, at + 1) != len(text):
        raise _broken(text, _skip(text, at + 1), name)


def _concatenated(text: str, at: int, name: str) -> Iterator[bytes]:
    while at < len(text):
        found = _decode(text, at)
        if found is None:
            raise _broken(text, at, name)
        yield _on_one_line(text[found.start : found.end])
        at = _skip(text, found.end)


def _decode(text: str, at: int) -> Value | None:
    try:
        value, end = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    return Value(value, at, end)


def _skip(text: str, at: int) -> int:
    return BLANK.match(text, at).end()  # type: ignore[union-attr]


def _broken(text: str, at: int, name: str) -> DataError:
    try:
        DECODER.raw_decode(text, at)
        fault, place = "unexpected text", at
    except json.JSONDecodeError as error:
        fault, place = error.msg, error.pos
    except (ValueError, RecursionError) as error:  # a number of over 4,300 digits, or too many levels
        fault, place = str(error), at
    line, column = text.count("\n", 0, place) + 1, place - text.rfind("\n", 0, place)
    return DataError(
        f"{name} is broken JSON: line {line}, column {column}: {fault}",
        remedy="mend it, or fetch it again; in JSON Lines (jq -c '.[]') a broken row costs no other",
    )


def _texts(text: str, parts: Iterable[Value]) -> Iterator[bytes]:
    return (_on_one_line(text[part.start : part.end]) for part in parts)


def _on_one_line(text: str) -> bytes:
    """Remove the line breaks, which stand only between tokens: the row is then as `json.dumps` writes it."""
    if "\n" not in text:
        return text.encode("utf-8", "surrogatepass")
    whole: list[str] = []
    for line in text.split("\n"):
        if not (line := line.strip(" \t\r")):
            continue
        if whole and whole[-1][-1] not in "[{" and line[0] not in "]}":
            whole.append(" ")
        whole.append(line)
    return "".join(whole).encode("utf-8", "surrogatepass")
