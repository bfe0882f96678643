"""Divide test rows into slices that must not get worse: by length, source, kind and any meta field.

A table of scores has a column `slice:FIELD` for each field, and a column `kind`. Batches and drifted topics
are selected elsewhere.
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
    """Return one value per row for each field, empty where the row has none.

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
    """Check that some row has each of the fields that the params' `key` names.

    Raises DataError otherwise, because such a field would guard nothing.
    """
    if unknown := [
        field for field in fields if not any(row.meta.get(field) not in (None, "") for row in rows)
    ]:
        raise DataError(
            f"{key} names {unknown[0]!r}, which no test row has in its `meta`",
            remedy=f"the first row has {', '.join(sorted(rows[0].meta)) or 'none'}",
        )


def length_bucket(text: str, bounds: Sequence[int]) -> str:
    """Name the range of lengths that the text falls into; empty without bounds.

    For the bounds 20 and 100 the names are `0-19 words`, `20-99 words` and `100+ words`.
    """
    if not bounds:
        return ""
    place = int(np.searchsorted(bounds, len(text.split()), side="right"))
    edges = [0, *bounds]
    return (
        f"{edges[place]}+ words" if place == len(bounds) else f"{edges[place]}-{edges[place + 1] - 1} words"
    )


def groups(scores: pd.DataFrame, *, least: int) -> dict[str, pd.DataFrame]:
    """Return `field:value` → its rows of the table.

    Values with fewer than `least` rows are left out, and so is a field with one value for all rows.
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
