"""Drifted topics: which rows they are, where more of them come from, and how they travel."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ratchet.config.monitoring import MonitorConfig
from ratchet.errors import DataError
from ratchet.monitoring.topics import (
    FEEDBACK,
    Region,
    Topic,
    belongs,
    mark,
    parts,
    read_region,
    sources_for,
    write_region,
)

ARRAYS = Topic("array, axis", ["array", "axis"], 0.3, 0.01, ["Sum over the axis?"])
PAGES = Topic("template", ["template"], 0.2, 0.0, ["Render a template?"])


def test_a_row_belongs_by_whole_words_whatever_their_case():
    assert belongs(ARRAYS, "Which AXIS is it?")
    assert not belongs(ARRAYS, "Which axiset is it?")


def test_a_row_may_belong_to_several_topics_or_to_none():
    assert mark(["a template of an array", "nothing", "an axis"], [ARRAYS, PAGES]) == [
        "array, axis|template",
        "",
        "array, axis",
    ]


def test_rows_are_parted_by_topic_and_an_older_table_has_none():
    scores = pd.DataFrame({"id": ["a", "b", "c"], "region": ["array, axis|template", "", "template"]})
    assert {name: list(rows.id) for name, rows in parts(scores).items()} == {
        "array, axis": ["a"],
        "template": ["a", "c"],
    }
    assert parts(scores.drop(columns="region")) == {}


def test_a_region_keeps_the_words_and_no_prompt_of_a_user(tmp_path: Path):
    write_region(tmp_path / "region.json", Region([ARRAYS, PAGES]))
    assert read_region(tmp_path / "region.json") == Region(
        [Topic(topic.name, topic.terms) for topic in (ARRAYS, PAGES)]
    )
    assert "Sum over" not in (tmp_path / "region.json").read_text()
    assert read_region(tmp_path / "none.json") == Region()


def test_a_region_that_is_none_is_refused_with_its_file(tmp_path: Path):
    (tmp_path / "region.json").write_text('{"topics": [{"terms": 3}]}')
    with pytest.raises(DataError, match=r"region\.json is no list of drifted topics"):
        read_region(tmp_path / "region.json")


def test_each_topic_gets_its_first_matching_source_once_and_feedback_always():
    config = MonitorConfig.model_validate(
        {
            "sources": [
                {"match": "ARRAY", "source": "pydoc", "packages": ["numpy"]},
                {"match": ".", "source": "jsonl", "path": "rest.jsonl"},
            ]
        },
    )
    assert sources_for([ARRAYS, PAGES, ARRAYS], config) == [*config.sources, FEEDBACK]
    assert sources_for([ARRAYS], MonitorConfig()) == [FEEDBACK]
