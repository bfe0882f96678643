"""Slices: which rows belong together, and which are too few to judge."""

from __future__ import annotations

import hashlib
import io

import pandas as pd
import pytest
from PIL import Image

from ratchet.config.evaluation import EvaluateConfig
from ratchet.config.params import parse_config
from ratchet.data.examples import MEDIA_MARK, Example, Message, make_example
from ratchet.errors import ConfigError, DataError
from ratchet.evaluation.slices import groups, length_bucket, slice_columns


@pytest.mark.parametrize(
    ("words", "bounds", "bucket"),
    [
        (0, [20, 100], "0-19 words"),
        (19, [20, 100], "0-19 words"),
        (20, [20, 100], "20-99 words"),
        (99, [20, 100], "20-99 words"),
        (100, [20, 100], "100+ words"),
        (7, [5], "5+ words"),
        (7, [], ""),
    ],
)
def test_a_length_belongs_to_one_bucket(words, bounds, bucket):
    assert length_bucket("word " * words, bounds) == bucket


def test_every_field_gives_a_column_and_a_missing_value_is_empty():
    rows = [
        make_example(
            [Message("user", "hail?"), Message("assistant", "yes")], {"batch": "a", "source": "jsonl", **meta}
        )
        for meta in ({"topic": "cars"}, {}, {"topic": None}, {"topic": 3})
    ]
    found = slice_columns(rows, EvaluateConfig(slices=["topic"]))
    assert found == {
        "slice:source": ["jsonl"] * 4,
        "slice:topic": ["cars", "", "", "3"],
        "slice:length": ["0-19 words"] * 4,
    }


def test_a_field_that_no_row_has_is_refused_and_not_silently_unguarded():
    rows = [
        make_example([Message("user", "hail?"), Message("assistant", "yes")], {"batch": "a", "topic": "cars"})
    ]
    with pytest.raises(DataError, match=r"(?s)evaluate.slices names 'topik'.*the first row has batch, topic"):
        slice_columns(rows, EvaluateConfig(slices=["topik"]))


def shown(*sides: int, **meta: str) -> tuple[Example, dict[str, bytes]]:
    """A row that shows grey squares with these sides, in pixels, and its pictures."""
    pictures = {}
    for number, side in enumerate(sides):
        stored = io.BytesIO()
        Image.new("L", (side, side), 99 + number).save(stored, "PNG")
        pictures[f"{hashlib.sha256(stored.getvalue()).hexdigest()}.png"] = stored.getvalue()
    asked = Message("user", MEDIA_MARK * len(sides) + f"{sides}?", media=tuple(pictures))
    return make_example([asked, Message("assistant", "grey")], {"batch": "a", **meta}), pictures


def test_rows_with_pictures_are_slices_by_modality_size_and_number() -> None:
    made = [shown(), shown(10), shown(400, 10), shown(1200), shown(10, 20, 30, 40)]
    rows = [row for row, _ in made]
    media = {name: data for _, pictures in made for name, data in pictures.items()}
    found = slice_columns(rows, EvaluateConfig(slices=["pictures"]), media)
    assert found["slice:modality"] == ["text", *["pictures"] * 4]
    assert found["slice:pictures"] == ["0", "1", "2", "1", "3 or more"]
    assert found["slice:picture_size"] == [
        "",
        "under 0.1 megapixels",
        "0.1 to 1 megapixels",
        "1 megapixels or more",
        "under 0.1 megapixels",
    ]
    table = pd.DataFrame({"id": [row.id for row in rows], "kind": "x"} | found)
    assert {"modality:pictures", "pictures:1", "picture_size:under 0.1 megapixels"} <= set(
        groups(table, least=2)
    )
    unasked = slice_columns(rows, EvaluateConfig(), media)
    assert {"slice:modality", "slice:picture_size"} <= set(unasked) and "slice:pictures" not in unasked


def test_a_slice_of_pictures_is_refused_where_it_is_misspelt_or_nobody_shows_any() -> None:
    row, media = shown(10)
    with pytest.raises(DataError, match=r"(?s)names 'modalty'.*modality, pictures, picture_size"):
        slice_columns([row], EvaluateConfig(slices=["modalty"]), media)
    for field in ("modality", "pictures", "picture_size"):
        with pytest.raises(DataError, match="no test row shows a picture"):
            slice_columns([shown()[0]], EvaluateConfig(slices=[field]))


def test_a_field_of_the_rows_own_comes_before_the_derived_one() -> None:
    row, media = shown(10, modality="scan")
    text, _ = shown(modality="chat")
    found = slice_columns([row, text], EvaluateConfig(slices=["modality"]), media)
    assert found["slice:modality"] == ["scan", "chat"]
    alone = slice_columns([text], EvaluateConfig(slices=["modality"]))
    assert alone["slice:modality"] == ["chat"]


def test_groups_leave_out_small_ones_empty_values_and_fields_that_tell_nothing_apart():
    table = pd.DataFrame(
        {
            "id": list("abcdef"),
            "kind": ["x"] * 6,
            "slice:topic": ["cars", "cars", "cars", "boats", "", ""],
            "slice:length": ["s", "s", "s", "l", "l", "l"],
            "other": list("uvwxyz"),
        }
    )
    found = groups(table, least=2)
    assert {name: list(part.id) for name, part in found.items()} == {
        "topic:cars": ["a", "b", "c"],
        "length:l": ["d", "e", "f"],
        "length:s": ["a", "b", "c"],
    }


def test_bounds_that_do_not_rise_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"length_bounds is \[100, 20\]; wanted rising numbers"):
        parse_config({"evaluate": {"length_bounds": [100, 20]}}, tmp_path)
