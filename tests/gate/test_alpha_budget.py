"""The alpha budget: all looks together spend what was set, a promotion starts anew, a rerun costs nothing."""

from __future__ import annotations

import msgspec
import pytest
from places import make_repository, use_git_without_a_user

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.files import read_json, write_json
from ratchet.gate.alpha_budget import (
    FILE,
    alpha_of,
    look_number,
    looks_before,
    read_looks,
    rows_key,
    with_verdict,
)
from ratchet.pipeline.dvc import Workspace
from ratchet.promotion.verdict import Candidate, Rival, Verdict, read_verdict
from tasks.pin import pin_looks


def verdict(key: str, version: int | None = 7) -> Verdict:
    return Verdict("reject", ["worse"], Rival("champion", version), [], Candidate(key, "sha"))


@pytest.mark.parametrize("budget", [0.05, 0.01])
def test_all_looks_together_spend_the_budget_and_no_more(budget):
    config = GateConfig(alpha=0.4, alpha_budget=budget)
    spent = [alpha_of(look, config) for look in range(1, 100_001)]
    assert spent == sorted(spent, reverse=True)
    assert 0.9 * budget < sum(spent) < budget
    assert sum(spent[:30]) > 0.5 * budget  # what is left for later is not most of it


def test_no_look_has_more_than_alpha():
    assert alpha_of(1, GateConfig(alpha=0.002, alpha_budget=0.05)) == 0.002


def test_a_candidate_counts_once_a_champion():
    looks = with_verdict(with_verdict(with_verdict({}, verdict("a")), verdict("a")), verdict("b"))
    assert looks == {"7": ["a", "b"]}
    assert [look_number(looks, 7, key) for key in ("a", "b", "c", "")] == [2, 2, 3, 3]
    assert look_number(looks, 8, "c") == 1
    assert with_verdict({}, verdict("a", None)) == {"base": ["a"]}


def test_a_candidate_counts_again_on_other_rows():
    looks = {"7": ["a@one", "b@one", "a@two"]}
    assert [look_number(looks, 7, "a", rows) for rows in ("one", "two", "three")] == [3, 3, 4]
    assert [looks_before(looks, 7, "a", rows) for rows in ("one", "two", "three")] == [1, 1, 2]
    assert (looks_before(looks, 7, "b", "one"), looks_before(looks, 8, "a", "one")) == (0, 0)
    assert rows_key(["y", "x", "x"]) == rows_key(["x", "y"]) != rows_key(["x"])


def test_looks_of_files_from_before_rows_were_noted_are_the_candidates_own():
    assert (look_number({"7": ["a"]}, 7, "a", "one"), looks_before({"7": ["a"]}, 7, "a", "one")) == (1, 0)


def test_a_return_to_an_earlier_champion_returns_to_its_count():
    looks = with_verdict(with_verdict({"6": ["a", "b"]}, verdict("c", 7)), verdict("d", 7))
    assert (look_number(looks, 6), look_number(looks, 7)) == (3, 3)


@pytest.mark.parametrize("text", ["[]", "{}", '{"judged": []}', '{"judged": {"7": 3}}', "not JSON"])
def test_a_file_that_holds_no_looks_is_refused(tmp_path, text):
    (tmp_path / "looks.json").write_text(text)
    with pytest.raises(RatchetError, match=r"looks\.json"):
        read_looks(tmp_path / "looks.json")


def test_the_file_in_the_repository_is_read():
    assert read_looks(FILE) == {}


def test_a_retraining_counts_the_verdict_before_it_once(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    root = make_repository(tmp_path / "checkout")
    workspace = Workspace(root, root, "main")
    assert pin_looks(workspace)  # a checkout from before: the file is made
    assert not pin_looks(workspace)
    for number, key in enumerate(("a", "b"), start=1):
        write_json(root / "reports/gate.json", msgspec.to_builtins(verdict(key)))
        assert pin_looks(workspace)
        assert not pin_looks(workspace)
        assert look_number(read_looks(root / FILE), 7) == number + 1
    assert read_json(root / FILE) == {"judged": {"7": ["a", "b"]}}
    assert read_verdict(root / "reports/gate.json") == verdict("b")
