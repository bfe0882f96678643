"""Find rows for erasure, put them on the erasure list, take whole batches back, and mark the versions that
learned them.

This is a task of a flow, not a stage. Batches are immutable, so no row is rewritten here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ratchet.config.data import PrepareConfig
from ratchet.data.batches import Batch, Reverted, check_batch, raw_lines, read_manifest, take_back
from ratchet.data.erasure import GOLDEN, Entry, Forgotten
from ratchet.data.examples import (
    PEOPLE,
    RawRow,
    RowError,
    has_mark_run,
    normalise,
)
from ratchet.data.forms import read_conversation, whole_rows
from ratchet.data.validation import Origin, Validator
from ratchet.errors import UserError
from ratchet.promotion.lineage import STARTED_FROM, Trace
from ratchet.tracking.registry import Version, list_versions, set_tag

TAG, REVERTED_TAG = "forget", "reverted"
SHOWN = 5  # batches that a message names
ROLES = frozenset({"system", "user", "assistant", "human", "gpt"})  # roles of turns, not searched


class Query(NamedTuple):
    """What to look for: a pattern in the texts, the hash of a row, or the names of one person.

    Exactly one of the three is given.
    """

    pattern: re.Pattern[str] | None = None
    id: str = ""
    names: frozenset[str] = frozenset()


class Found(NamedTuple):
    """A row that was found; `ids` are its hashes as in `Entry`, `batch` is `golden` for the golden set."""

    ids: list[str]
    batch: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.batch}:{self.line}"


def find(raw: Path, golden: Path, query: Query, config: PrepareConfig) -> list[Found]:
    """Find rows in the order of the batches, golden rows last.

    Raises DataError for a batch that does not match the manifest.
    """
    files = [
        (check_batch(raw, batch), Origin(batch.name, batch.source, batch.form))
        for batch in read_manifest(raw)
    ]
    files += [(golden, Origin(GOLDEN, ""))] if golden.exists() else []
    validator, found = Validator(config), []
    for path, origin in files:
        for number, line in raw_lines(path):
            seen = _read(line, origin, validator)
            if _matches(query, seen):
                found.append(Found(seen.ids, origin.batch, number))
    return found


class Line(NamedTuple):
    """The searchable contents of a line; `names` are the people named in the row or its `meta`."""

    ids: list[str]
    texts: list[str]
    names: set[str]


def _matches(query: Query, line: Line) -> bool:
    if query.pattern is not None:
        return any(query.pattern.search(text) for text in line.texts)
    return bool(query.names & line.names) or query.id in line.ids


def _read(line: bytes, origin: Origin, validator: Validator) -> Line:
    """Read the contents of a line; of a line that is no example, read whatever text it has."""
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Line([], [_searchable(line.decode("utf-8", "replace"))], set())
    if not isinstance(row, dict):
        return Line([], list(_strings(row)), set())
    meta = row["meta"] if isinstance(row.get("meta"), dict) else {}
    return Line(
        _ids(line, row, origin, validator),
        list(_strings(row)),
        {str(part[key]) for part in (row, meta) for key in PEOPLE if key in part},
    )


def _ids(line: bytes, row: RawRow, origin: Origin, validator: Validator) -> list[str]:
    """Hash the row as it was written and as today's settings prepare it, because versions learned either
    form.
    """
    found: list[str] = []
    with suppress(RowError):
        found.append(read_conversation(row, origin.form).example({}).id)
    with suppress(RowError):
        found.append(validator.check(line, origin).example.id)
    return list(dict.fromkeys(found))


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, at any depth, except keys and the roles of turns."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield _searchable(part)
        elif isinstance(part, dict):
            waiting += [
                inner for key, inner in part.items() if key not in ("role", "from") or str(inner) not in ROLES
            ]
        elif isinstance(part, list):
            waiting += part


def _searchable(text: str) -> str:
    """Normalise a text as examples are, except where that would take quadratic time (`has_mark_run`)."""
    return text if has_mark_run(text) else normalise(text)


def extend(known: Forgotten, found: list[Found], *, reason: str, by: str) -> Forgotten:
    """Return the list with those of the found rows that are not on it yet."""
    at = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    listed = {(entry.batch, entry.line, *entry.ids) for entry in known.entries}
    return Forgotten(
        [
            *known.entries,
            *(
                Entry(row.ids, row.batch, row.line, reason, by, at)
                for row in found
                if (row.batch, row.line, *row.ids) not in listed
            ),
        ]
    )


def find_batch(raw: Path, name: str) -> Batch:
    """Return the batch of that name, or the only one whose name begins with it. Raises UserError."""
    batches = read_manifest(raw)
    found = [batch for batch in batches if batch.name == name] or [
        batch for batch in batches if name and batch.name.startswith(name)
    ]
    if len(found) == 1:
        return found[0]
    seen = found or batches
    names = ", ".join(batch.name for batch in seen[-SHOWN:]) or "none"
    more = f", and {len(seen) - SHOWN} earlier ones" if len(seen) > SHOWN else ""
    counted = f"{len(found)} batches of data/raw begin" if found else "no batch of data/raw begins"
    raise UserError(
        f"{counted} with {name[:80]!r}; there are {names}{more}",
        remedy="name one of them: data/raw/manifest.jsonl lists all",
    )


def revert(raw: Path, batch: Batch, *, came: str, reason: str, by: str) -> Reverted:
    """Take a batch out of `raw`, and return its entry for the list of reverted batches."""
    take_back(raw, batch)
    return Reverted(batch.name, batch.rows, came, reason, by, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")


def count_golden(raw: Path, batch: Batch, golden: Path) -> int:
    """Count the golden rows that are also rows of the batch. Raises DataError for a damaged batch."""
    if not golden.exists():
        return 0
    rows = whole_rows((line for _, line in raw_lines(check_batch(raw, batch))), batch.form)
    ids = {example.id for example in rows}
    return sum(example.id in ids for example in whole_rows(line for _, line in raw_lines(golden)))


def mark(name: str, traces: list[Trace], tag: str = TAG) -> None:
    """Tag each version with JSON: `{count, exact, at, reason}`, and `from` where weights were inherited.

    Repeating the call changes nothing. Raises ServiceError when MLflow does not answer.
    """
    for trace in traces:
        told: dict[str, int | bool | str] = {
            "count": trace.rows,
            "exact": trace.exact,
            "at": trace.at,
            "reason": trace.reason,
        }
        set_tag(name, trace.version, tag, json.dumps(told | ({"from": trace.parent} if trace.parent else {})))


def inherit(version: Version) -> None:
    """Mark a version whose training started from marked weights.

    Its own training rows contain none from the list, nor from a batch that was taken back, because
    preparation left them out.
    """
    start = version.tags.get(STARTED_FROM)
    parents = [known for known in list_versions(version.name) if known.tags.get("adapter_sha256") == start]
    for tag in (TAG, REVERTED_TAG):
        parent = next((known for known in parents if tag in known.tags), None)
        if parent and parent.number != version.number:
            told = json.loads(parent.tags[tag]) | {"count": 0, "exact": True, "from": parent.number}
            set_tag(version.name, version.number, tag, json.dumps(told))
