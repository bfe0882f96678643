"""The quality of answers in the flow `monitor`: real requests in the log, a judge behind HTTP, questions in
the review queue, and people's decisions there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from patience import scaled
from servers import serving
from teacher_stub import BROKEN, DATA, TeacherStub

from ratchet.config.params import Config
from ratchet.errors import ConfigError
from ratchet.files import read_json
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.request_records import Logged
from ratchet.monitoring.verdicts import Quality, Recorded, Verdict
from ratchet.reporting.markdown import drift_card
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision, Item
from ratchet.services.status import verdict_lines
from tasks.monitor import Facts, decide, with_quality
from tasks.quality import MOST_DAYS, STATE, watch_quality

DAY, START = 86_400.0, 1_790_000_000.0 - 1_790_000_000.0 % 86_400  # a midnight, UTC
A_DAY = 40


def verdict(prompt: str) -> dict[str, Any]:
    """Score by the word `right`, except for one answer in twenty."""
    answer = DATA.findall(prompt)[-1]
    return {"score": float(("right" in answer) != answer.endswith("7 of 20")), "reason": "so"}


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATCHET_REQUEST_LOG_URL", raising=False)


@pytest.fixture
def stub() -> TeacherStub:
    return TeacherStub(answer=verdict)


@pytest.fixture
def config(stub: TeacherStub) -> Iterator[Config]:
    with serving(stub) as url:
        yield configured(
            {"url": f"{url}/v1", "model": "big", "tries": 1, "parallel": 16, "timeout": scaled(5)}
        )


def configured(judge: dict[str, Any], **more: Any) -> Config:
    quality = {"labels_per_day": 20, "judge": judge} | more
    return Config.model_validate({"request_log": {"keep_days": 1e5}, "monitor": {"quality": quality}})


def ask_model(root: Path, config: Config, day: int, wrong: int, number: int = A_DAY, **more: Any) -> None:
    """One day of traffic, of which one answer in `wrong` is wrong."""
    log = open_log(root, config)
    for place in range(number):
        word = "wrong" if place % wrong == 0 else "right"
        values = {
            "at": START + day * DAY + 60 + place * 2000,
            "messages": (("system", "Be brief."), ("user", f"day {day}, question {place}?")),
            "answer": f"{word}, {place % 20} of 20",
        } | more
        log.put(Logged(f"{day}-{place}", user="", arm="champion", version=1, **values))
    assert log.flush()
    log.close()


def look(root: Path, config: Config, day: int, version: int = 1) -> Quality:
    found = watch_quality(root, config, version, START + (day + 1) * DAY)
    assert found is not None
    return found


def waiting(root: Path) -> list[Item]:
    queue = ReviewQueue(root)
    try:
        return queue.pending(limit=1000)
    finally:
        queue.close()


def answer_all(root: Path, *, share: int = 1) -> int:
    """A person says of every `share`-th question whether its answer is right."""
    queue, asked = ReviewQueue(root), waiting(root)[::share]
    words = ("accept" if "right" in item.messages[-1].content else "reject" for item in asked)
    queue.decide_all(
        Decision(item.id, item.draft, word, by="Ana") for item, word in zip(asked, words, strict=True)
    )
    queue.close()
    return len(asked)


# --- whom it asks ---


def test_without_labels_a_day_nothing_is_watched(tmp_path):
    ask_model(tmp_path, Config(), 0, 5)
    assert watch_quality(tmp_path, Config(), 1, START + DAY) is None
    assert not (tmp_path / STATE).exists()


def test_every_request_is_judged_once_and_as_many_questions_asked_as_wanted(tmp_path, config, stub):
    ask_model(tmp_path, config, 0, 5)
    found = look(tmp_path, config, 0)
    items = waiting(tmp_path)
    assert (found.requests, found.answers, found.waiting, stub.requests) == (A_DAY, 0, 20, A_DAY)
    assert len(items) == 20 and {item.draft for item in items} == {"quality-v1-20260921"}
    assert items[0].messages[0].role == "system" and items[0].messages[-1].role == "assistant"
    again = look(tmp_path, config, 0)
    assert again == found and stub.requests == A_DAY and waiting(tmp_path) == items


def test_the_probability_of_each_question_is_kept_and_the_judge_hidden_from_people(tmp_path, config):
    ask_model(tmp_path, config, 0, 5)
    look(tmp_path, config, 0)
    questions = read_json(tmp_path / STATE)["questions"]
    assert all(question["inclusion"] == pytest.approx(20 / A_DAY) for question in questions)
    assert {question["score"] for question in questions} <= {0.0, 1.0}
    assert all("score" not in str(item.meta) for item in waiting(tmp_path))
    assert "question 0?" not in (tmp_path / STATE).read_text()  # the file holds no text of users


def test_a_question_that_was_asked_before_is_answered_by_the_same_decision(tmp_path, config):
    same = {"messages": (("user", "why?"),), "answer": "right, 1 of 20"}
    ask_model(tmp_path, config, 0, 5, **same)
    assert look(tmp_path, config, 0).waiting == len(waiting(tmp_path)) == 1
    answer_all(tmp_path)
    ask_model(tmp_path, config, 1, 5, **same)
    found = look(tmp_path, config, 1)
    assert (found.answers, found.waiting) == (40, 0)


def test_what_nobody_can_be_shown_is_no_question(tmp_path, config, stub):
    ask_model(tmp_path, config, 0, 5, 10, answer="")
    ask_model(tmp_path, config, 1, 5, 10, status=502)
    found = look(tmp_path, config, 1)
    assert (found.requests, found.waiting, stub.requests) == (0, 0, 0)


def test_questions_of_a_run_that_was_killed_are_asked_by_the_next(tmp_path, config):
    ask_model(tmp_path, config, 0, 5)
    look(tmp_path, config, 0)
    state, items = read_json(tmp_path / STATE), waiting(tmp_path)
    for path in (tmp_path / ".ratchet").glob("review.db*"):
        path.unlink()
    written = state | {"asking": msgspec.to_builtins(items)}  # killed between the state and the queue
    (tmp_path / STATE).write_bytes(msgspec.json.encode(written))
    assert look(tmp_path, config, 0).waiting == 20
    assert waiting(tmp_path) == items
    assert "asking" in read_json(tmp_path / STATE) and not read_json(tmp_path / STATE)["asking"]


def test_while_nobody_answers_no_more_is_asked_than_a_week_holds(tmp_path, config):
    for day in range(9):
        ask_model(tmp_path, config, day, 5)
        found = look(tmp_path, config, day)
    assert found.waiting == 20 * MOST_DAYS and found.requests == A_DAY * MOST_DAYS
    answer_all(tmp_path)
    ask_model(tmp_path, config, 9, 5)
    assert look(tmp_path, config, 9).waiting == 20


def test_another_champion_begins_anew(tmp_path, config):
    ask_model(tmp_path, config, 0, 5)
    look(tmp_path, config, 0)
    answer_all(tmp_path)
    assert look(tmp_path, config, 0).answers == 20
    assert look(tmp_path, config, 0, version=2).answers == 0


# --- what it concludes ---


def test_a_fall_is_found_with_its_day_and_quiet_answers_raise_no_alarm(tmp_path, config):
    quiet = []
    for day in range(13):
        ask_model(tmp_path, config, day, 6 if day < 8 else 2)
        look(tmp_path, config, day)
        answer_all(tmp_path)
        quiet.append(look(tmp_path, config, day))
    assert not any(found.alarm for found in quiet[:8])
    last = quiet[-1]
    assert last.alarm and last.since == "2026-09-29"
    assert last.before == pytest.approx(5 / 6, abs=0.06) and last.right == pytest.approx(1 / 2, abs=0.08)
    assert last.right - last.before < last.most_change < 0
    assert last.answers == 20 * 13 and last.requests == A_DAY * 13


def test_questions_that_nobody_answers_leave_the_estimate_where_it_is(tmp_path, config):
    for day in range(6):
        ask_model(tmp_path, config, day, 6)
        look(tmp_path, config, day)
        answer_all(tmp_path, share=3)
    found = look(tmp_path, config, 5)
    assert found.answers + found.waiting == 20 * 6 and found.waiting > 20
    assert not found.alarm and found.right == pytest.approx(5 / 6, abs=0.15)


def test_without_a_judge_people_alone_are_counted(tmp_path):
    alone = configured({})
    for day in range(3):
        ask_model(tmp_path, alone, day, 5)
        look(tmp_path, alone, day)
        answer_all(tmp_path)
    found = look(tmp_path, alone, 2)
    assert found.answers == 60 and found.right == pytest.approx(0.8, abs=0.15)
    assert not found.alarm


def test_a_judge_that_is_away_leaves_people_to_correct_it(tmp_path, config, stub):
    stub.script["question"] = [BROKEN] * 1000
    ask_model(tmp_path, config, 0, 5)
    found = look(tmp_path, config, 0)
    assert found.unscored == found.requests == A_DAY
    answer_all(tmp_path)
    assert look(tmp_path, config, 0).right == pytest.approx(0.8, abs=0.25)


def test_a_judge_without_an_address_is_refused_and_nothing_is_lost(tmp_path, config):
    with pytest.raises(ValueError, match="url is empty"):
        configured({"model": "big"})
    ask_model(tmp_path, config, 0, 5)
    nowhere = configured({"url": "ftp://127.0.0.1/v1", "model": "big"})
    with pytest.raises(ConfigError, match=r"monitor\.quality\.judge"):
        look(tmp_path, nowhere, 0)
    assert look(tmp_path, config, 0).requests == A_DAY


# --- what follows ---


def test_the_alarm_makes_the_verdict_drift_and_starts_a_retraining_like_the_others():
    quality = Quality(True, 0.7, 0.8, "2026-10-01", -0.03, 8000, 700, 12)
    calm = Verdict("no drift", 0.4, 500, 480, 100)
    assert with_quality(calm, None) == calm
    assert with_quality(calm, Quality(right=0.8)).verdict == "no drift"
    found = with_quality(calm, quality)
    assert (found.verdict, found.moved) == ("drift", ["quality"])
    decision = decide(found, Facts(900, 0, 0.0, None), Config())
    assert decision.retrain and any("right 70.0% since 2026-10-01" in line for line in decision.for_)
    recorded = Recorded(**msgspec.structs.asdict(found), at="now", version=1, decision=decision)
    for text in ("\n".join(verdict_lines(recorded)), drift_card(recorded)):
        assert "before 80.0%; it fell by at least 3.0% (700 answers of people, 12 wait" in text
    too_few = decide(
        with_quality(Verdict("too few", None, 20, 15, 50), quality), Facts(900, 0, 0.0, None), Config()
    )
    assert too_few.retrain
