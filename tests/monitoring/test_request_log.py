"""The request log against a real SQLite, and against PostgreSQL where one is installed."""

from __future__ import annotations

import math
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import scaled

from ratchet.config.params import Config
from ratchet.errors import ConfigError, ServiceError, UserError
from ratchet.monitoring.pictures import Look
from ratchet.monitoring.request_log import URL_VARIABLE, RequestLog, open_log
from ratchet.monitoring.request_records import Feedback, Logged

NOW = 1_790_000_000.0  # a moment in an hour, not at its start
Open = Callable[..., RequestLog]


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)


@pytest.fixture
def open_here(tmp_path: Path) -> Iterator[Open]:
    """Logs in the test's folder, closed when it ends."""
    opened: list[RequestLog] = []

    def make(**settings: Any) -> RequestLog:
        opened.append(open_log(tmp_path, configured(**settings)))
        return opened[-1]

    yield make
    for log in opened:
        log.close()


def configured(**settings: Any) -> Config:
    return Config.model_validate({"request_log": {"keep_days": 1e5} | settings})


def asked(id: str, **more: Any) -> Logged:
    values = {
        "at": NOW,
        "user": "ana",
        "arm": "champion",
        "version": 1,
        "messages": (("user", "why?"),),
        "answer": "so",
        "finish": "stop",
        "latency_ms": 10.0,
    }
    return Logged(id=id, **values | more)


def fill(log: RequestLog, *records: Logged) -> None:
    for record in records:
        log.put(record)
    assert log.flush()


# --- writing ------------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_whole(open_here: Open) -> None:
    record = asked(
        "a",
        rollout="r1",
        step=2,
        messages=(("system", "be brief"), ("user", "Grüße 👋")),
        prompt_nll=1.5,
        prompt_tokens=7,
        queue_ms=0.5,
        error="none",
        pictures=(Look("a.png", (1.5, 0.0, 0.25, 0.0, -13.8, 0.0)),),
    )
    log = open_here()
    fill(log, record)

    assert log.window(limit=10) == [record] and log.counts() == (1, 0, 0, "")
    assert record.prompt == "Grüße 👋"


def test_putting_costs_less_than_20_microseconds(open_here: Open) -> None:
    """Of this thread's own CPU time, in the cheapest hundred: others on the machine change neither."""
    log, records = open_here(), [asked(str(number)) for number in range(2000)]
    spent = []
    for start in range(0, len(records), 100):
        began = time.thread_time()
        for record in records[start : start + 100]:
            log.put(record)
        spent.append(time.thread_time() - began)

    assert min(spent) / 100 < 20e-6
    assert log.flush(scaled(20)) and log.count() == 2000


def test_many_threads_lose_nothing(open_here: Open) -> None:
    log = open_here()
    threads = [
        threading.Thread(
            target=lambda name=name: [log.put(asked(f"{name}-{number}")) for number in range(200)]
        )
        for name in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert log.flush() and log.count() == 1600 and log.counts().dropped == 0


def test_a_full_queue_drops_and_counts(open_here: Open) -> None:
    log = open_here(queue=10, url="sqlite:////nowhere/at/all/requests.db")
    for number in range(25):
        log.put(asked(str(number)))

    assert log.counts().waiting == 10 and log.counts().dropped == 15


def test_a_database_that_is_away_is_written_when_it_comes_back(open_here: Open, tmp_path: Path) -> None:
    log = open_here(url=f"sqlite:///{tmp_path / 'later' / 'requests.db'}")
    log.put(asked("a"))
    assert not log.flush(0.3)
    assert log.counts().waiting == 1 and "does not answer" in log.counts().fault
    (tmp_path / "later").mkdir()
    log.put(asked("b"))

    assert log.flush() and log.count() == 2 and log.counts() == (2, 0, 0, "")


def test_what_cannot_be_written_by_the_end_is_counted(open_here: Open) -> None:
    log = open_here(url="sqlite:////nowhere/at/all/requests.db")
    log.put(asked("a"))
    log.close()
    log.put(asked("b"))

    assert log.counts()[:3] == (0, 0, 2)


def test_closing_writes_what_waits(open_here: Open) -> None:
    log = open_here()
    log.put(asked("a"))
    log.close()

    assert open_here().count() == 1


def test_a_refused_record_costs_itself_alone(open_here: Open) -> None:
    log = open_here()
    fill(log, asked("a"))
    fill(log, *(asked(id) for id in ("b", "a", "c")))

    assert log.count() == 3 and log.counts()[:3] == (3, 0, 1) and "refused" in log.counts().fault


def test_halves_of_characters_and_nul_are_written(open_here: Open) -> None:
    log = open_here()
    fill(log, asked("a", messages=(("user", "a\ud800b\0c"),), answer="\udfff"))

    assert (
        log.window(limit=1)[0].messages == (("user", "a?b\ufffdc"),) and log.window(limit=1)[0].answer == "?"
    )


def test_another_process_can_read_while_it_is_written(open_here: Open, tmp_path: Path) -> None:
    log = open_here()
    fill(log, asked("a"))
    with sqlite3.connect(tmp_path / ".ratchet/requests.db") as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM requests").fetchone() == (1,)
        fill(log, asked("b"))
        assert reader.execute("SELECT count(*) FROM requests").fetchone() == (1,)
    reader.close()

    assert log.count() == 2


def test_a_url_that_is_none_is_a_fault_of_the_config(
    open_here: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no SQLAlchemy URL"):
        open_here(url="requests.db")
    with pytest.raises(ConfigError, match="no SQLAlchemy URL"):
        open_here(url="what://host/requests")
    with pytest.raises(ConfigError, match="needs the package"):
        open_here(url="mysql+pymysql://host/requests")
    monkeypatch.setenv(URL_VARIABLE, "nothing")
    with pytest.raises(ConfigError, match="no SQLAlchemy URL"):
        open_here()


def test_two_processes_write_into_one_file(open_here: Open, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from ratchet.config.params import Config
from ratchet.monitoring.request_records import Logged; from ratchet.monitoring.request_log import open_log
log = open_log(Path(sys.argv[1]), Config())
for number in range(500):
    log.put(Logged(id=f"{sys.argv[2]}-{number}", at=time.time(), user="ana", arm="champion", version=1))
log.close(30)
sys.exit(log.counts().written != 500)
"""
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), name], cwd=Path(__file__).parents[2])
        for name in ("one", "two")
    ]

    assert [process.wait(scaled(60)) for process in started] == [0, 0]
    assert open_here().count() == 1000


# --- what is kept -------------------------------------------------------------------------------------------


def test_what_the_patterns_find_is_never_written(open_here: Open, tmp_path: Path) -> None:
    log = open_here()
    fill(
        log,
        asked(
            "a",
            messages=(("system", "of ben@example.org"), ("user", "my card 4111 1111 1111 1111")),
            answer="write to ana@example.org",
            error="sk-aaaaaaaaaaaa",
        ),
    )
    log.add_feedback(
        Feedback(
            "a",
            "ana",
            NOW,
            answer="it is eve@example.org",
            comment="call eve@example.org",
            label="eve@example.org",
        )
    )
    log.close()

    stored = b"".join(path.read_bytes() for path in (tmp_path / ".ratchet").glob("requests.db*"))
    assert not re.search(rb"example\.org|4111|sk-aaaa", stored)
    assert stored.count(b"[redacted]") >= 7


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("request_log.redact holds '(unclosed'")):
        RequestLog("sqlite://", configured(redact=["fine", "(unclosed"]))


def test_without_texts_only_figures_are_kept(open_here: Open) -> None:
    log = open_here(texts=False)
    fill(log, asked("a", rollout="r1", step=0), asked("b", answer=" ", rollout="r1", step=0))
    log.add_feedback(Feedback("a", "ana", NOW, score=1.0, answer="no", comment="well"))

    assert [(record.messages, record.answer, record.latency_ms) for record in log.window(limit=5)] == [
        ((), "", 10.0)
    ] * 2
    assert log.feedback_of(["a"])["a"] == [Feedback("a", "ana", NOW, score=1.0)]
    assert log.rollout_units("r1")[0].empty == 1


def test_old_requests_go_and_their_feedback_with_them(open_here: Open) -> None:
    now = time.time()
    log = open_here(keep_days=1)
    for request in ("old", "new"):
        log.add_feedback(Feedback(request, "ana", now, score=1.0))
    fill(log, asked("old", at=now - 90_000), asked("new", at=now))
    until = time.monotonic() + scaled(5)
    while log.count() > 1 and time.monotonic() < until:
        time.sleep(0.02)

    assert [record.id for record in log.window(limit=5)] == ["new"]
    assert list(log.feedback_of(["old", "new"])) == ["new"]


# --- feedback -----------------------------------------------------------------------------------------------


def test_one_user_has_one_say_on_an_answer_the_later_one(open_here: Open) -> None:
    log = open_here()
    log.add_feedback(Feedback("a", "ana", NOW, score=1.0, comment="fine", sender="k1"))
    log.add_feedback(Feedback("a", "ben", NOW + 1, score=0.0))
    log.add_feedback(Feedback("a", "ana", NOW + 2, answer="better", sender="k1"))

    assert log.feedback_of(["a", "b"])["a"] == [
        Feedback("a", "ben", NOW + 1, score=0.0),
        Feedback("a", "ana", NOW + 2, answer="better", sender="k1"),
    ]


def test_another_key_cannot_speak_for_a_user_who_has_spoken(open_here: Open) -> None:
    log = open_here()
    log.add_feedback(Feedback("a", "ana", NOW, score=1.0, sender="k1"))
    for sender in ("k2", ""):
        with pytest.raises(UserError, match="already, sent with another key"):
            log.add_feedback(Feedback("a", "ana", NOW + 2, score=0.0, sender=sender))

    assert [said.score for said in log.feedback_of(["a"])["a"]] == [1.0]


def test_a_database_of_an_earlier_release_is_read_and_written(open_here: Open, tmp_path: Path) -> None:
    (tmp_path / ".ratchet").mkdir()
    with sqlite3.connect(tmp_path / ".ratchet/requests.db") as earlier:
        texts = "label TEXT, answer TEXT, comment TEXT"
        earlier.execute(
            "CREATE TABLE feedback (request VARCHAR NOT NULL, user VARCHAR NOT NULL, at FLOAT, score FLOAT, "
            f"{texts}, PRIMARY KEY (request, user))"
        )
        earlier.execute("INSERT INTO feedback VALUES ('a', 'ana', 1.0, 0.5, '', 'so', '')")
    earlier.close()
    log, other = open_here(), open_here()
    other.add_feedback(Feedback("a", "ben", 2.0, score=1.0, sender="k1"))

    assert log.feedback_of(["a"])["a"] == [
        Feedback("a", "ana", 1.0, score=0.5, answer="so"),
        Feedback("a", "ben", 2.0, score=1.0, sender="k1"),
    ]
    with sqlite3.connect(tmp_path / ".ratchet/requests.db") as earlier:  # which may still run
        earlier.execute(
            "INSERT INTO feedback (request, user, at, score, label, answer, comment) VALUES ('b', 'ana', "
            "3.0, 1.0, '', '', '')"
        )
    earlier.close()
    assert log.feedback_of(["b"])["b"] == [Feedback("b", "ana", 3.0, score=1.0)]


def test_requests_of_a_release_that_knew_no_pictures_are_read(open_here: Open, tmp_path: Path) -> None:
    log = open_here()
    fill(log, asked("a"))
    log.close()
    with sqlite3.connect(tmp_path / ".ratchet/requests.db") as earlier:
        earlier.execute("ALTER TABLE requests DROP COLUMN pictures")
    earlier.close()
    assert [record.pictures for record in open_here().window(limit=10)] == [()]


def test_processes_that_add_a_column_at_once_do_not_stop_each_other(tmp_path: Path) -> None:
    (tmp_path / ".ratchet").mkdir()
    with sqlite3.connect(tmp_path / ".ratchet/requests.db") as earlier:
        earlier.execute(
            "CREATE TABLE feedback (request VARCHAR NOT NULL, user VARCHAR NOT NULL, at FLOAT, score FLOAT, "
            "label TEXT, answer TEXT, comment TEXT)"
        )
    earlier.close()
    logs = [open_log(tmp_path, configured()) for _ in range(6)]
    faults: list[Exception] = []

    def look(log: RequestLog) -> None:
        try:
            log.feedback_of(["a"])
            log.first_seen()
        except Exception as error:  # noqa: BLE001
            faults.append(error)

    threads = [threading.Thread(target=look, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    assert faults == []


def test_a_user_is_first_seen_when_they_first_asked_or_spoke(log: RequestLog) -> None:
    fill(log, asked("a", at=NOW + 5), asked("b", at=NOW + 3), asked("n", user="", at=NOW + 1))
    log.add_feedback(Feedback("a", "ana", NOW + 4, score=1.0))
    log.add_feedback(Feedback("gone", "ben", NOW + 2, score=1.0))

    assert log.first_seen() == {"ana": NOW + 3, "": NOW + 1, "ben": NOW + 2}
    assert log.unknown_requests() == 1


@pytest.mark.parametrize("score", [math.nan, math.inf, -0.1, 1.1])
def test_a_score_that_is_none_is_refused(open_here: Open, score: float) -> None:
    with pytest.raises(UserError, match="wanted 0"):
        open_here().add_feedback(Feedback("a", "ana", NOW, score=score))


def test_feedback_may_come_before_its_request_is_written(open_here: Open) -> None:
    log = open_here()
    log.add_feedback(Feedback("a", "ana", NOW, score=1.0))
    assert log.spoken_of() == []
    fill(log, asked("a"), asked("b"))

    assert [(request.id, len(said)) for request, said in log.spoken_of()] == [("a", 1)]


def test_feedback_and_readers_say_that_the_database_is_away(open_here: Open) -> None:
    log = open_here(url="sqlite:////nowhere/at/all/requests.db")
    with pytest.raises(ServiceError, match="request log does not answer"):
        log.add_feedback(Feedback("a", "ana", NOW))
    with pytest.raises(ServiceError, match="request log does not answer"):
        log.window(limit=1)


# --- reading: the same in both databases --------------------------------------------------------------------


# URL of a database that the tests may empty, such as postgresql+psycopg://user@127.0.0.1/tests
POSTGRES = "RATCHET_TEST_POSTGRES"


@pytest.fixture(params=["sqlite", "postgresql"])
def log(request: pytest.FixtureRequest, open_here: Open) -> RequestLog:
    if request.param == "sqlite":
        return open_here()
    pytest.importorskip("psycopg", reason="psycopg is not installed (pip install 'ratchet[store]')")
    if not os.environ.get(POSTGRES):
        pytest.skip(f"{POSTGRES} names no database")
    log = open_here(url=os.environ[POSTGRES])
    with log.transaction() as connection:
        for table in log._tables.values():
            connection.execute(table.delete())
    return log


def test_a_window_is_the_newest_in_the_order_of_time(log: RequestLog) -> None:
    fill(log, *(asked(f"{number}", at=NOW + number, version=1 + number % 2) for number in (3, 0, 5, 1, 4, 2)))

    def ids(**bounds: Any) -> list[str]:
        return [record.id for record in log.window(**bounds)]

    assert ids(limit=3) == ["3", "4", "5"]
    assert ids(limit=9, since=NOW + 1, until=NOW + 4) == ["1", "2", "3"]
    assert ids(limit=2, version=1) == ["2", "4"]
    assert (log.count(), log.count(since=NOW + 4), log.count(version=2)) == (6, 2, 3)


def test_a_unit_is_a_user_in_a_step_and_a_request_without_one_is_its_own(log: RequestLog) -> None:
    records = [
        asked("b1", at=NOW + 1, user="ben", arm="challenger", latency_ms=10.0),
        asked("a1", at=NOW + 2, latency_ms=20.0),
        asked("b2", at=NOW + 3, user="ben", arm="challenger", latency_ms=30.0, answer=" "),
        asked("b3", at=NOW + 4, user="ben", arm="challenger", latency_ms=99.0, status=503, answer=""),
        asked("n1", at=NOW + 5, user=""),
        asked("n2", at=NOW + 6, user="", status=499, finish="cancelled", answer=""),
        asked("b4", at=NOW + 7, user="ben", arm="challenger", step=1),
        asked("x", at=NOW, rollout="another"),
    ]
    fill(
        log,
        *(
            record
            if record.rollout
            else Logged(
                **{name: getattr(record, name) for name in record.__struct_fields__}
                | {"rollout": "r1", "step": max(0, record.step)}
            )
            for record in records
        ),
    )
    for request, user, score in (
        ("b1", "ben", 1.0),
        ("b1", "eve", 0.0),
        ("b2", "ben", 1.0),
        ("b3", "ben", None),
    ):
        log.add_feedback(Feedback(request, user, NOW, score=score))

    assert log.rollout_units("r1") == [
        ("ben", 0, "challenger", NOW + 1, 3, 1, 1, 20.0, 0.75, 2),
        ("ana", 0, "champion", NOW + 2, 1, 0, 0, 20.0, None, 0),
        ("n1", 0, "champion", NOW + 5, 1, 0, 0, 10.0, None, 0),
        ("n2", 0, "champion", NOW + 6, 1, 0, 0, None, None, 0),
        ("ben", 1, "challenger", NOW + 7, 1, 0, 0, 10.0, None, 0),
    ]
    assert log.rollout_units("unknown") == []


def test_traffic_is_by_hour_and_version(log: RequestLog) -> None:
    hour = int(NOW // 3600) * 3600
    fill(
        log,
        asked("early", at=hour - 10.0),
        asked("a", at=hour + 0.0),
        asked("b", at=hour + 3599.9, status=500, answer=""),
        asked("c", at=hour + 1.0, version=2, arm="challenger"),
        asked("d", at=hour + 3600.0),
    )
    log.add_feedback(Feedback("a", "ana", NOW, score=0.0))
    log.add_feedback(Feedback("c", "ana", NOW, score=1.0))

    assert log.traffic(since=hour) == [
        (1, "champion", hour, 2, 1, 10.0, 0.0, 1),
        (2, "challenger", hour, 1, 0, 10.0, 1.0, 1),
        (1, "champion", hour + 3600, 1, 0, 10.0, None, 0),
    ]


def test_texts_that_databases_do_not_take_are_written(log: RequestLog) -> None:
    fill(log, asked("a", messages=(("user", "a\0\ud800"),), user="x" * 3000))

    assert len(log.window(limit=1)[0].user) == 3000 and log.counts().dropped == 0
