"""Divide test rows into slices that must not get worse: by length, source, kind, any meta field, and by the
pictures that they show.

A table of scores has a column `slice:FIELD` for each field, and a column `kind`. Batches and drifted topics
are selected elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import Example
from ratchet.errors import DataError
from ratchet.media.names import is_sound
from ratchet.media.pictures import size_of

if TYPE_CHECKING:
    import pandas as pd

NO_MEDIA: Mapping[str, bytes] = MappingProxyType({})
PREFIX = "slice:"
MODALITY, PICTURES, PICTURE_SIZE = "modality", "pictures", "picture_size"
OF_MEDIA = (MODALITY, PICTURE_SIZE)  # slices wherever a row has media; PICTURES is one where it is named
MEGAPIXELS = (0.1, 1.0)  # sizes at which the next slice by the size of pictures begins
MOST_PICTURES = 3  # from which on the slice by their number is the same


def slice_columns(
    rows: Sequence[Example], config: EvaluateConfig, media: Mapping[str, bytes] = NO_MEDIA
) -> dict[str, list[str]]:
    """Return one value per row for each field, empty where the row has none.

    `media` has the rows' pictures by name. A field of a row's own `meta` comes before a derived one of that
    name. Raises DataError for a field of `evaluate.slices` that no row has.
    """
    derived = _of_media(rows, media)
    own = [field for field in config.slices if field not in derived]
    require_fields("evaluate.slices", own, rows, known=(MODALITY, PICTURES, PICTURE_SIZE))
    fields = {
        field: [_value(row.meta.get(field)) for row in rows] for field in dict.fromkeys(("source", *own))
    }
    for field in dict.fromkeys((*OF_MEDIA, *config.slices)):
        if field in derived:
            named = any(row.meta.get(field) not in (None, "") for row in rows)
            fields[field] = [_value(row.meta.get(field)) for row in rows] if named else derived[field]
    fields["length"] = [length_bucket(row.question, config.length_bounds) for row in rows]
    return {f"{PREFIX}{field}": values for field, values in fields.items()}


def _of_media(rows: Sequence[Example], media: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Return the fields that tell of the rows' pictures, or {} where no row shows any."""
    if not any(row.media for row in rows):
        return {}
    shown = [[name for name in row.media if not is_sound(name)] for row in rows]
    pixels = {name: math.prod(size_of(media[name])) for names in shown for name in names if name in media}
    return {
        MODALITY: [_modality(row) for row in rows],
        PICTURES: [
            f"{len(names)}" if len(names) < MOST_PICTURES else f"{MOST_PICTURES} or more" for names in shown
        ],
        PICTURE_SIZE: [
            size_bucket(max((pixels[name] for name in names if name in pixels), default=0)) for names in shown
        ],
    }


def _modality(row: Example) -> str:
    kinds = {"sound" if is_sound(name) else "pictures" for name in row.media}
    return " and ".join(sorted(kinds)) or "text"


def size_bucket(pixels: int) -> str:
    """Name the range of sizes of a row's largest picture; empty for 0, which is no picture."""
    if not pixels:
        return ""
    low, high = MEGAPIXELS
    if pixels < low * 1e6:
        return f"under {low:g} megapixels"
    return f"{low:g} to {high:g} megapixels" if pixels < high * 1e6 else f"{high:g} megapixels or more"


def require_fields(
    key: str, fields: Sequence[str], rows: Sequence[Example], known: Sequence[str] = ()
) -> None:
    """Check that some row has each of the fields that the params' `key` names.

    `known` are fields of rows that show pictures. Raises DataError otherwise, because such a field would
    guard nothing.
    """
    if unknown := [
        field for field in fields if not any(row.meta.get(field) not in (None, "") for row in rows)
    ]:
        if unknown[0] in known:
            raise DataError(
                f"{key} names {unknown[0]!r}, and no test row shows a picture",
                remedy="take it out, or ingest rows with pictures",
            )
        also = f"; where rows show pictures, there are {', '.join(known)} too" if known else ""
        raise DataError(
            f"{key} names {unknown[0]!r}, which no test row has in its `meta`",
            remedy=f"the first row has {', '.join(sorted(rows[0].meta)) or 'none'}{also}",
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
