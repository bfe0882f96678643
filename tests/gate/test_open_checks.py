"""What `ratchet gate more` says is open, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flows.ingest import ingest
from flows.more_rows import VERDICT, open_verdict
from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.files import write_json, write_text
from ratchet.gate.open_checks import Open, open_checks
from ratchet.promotion.verdict import Candidate, Check, Rival, Verdict

BATCH = "20260101T000000Z-hotels-0a1b2c3d.jsonl"
GAIN = {"mean": 0.01, "low": -0.03, "high": 0.05, "wanted": 0.0}


def verdict(checks: list[Check], said: str = "uncertain", version: int | None = None) -> Verdict:
    rival = Rival("base" if version is None else "champion", version)
    return Verdict(said, [], rival, checks, Candidate("key", "sha"))


def unclear(name: str, needed: int | msgspec.UnsetType | None, **gain: float) -> Check:
    return Check(name, "exact_match", 310, "unclear", "", **gain, needed=needed)


def test_each_open_check_says_how_many_rows_of_which_kind():
    found = open_checks(
        verdict(
            [
                unclear("success", 540, **GAIN),
                Check("answer_nll", "answer_nll", 310, "pass", ""),
                unclear(f"past:{BATCH}", 90, **GAIN),
                unclear("golden", None, **GAIN),
                unclear("metric:judge_correctness", msgspec.UNSET),
                unclear("leaks", msgspec.UNSET),
            ]
        )
    )
    assert found == [
        Open("success", 310, 540, "test"),
        Open(f"past:{BATCH}", 310, 90, "batch", BATCH),
        Open("golden", 310, None, "golden"),
        Open("metric:judge_correctness", 310, None, "none"),
        Open("leaks", 310, None, "none"),
    ]


@pytest.mark.parametrize(
    ("said", "version", "told"),
    [
        ("reject", None, "the last verdict is `reject`"),
        ("promote", None, "the last verdict is `promote`"),
        ("uncertain", 3, "compared with v3, which is not in charge any more"),
    ],
)
def test_a_verdict_that_more_rows_cannot_change_is_refused(tmp_path, said, version, told):
    write_json(tmp_path / VERDICT, msgspec.to_builtins(verdict([], said, version)))
    with pytest.raises(UserError, match=told):
        open_verdict(tmp_path)


def test_without_a_verdict_there_is_nothing_to_judge_again(tmp_path):
    with pytest.raises(UserError, match="no candidate was judged"):
        open_verdict(tmp_path)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"like": "2026"}, "`like` is said of held-out rows alone"),
        ({"held_out": True, "golden": 5}, "golden rows are held out already"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_read(
    tmp_path: Path, given: dict[str, object], told: str
) -> None:
    write_text(tmp_path / "params.yaml", render_params(Config()))
    with pytest.raises(UserError, match=told):
        ingest.fn(root=str(tmp_path), path="no-such-file.jsonl", **given)
