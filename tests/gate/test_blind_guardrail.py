"""The guardrail that a candidate looks at pictures."""

from __future__ import annotations

import pandas as pd
import pytest

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.gate.guardrails import judge_blind

IDS = [f"{number:03}" for number in range(60)]


def scores_of(right: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"id": IDS, "batch": "one", "model": "candidate", "exact_match": right})


def blind_of(right: list[float], how: str = "another", what: str = "pictures") -> pd.DataFrame:
    columns = {"of": IDS, "how": how, "what": what, "model": "candidate", "exact_match": right}
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("blind", "result"),
    [
        ([0.0] * 60, "pass"),
        ([1.0] * 60, "fail"),
        ([1.0] * 59 + [0.0], "unclear"),
    ],
    ids=["looks", "does not look", "cannot be told"],
)
def test_a_candidate_must_be_better_with_the_right_pictures(blind: list[float], result: str) -> None:
    (check,) = judge_blind(blind_of(blind), scores_of([1.0] * 60), GateConfig(metric="exact_match"))
    assert (check.name, check.result) == ("pictures:another", result)
    assert "another row's" in check.reason


def test_looking_and_listening_are_told_apart() -> None:
    blind = pd.concat([blind_of([0.0] * 60), blind_of([1.0] * 60, what="recordings")])
    checks = judge_blind(blind, scores_of([1.0] * 60), GateConfig(metric="exact_match"))
    assert {check.name: check.result for check in checks} == {
        "pictures:another": "pass",
        "recordings:another": "fail",
    }
    (said,) = (check.reason for check in checks if check.result == "fail")
    assert "own recordings than with another row's: nothing shows that the candidate listens" in said


def test_a_metric_of_which_less_is_better_counts_the_other_way() -> None:
    table = scores_of([0.2] * 60).rename(columns={"exact_match": "answer_nll"})
    worse = blind_of([0.9] * 60, "without").rename(columns={"exact_match": "answer_nll"})
    (check,) = judge_blind(worse, table, GateConfig(metric="answer_nll"))
    assert check.result == "pass" and check.mean == pytest.approx(0.7)


def test_blind_rows_without_their_row_are_refused() -> None:
    with pytest.raises(RatchetError, match="not scored"):
        judge_blind(blind_of([0.0] * 60), scores_of([1.0] * 60).iloc[1:], GateConfig(metric="exact_match"))
