"""Map the names that a file gives its columns to the keys of a known form (`ingest.columns`)."""

from __future__ import annotations

from collections.abc import Collection

from ratchet.data.examples import RawRow
from ratchet.data.forms import MEANT, MEDIA_KEYS
from ratchet.errors import DataError, UserError

# Keys with a meaning of their own in any form: a row that lost one of them would teach something else.
BESIDE = MEANT - {"input", "chosen", "rejected"} | {"context", "meta", *MEDIA_KEYS}
# Keys that make a row together: where one is mapped, the others may already have the right names.
TOGETHER = (
    {"prompt", "completion", "chosen", "rejected", "response"},
    {"instruction", "input", "output", "response"},
    {"question", "answer"},
    {"query", "response"},
)
NAMED = 12  # columns that a message lists


class Columns:
    """A mapping from keys of a form to columns of one file; it remembers which columns the file has."""

    def __init__(self, mapping: dict[str, str], extra: Collection[str] = ()) -> None:
        partners = (keys for keys in TOGETHER if keys & mapping.keys())
        self._mapping, self._kept = mapping, BESIDE.union(extra, *partners)
        # A mapping of pictures alone says nothing of the texts: their columns have the right names, then.
        self._all = mapping.keys() <= BESIDE
        self.mapped = tuple(mapping.values())
        self.seen: dict[str, None] = {}  # in the file's order

    def __bool__(self) -> bool:
        return bool(self._mapping)

    def reads(self, column: str) -> bool:
        """Tell whether a column is taken: without a mapping, all are."""
        return self._all or column in self.mapped or column in self._kept

    def shows(self, column: str) -> bool:
        """Tell whether a column holds pictures, by its name or by the key that it becomes."""
        return column in MEDIA_KEYS or any(self._mapping.get(key) == column for key in MEDIA_KEYS)

    def of_media(self, columns: Collection[str]) -> list[str]:
        """Return the keys of pictures and recordings that the columns of a file become."""
        return [key for key in MEDIA_KEYS if self._mapping.get(key, key) in columns]

    def take(self, row: RawRow) -> RawRow:
        """Rename the mapped columns, keep those whose own name has a meaning, and leave out the rest."""
        if not self._mapping:
            return row
        self.seen.update(dict.fromkeys(row))
        found = {key: row[column] for key, column in self._mapping.items() if column in row}
        rest = {
            key: value
            for key, value in row.items()
            if (self._all or key in self._kept) and key not in self.mapped and key not in self._mapping
        }
        return {**found, **rest}

    def check(self, name: str) -> tuple[str, ...]:
        """Return a message with the columns left out. Raises DataError for a mapped one that no row has."""
        missing = [column for column in self._mapping.values() if column not in self.seen]
        if missing and self.seen:
            raise DataError(
                f"{name} has no column {', '.join(map(repr, missing))}; its columns: {listed(self.seen)}",
                remedy="mend `ingest.columns`, or --columns; --columns '' maps nothing",
            )
        left = [
            column
            for column in self.seen
            if not self.reads(column) or (column in self._mapping and column not in self.mapped)
        ]
        return (f"{name}: columns left out: {listed(left)}",) if self._mapping and left else ()


def listed(columns: Collection[str]) -> str:
    """List the first NAMED names for a message."""
    more = f", and {len(columns) - NAMED} more" if len(columns) > NAMED else ""
    return ", ".join(column[:40] for column in list(columns)[:NAMED]) + more


def parse_columns(text: str) -> dict[str, str]:
    """Read `prompt=text,completion=category`. Raises UserError."""
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, _, column = (piece.strip() for piece in part.partition("="))
        if not key or not column or key in found:
            raise UserError(
                f"--columns is {text[:80]!r}; wanted KEY=COLUMN, each key once",
                remedy="for example --columns prompt=text,completion=category; names with a comma go into "
                "`ingest.columns` of params.yaml",
            )
        found[key] = column
    return found
