"""Charts of the demo: drawn the same each time, with answers that follow from what is in them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratchet.demo.charts import ASKED, COLOURS, KINDS, PARTS, Asked, Kind, draw, write_rows


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image).astype(int)


def shown(png: bytes, colour: str) -> int:
    """Count pixels of a colour."""
    wanted = [int(COLOURS[colour][place : place + 2], 16) for place in (1, 3, 5)]
    return int((np.abs(pixels(png) - wanted).max(axis=2) <= 8).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_chart_shows_as_many_colours_as_its_answers_say(kind: Kind) -> None:
    charts = draw(kind, range(12))
    assert len({chart.png for chart in charts}) == 12
    assert {len(chart.values) for chart in charts} == {2, 3, 4}
    for chart in charts:
        seen = {colour for colour in COLOURS if shown(chart.png, colour) > 20}
        assert chart.answer("colours").split() == [colour for colour in COLOURS if colour in seen]
        assert chart.answer("count") == str(len(seen)) and chart.answer("parts") == PARTS[kind]
        assert chart.answer("shown") == f"{len(seen)} {PARTS[kind]}"


def test_a_chart_depends_on_its_seed_and_kind_alone() -> None:
    first, _, third = draw("line", [5, 6, 7])
    assert draw("line", [7, 5])[::-1] == [first, third]


def test_higher_bars_have_more_pixels() -> None:
    for chart in draw("bar", range(5)):
        by_value = sorted(chart.values, key=lambda colour: chart.values[colour])
        sizes = [shown(chart.png, colour) for colour in by_value]
        assert sizes == sorted(sizes)


def test_rows_are_a_csv_beside_a_folder_of_pictures(tmp_path: Path) -> None:
    asked = [Asked(chart, "shown") for chart in draw("pie", range(3))]
    path = write_rows(tmp_path, "pies", asked)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["question"] for row in rows] == [ASKED["shown"]] * 3
    assert [row["answer"] for row in rows] == [f"{len(one.chart.values)} slices" for one in asked]
    assert [(tmp_path / row["image"]).read_bytes() for row in rows] == [one.chart.png for one in asked]
