"""Feedback as rows, from a real log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ratchet.config import Config
from ratchet.examples import row_to_messages
from ratchet.request_log import URL_VARIABLE, Feedback, Logged, open_log
from ratchet.sources.feedback import harvest

NOW = 1_790_000_000.0


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)


def configured(**settings: Any) -> Config:
    return Config.model_validate({"ingest": {"feedback": settings}, "request_log": {"retention_days": 1e5}})


def asked(id: str, **more: Any) -> Logged:
    values = {"at": NOW, "user": "ana", "arm": "champion", "version": 1, "messages": (("user", f"why {id}?"),), "answer": "so", "finish": "stop"}
    return Logged(id=id, **values | more)


def said(request: str, score: float | None = None, user: str = "", answer: str = "") -> Feedback:
    return Feedback(request, user, NOW, score=score, answer=answer)


def rows_of(root: Path, requests: list[Logged], feedback: list[Feedback], **settings: Any) -> list[dict[str, Any]]:
    config = configured(**settings)
    log = open_log(root, config)
    for request in requests:
        log.put(request)
    for one in feedback:
        log.add_feedback(one)
    log.close()
    return harvest(root, config)


def answers(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Request → (answer to learn, how it is known)."""
    return {row["meta"]["source_request"]: (row["messages"][-1]["content"], row["meta"]["how"]) for row in rows}


def test_a_row_is_the_conversation_with_the_right_answer(tmp_path: Path) -> None:
    turns = (("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"))
    rows = rows_of(tmp_path, [asked("a", messages=turns)], [said("a", 1.0)])

    assert rows == [
        {
            "messages": [*({"role": role, "content": content} for role, content in turns), {"role": "assistant", "content": "so"}],
            "meta": {"kind": "feedback", "source_request": "a", "how": "approved"},
        }
    ]
    assert len(row_to_messages(rows[0], "messages")) == 5


def test_a_corrected_answer_wins_over_the_given_one(tmp_path: Path) -> None:
    feedback = [said("a", 1.0, "ben"), said("a", 0.0, answer=" not so\r\n"), said("b", 1.0)]
    rows = rows_of(tmp_path, [asked("a"), asked("b")], feedback)

    assert answers(rows) == {"a": ("not so", "corrected"), "b": ("so", "approved")}


def test_contradictory_corrections_give_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback = [said("a", answer="one"), said("a", answer="two", user="ben"), said("b", answer="same"), said("b", answer="same ", user="ben")]

    assert answers(rows_of(tmp_path, [asked("a"), asked("b")], feedback)) == {"b": ("same", "corrected")}
    assert capsys.readouterr().err == "feedback: 1 rows; left out: 1 contradictory\n"


def test_approval_needs_the_mean_score_and_nobody_against_it(tmp_path: Path) -> None:
    scores = {"enough": (1.0, 0.7), "too low": (0.7, 0.7), "contrary": (1.0, 1.0, 1.0, 1.0, 0.4), "silent": (None,)}
    feedback = [said(request, score, f"user {place}") for request, given in scores.items() for place, score in enumerate(given)]

    assert list(answers(rows_of(tmp_path, [asked(request) for request in scores], feedback, min_score=0.8))) == ["enough"]


@pytest.mark.parametrize("finish", ["length", "error", "cancelled"])
def test_an_answer_that_broke_off_is_nothing_to_learn_but_its_correction_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], finish: str) -> None:
    requests = [asked("a", finish=finish), asked("b", finish=finish)]

    assert answers(rows_of(tmp_path, requests, [said("a", 1.0), said("b", answer="whole")])) == {"b": ("whole", "corrected")}
    assert "1 broken off" in capsys.readouterr().err


def test_redacted_texts_give_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [asked("a", messages=(("user", "who is ana@example.org?"),)), asked("b"), asked("c", answer="ask ana@example.org")]

    assert rows_of(tmp_path, requests, [said("a", 1.0), said("b", answer="ana@example.org"), said("c", 1.0)]) == []
    assert "3 redacted" in capsys.readouterr().err


def test_one_user_brings_at_most_so_many_rows_the_oldest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [asked(str(number), at=NOW - number) for number in range(4)] + [asked("ben", user="ben"), asked("n1", user=""), asked("n2", user="")]
    rows = rows_of(tmp_path, requests, [said(request.id, 1.0) for request in requests], max_rows_per_user=2)

    assert list(answers(rows)) == ["3", "2", "ben", "n1", "n2"]
    assert "2 too many of one user" in capsys.readouterr().err


def test_a_row_counts_for_who_taught_it_not_for_who_asked(tmp_path: Path) -> None:
    requests = [asked(str(number), user=f"user {number}") for number in range(3)]

    assert len(rows_of(tmp_path, requests, [said(request.id, answer="mine", user="eve") for request in requests], max_rows_per_user=1)) == 1


def test_without_texts_or_feedback_there_are_no_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rows_of(tmp_path, [asked("a")], []) == [] and not capsys.readouterr().err
    assert rows_of(tmp_path, [asked("b", messages=())], [said("b", 1.0)]) == [] and "1 without texts" in capsys.readouterr().err
