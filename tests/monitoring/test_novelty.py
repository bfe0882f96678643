"""Surprise columns: what they count, that they do not depend on what was measured before, and odd rows."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from ratchet.monitoring.novelty import COLUMNS, Familiar, stems_of

ROWS = ["open the file", "close the file", "read a socket", "write a socket", "parse the date"]


def test_a_training_row_is_familiar_and_an_unknown_one_is_not():
    found = Familiar(ROWS).columns(["open the file", "quantum zebra"])
    assert set(found) == set(COLUMNS)
    assert found["unseen words"].tolist() == [0.0, 1.0]
    assert found["rarity"][1] == 1.0 and found["distance to the nearest row"] == pytest.approx(
        [0.0, 1.0], abs=1e-6
    )
    for name in COLUMNS:
        assert found[name][0] < found[name][1], name


def test_word_surprise_is_the_mean_negative_log_likelihood_with_one_added():
    found = Familiar(ROWS).columns(["file zebra"])["word surprise"][0]
    total = 15 + 10 + 1  # words of ROWS, how many of them differ, and the unseen
    assert found == pytest.approx((math.log(total / 3) + math.log(total / 1)) / 2)


def test_rarity_is_one_over_the_rows_that_hold_the_stem_and_one():
    assert Familiar(ROWS).columns(["file dates"])["rarity"][0] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_a_row_measures_the_same_alone_in_company_and_again():
    texts = ["zebra file", "open zebra", "the quantum file"]
    together, alone = Familiar(ROWS), Familiar(ROWS)
    first = together.columns(texts)
    again = together.columns(texts[::-1])
    for name in COLUMNS:
        assert first[name].tolist() == again[name][::-1].tolist()
        assert first[name] == pytest.approx([alone.columns([text])[name][0] for text in texts])
    assert together.subjects(texts) == pytest.approx(
        np.concatenate([alone.subjects([text]) for text in texts]), abs=1e-5
    )


def test_stems_are_those_that_training_hardly_knows_and_that_come_again():
    familiar = Familiar([*ROWS, "file", "file"])
    found = familiar.stems(["zebra file", "zebras file", "one lonely quantum", "open dates", "opened dates"])
    held = found.present.toarray().sum(axis=1).tolist()
    assert held == [1.0, 1.0, 0.0, 2.0, 2.0], (
        "zebra; zebra; quantum comes once; open and date are in one training row each"
    )
    assert sorted(found.weights) == [0.5, 0.5, 1.0]


def test_words_are_counted_once_a_row():
    assert Familiar(ROWS).words(["file file date", "date"]).toarray().sum(axis=1).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("rows", [["…"], ["a"], ["", " "], ["x"] * 3, ["a b"] * 80])
def test_training_rows_with_little_in_them_are_enough(rows: list[str]):
    familiar = Familiar(rows)
    assert all(np.isfinite(values).all() for values in familiar.columns(["a", "", "b c"]).values())
    assert np.isfinite(familiar.subjects(["a", "b"])).all()


def test_no_training_row_is_an_error_and_no_prompt_is_none():
    with pytest.raises(ValueError, match="no training row"):
        Familiar([])
    assert all(len(values) == 0 for values in Familiar(ROWS).columns([]).values())


def test_endings_fall_and_short_words_stay():
    assert stems_of("parses parsed parsing parser") == ["pars"] * 4
    assert stems_of("used is 2024 as") == ["used", "is", "as"]


def test_twenty_thousand_rows_are_learnt_and_five_hundred_measured_in_seconds():
    chance, words = np.random.default_rng(0), [f"word{number}x" for number in range(3000)]
    texts = [" ".join(words[place] for place in chance.zipf(1.4, 12) % 3000) for _ in range(20_500)]
    familiar = Familiar(texts[:20_000])
    familiar.columns(texts[:1])
    began = time.process_time()
    familiar.columns(texts[20_000:])
    assert time.process_time() - began < 5.0, "0.6 s on a quiet machine"
