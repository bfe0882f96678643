"""Cut test rows into slices that must not get worse: by length, source, kind and any meta field.

A table of scores carries a column `slice:FIELD` a field; `kind` has one of its own. Batches and drifted
topics are cut elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import Example
from ratchet.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

PREFIX = "slice:"


def slice_columns(rows: Sequence[Example], config: EvaluateConfig) -> dict[str, list[str]]:
    """Return a value a row for each field, empty where the row has none.

    Raises DataError for a field of `evaluate.slices` that no row has.
    """
    require_fields("evaluate.slices", config.slices, rows)
    fields = {
        field: [_value(row.meta.get(field)) for row in rows]
        for field in dict.fromkeys(("source", *config.slices))
    }
    fields["length"] = [length_bucket(row.question, config.length_bounds) for row in rows]
    return {f"{PREFIX}{field}": values for field, values in fields.items()}


def require_fields(key: str, fields: Sequence[str], rows: Sequence[Example]) -> None:
    """Raises DataError for a field of the params' `key` that no row has: nothing would be guarded."""
    if unknown := [
        field for field in fields if not any(row.meta.get(field) not in (None, "") for row in rows)
    ]:
        raise DataError(
            f"{key} names {unknown[0]!r}, which no test row has in its `meta`",
            remedy=f"the first row has {', '.join(sorted(rows[0].meta)) or 'none'}",
        )


def length_bucket(text: str, bounds: Sequence[int]) -> str:
    """`0-19 words`, `20-99 words`, `100+ words` for the bounds 20 and 100; empty without bounds."""
    if not bounds:
        return ""
    place = int(np.searchsorted(bounds, len(text.split()), side="right"))
    edges = [0, *bounds]
    return (
        f"{edges[place]}+ words" if place == len(bounds) else f"{edges[place]}-{edges[place + 1] - 1} words"
    )


def groups(scores: pd.DataFrame, *, least: int) -> dict[str, pd.DataFrame]:
    """Return `field:value` → its rows of the table.

    Left out: values with fewer than `least` rows, and a field in which all rows have one value.
    """
    found: dict[str, pd.DataFrame] = {}
    for column in [name for name in scores if name == "kind" or str(name).startswith(PREFIX)]:
        if scores[column].nunique() > 1:
            parts = {
                f"{str(column).removeprefix(PREFIX)}:{value}": part
                for value, part in scores.groupby(column)
                if value
            }
            found |= {name: part for name, part in parts.items() if part.id.nunique() >= least}
    return found


def _value(value: object) -> str:
    return "" if value is None else str(value)
