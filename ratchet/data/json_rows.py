"""Read one line of a batch's file strictly.

What other readers take without a word (a key twice, NaN, two objects) is refused.
"""

from __future__ import annotations

import json
from typing import Any

from ratchet.data.examples import RawRow, RowError

MOST_DEPTH = 16
MAX_LINE = 2**20  # bytes; a longer line is kept cut, so that preparation rejects and counts it


def read_row(line: bytes) -> RawRow:
    """Read an object. Raises RowError."""
    if len(line) >= MAX_LINE:
        raise RowError("line_too_long", f"the line has 1 MiB or more; at most {MAX_LINE - 1} bytes are read")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"byte {error.start + 1} is no UTF-8") from None
    try:
        row = json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except json.JSONDecodeError as error:
        raise RowError("invalid_json", f"no valid JSON: {error}") from None
    except RecursionError:
        raise RowError("too_deep", f"over {MOST_DEPTH} levels of nesting") from None
    if not isinstance(row, dict):
        raise RowError("no_object", f"a {type(row).__name__}, wanted an object")
    if line.count(b"[") + line.count(b"{") > MOST_DEPTH and _depth(row) > MOST_DEPTH:
        raise RowError("too_deep", f"over {MOST_DEPTH} levels of nesting")
    return row


def _object(pairs: list[tuple[str, Any]]) -> RawRow:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for twice, _ in pairs:
            if twice in seen:
                break
            seen.add(twice)
        raise RowError(
            "duplicate_key",
            f"the key {twice[:40]!r} stands there twice; which one counts depends on the reader",
        )
    return made


def _constant(name: str) -> float:
    raise RowError("not_finite", f"{name} is no JSON")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise RowError("huge_number", f"{text[:40]} is beyond what a number can hold")
    return number


def _int(text: str) -> int:
    if len(text) > 20:
        raise RowError("huge_number", f"a number of {len(text)} digits")
    return int(text)


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, dict | list)
        ]
    return deepest
