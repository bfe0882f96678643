"""Scores by group: Fairlearn's figures are those of plain means, and a field or a package that is missing is
named before any model answers.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from evaluated import evaluate

from ratchet.audits.fairness import describe_groups, group_columns, require_fairlearn
from ratchet.config.evaluation import GateConfig
from ratchet.data.examples import Message, make_example
from ratchet.errors import ConfigError, DataError
from ratchet.evaluation.report import decode_metrics
from ratchet.gate.guardrails import judge_groups
from ratchet.promotion.verdict import Candidate, Rival, Verdict
from ratchet.reporting.markdown import model_card


def table(shares: dict[str, dict[str, float]], rows: int = 100) -> pd.DataFrame:
    """model → group → share of right answers."""
    lines = []
    for model, groups in shares.items():
        for group, share in groups.items():
            for place in range(rows):
                lines.append(
                    {
                        "id": f"{group}{place}",
                        "model": model,
                        "group:region": group,
                        "exact_match": float(place * 37 % rows < share * rows),
                        "answer_nll": 1.0,
                    }
                )
    return pd.DataFrame(lines)


def groups(*given: Any, **named: Any) -> Any:
    return msgspec.to_builtins(describe_groups(*given, **named))


def test_the_figures_are_means_by_group_their_difference_and_their_ratio():
    found = groups(
        table({"candidate": {"north": 0.9, "south": 0.6, "": 0.1}}),
        ["region"],
        ["exact_match", "answer_nll"],
        draws=40,
    )["region"]
    figures = found["exact_match"]["candidate"]
    assert {group: part["mean"] for group, part in figures["by_group"].items()} == pytest.approx(
        {"north": 0.9, "south": 0.6}
    )
    assert figures["difference"]["mean"] == pytest.approx(0.3)
    assert figures["ratio"]["mean"] == pytest.approx(2 / 3)
    for part in (*figures["by_group"].values(), figures["difference"], figures["ratio"]):
        assert part["low"] < part["mean"] < part["high"]
    assert found["answer_nll"]["candidate"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_ratio_to_nothing_is_left_out_and_so_is_a_small_group():
    found = groups(table({"base": {"north": 0.0, "south": 0.0}}), ["region"], ["exact_match"], draws=40)[
        "region"
    ]["exact_match"]["base"]
    assert found["ratio"] is None
    small = pd.concat(
        [table({"base": {"north": 0.5, "south": 0.5}}), table({"base": {"isle": 1.0}}, rows=19)]
    )
    assert set(
        groups(small, ["region"], ["exact_match"], draws=40)["region"]["exact_match"]["base"]["by_group"]
    ) == {"north", "south"}


def test_equal_gaps_are_seldom_called_wider():
    """Two models of the same kind on fresh rows, 40 times, with no margin.

    The binomial's 99 % limit at 5 % is 6.
    """
    called = 0
    for cycle in range(40):
        generator = np.random.default_rng(cycle)
        lines = table({"candidate": {"a": 0, "b": 0, "c": 0}, "champion": {"a": 0, "b": 0, "c": 0}}, rows=80)
        lines["exact_match"] = (generator.random(len(lines)) < 0.6).astype(float)
        [check] = judge_groups(
            lines, ["region"], "champion", GateConfig(group_margin=0.0, resamples=200, seed=cycle)
        )
        called += check.result == "fail"
    assert called <= 6


def test_a_gap_in_a_metric_of_which_less_is_better_is_a_gap():
    lines = table({"candidate": {"north": 1, "south": 1}, "champion": {"north": 1, "south": 1}})
    lines.loc[(lines.model == "candidate") & (lines["group:region"] == "south"), "answer_nll"] = 2.0
    [check] = judge_groups(lines, ["region"], "champion", GateConfig(metric="answer_nll", resamples=200))
    assert (check.result, check.mean) == ("fail", -1.0)


def test_without_fairlearn_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("ratchet.audits.fairness.find_spec", lambda name: None)
    require_fairlearn([])
    with pytest.raises(
        ConfigError, match=r"(?s)evaluate\.groups names region, and Fairlearn is not installed.*fairness"
    ):
        require_fairlearn(["region"])


def test_a_field_that_no_row_has_is_named():
    row = make_example([Message("user", "a"), Message("assistant", "b")], {"batch": "x", "region": "north"})
    assert group_columns([row], ["region"]) == {"group:region": ["north"]}
    with pytest.raises(DataError, match=r"evaluate\.groups names 'age', which no test row has"):
        group_columns([row], ["region", "age"])


def test_an_evaluation_tells_its_groups_and_the_card_shows_them(
    tmp_path, prepared, tiny_base, nobody, candidate, tiny_config
):
    config = tiny_config.model_copy(
        update={
            "evaluate": tiny_config.evaluate.model_copy(update={"groups": ["batch"], "metrics": ["chrf"]})
        }
    )
    metrics = evaluate(prepared, tiny_base, nobody, candidate, tmp_path / "out", config)
    found = pd.read_parquet(tmp_path / "out/scores.parquet")
    assert (found["group:batch"] == found.batch).all()
    assert metrics["grouped"] == ["batch"]
    sizes = found[found.model == "candidate"].batch.value_counts().to_dict()
    assert {
        group: part["rows"]
        for group, part in metrics["groups"]["batch"]["chrf"]["candidate"]["by_group"].items()
    } == {name: size for name, size in sizes.items() if size >= 20}
    card = model_card(
        decode_metrics(metrics),
        Verdict("promote", [], Rival("base", None), [], Candidate("", ""), params={"metric": "chrf"}),
        {},
    )
    assert "### chrf by batch" in card
    assert "| **difference** | | " in card
