"""Answers that are labels: told from texts, and scored as scikit-learn does."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from ratchet.evaluation.metrics import are_labels, macro_f1
from ratchet.evaluation.statistics import Interval


@pytest.mark.parametrize(
    ("references", "labels"),
    [
        (["yes"] * 5 + ["no"] * 5, True),
        (
            ["Yes."] * 3 + ["yes"] * 2 + ["no"] * 5 + [str(number) for number in range(10)],
            True,
        ),  # half of the rows
        (["yes"] * 5 + ["no"] * 5 + [str(number) for number in range(11)], False),
        (["yes"] * 100, False),  # one label tells nothing apart
        ([f"answer {number}" for number in range(50)], False),
        ([], False),
    ],
)
def test_labels_come_again_and_again(references, labels):
    assert are_labels(references) is labels


@pytest.mark.parametrize("seed", range(4))
def test_macro_f1_is_scikit_learns(seed):
    """Over the labels of the references; an answer that is no label is a miss."""
    generator = np.random.default_rng(seed)
    wanted = generator.choice(["a", "b", "c", "d"], size=120, p=[0.5, 0.3, 0.15, 0.05])
    said = np.where(
        generator.random(120) < 0.6, wanted, generator.choice(["a", "b", "c", "none of them"], size=120)
    )
    found = macro_f1(list(said), list(wanted), alpha=0.025, resamples=400, seed=0)
    assert found.mean == pytest.approx(
        f1_score(wanted, said, labels=sorted(set(wanted)), average="macro", zero_division=0.0)
    )
    assert 0.0 <= found.low < found.mean < found.high <= 1.0


def test_a_perfect_and_an_empty_side_have_no_doubt():
    wanted = ["a", "b"] * 20
    assert macro_f1(wanted, wanted, alpha=0.025, resamples=200, seed=0) == Interval(1.0, 1.0, 1.0)
    assert macro_f1([""] * 40, wanted, alpha=0.025, resamples=200, seed=0) == Interval(0.0, 0.0, 0.0)


def test_a_rare_label_weighs_as_much_as_a_common_one():
    wanted = ["common"] * 90 + ["rare"] * 10
    assert macro_f1(["common"] * 100, wanted, alpha=0.025, resamples=200, seed=0).mean == pytest.approx(
        (2 * 90 / 190 + 0.0) / 2
    )
