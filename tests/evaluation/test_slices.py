"""Slices: which rows belong together, and which are too few to judge."""

from __future__ import annotations

import pandas as pd
import pytest

from ratchet.config.evaluation import EvaluateConfig
from ratchet.config.params import parse_config
from ratchet.data.examples import Message, make_example
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
