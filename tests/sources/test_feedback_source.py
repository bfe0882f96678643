"""Feedback as rows, from a real log: what counts, whose it is, and that a flood changes little."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from media_models import name_of, picture, sound

from ratchet.config.params import Config
from ratchet.data.erasure import FILE, Entry, Forgotten, write_forgotten
from ratchet.data.examples import MEDIA_MARK, Message, ToolCall, encode_line, make_example
from ratchet.data.forms import read_conversation
from ratchet.errors import DataError
from ratchet.files import write_bytes
from ratchet.gateway.auth import add_key
from ratchet.media.store import MediaStore
from ratchet.monitoring.pictures import KeptPictures, Look
from ratchet.monitoring.request_log import URL_VARIABLE, open_log
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.sources.feedback import Harvest, harvest, harvest_all
from tasks.ingest import add_batch, pull

NOW, DAY = 1_790_000_000.0, 86_400.0


@pytest.fixture(autouse=True)
def _no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)


def configured(**settings: Any) -> Config:
    train = {"max_feedback_share": settings.pop("max_feedback_share", 0.1)}
    train |= {"objective": settings.pop("objective", "sft")}
    return Config.model_validate(
        {
            "ingest": {"feedback": settings},
            "request_log": {"keep_days": 1e5},
            "train": train,
            "evaluate": {"metrics": ["exact_match", "preference"]},
        }
    )


def asked(id: str, **more: Any) -> Logged:
    values = {
        "at": NOW,
        "user": "ana",
        "arm": "champion",
        "version": 1,
        "messages": (("user", f"why {id}?"),),
        "answer": "so",
        "finish": "stop",
    }
    return Logged(id=id, **values | more)


def said(request: str, score: float | None = None, user: str = "", answer: str = "", **more: Any) -> Feedback:
    return Feedback(request, user, **{"at": NOW, "score": score, "answer": answer} | more)


def rows_of(
    root: Path, requests: list[Logged], feedback: list[Feedback], **settings: Any
) -> list[dict[str, Any]]:
    config = configured(**settings)
    log = open_log(root, config)
    for request in requests:
        log.put(request)
    for one in feedback:
        log.add_feedback(one)
    log.close()
    return harvest(root, config, now=NOW + 60)


def answers(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Request → (answer to learn, how it is known)."""
    return {
        row["meta"]["source_request"]: (row["messages"][-1]["content"], row["meta"]["how"]) for row in rows
    }


def test_a_row_is_the_conversation_with_the_right_answer(tmp_path: Path) -> None:
    turns = (("system", "be brief"), ("user", "one?"), ("assistant", "1"), ("user", "two?"))
    rows = rows_of(tmp_path, [asked("a", messages=turns)], [said("a", 1.0)])

    assert rows == [
        {
            "messages": [
                *({"role": role, "content": content} for role, content in turns),
                {"role": "assistant", "content": "so"},
            ],
            "meta": {
                "kind": "feedback",
                "source_request": "a",
                "how": "approved",
                "asked_by": "ana",
                "taught_by": "ana",
            },
        }
    ]
    assert len(read_conversation(rows[0]).messages) == 5


def test_feedback_on_a_picture_or_a_recording_is_a_row_where_it_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [picture(1), sound(2), picture(3)]
    first, second, gone = map(name_of, drawn)
    turns = (("user", f"{MEDIA_MARK}one?"), ("assistant", "1"), ("user", f"and {MEDIA_MARK}?"))
    kept = asked("a", messages=turns, pictures=(Look(first, ()), Look(second, ())))
    lost = asked("b", messages=(("user", f"{MEDIA_MARK}?"),), pictures=(Look(gone, ()),))
    KeptPictures(tmp_path).keep({first: drawn[0], second: drawn[1]})
    (row,) = rows_of(tmp_path, [kept, lost], [said("a", 0.0, answer="red"), said("b", 1.0)])

    conversation = read_conversation(row)
    assert [message.media for message in conversation.messages] == [(first,), (), (second,), ()]
    assert [message.content for message in conversation.messages[2:]] == [f"and {MEDIA_MARK}?", "red"]
    monkeypatch.setattr(time, "time", lambda: NOW + 60)
    pulled = pull(configured(), root=tmp_path, source="feedback")
    batch, _ = add_batch(tmp_path / "raw", pulled, licence="", who="tests")
    assert (batch.pictures, batch.sounds) == (1, 1)
    assert MediaStore.read(tmp_path / "raw")[second] == drawn[1]


def test_a_corrected_answer_wins_over_the_given_one(tmp_path: Path) -> None:
    feedback = [said("a", 1.0, "ben"), said("a", 0.0, answer=" not so\r\n"), said("b", 1.0)]
    rows = rows_of(tmp_path, [asked("a"), asked("b")], feedback)

    assert answers(rows) == {"a": ("not so", "corrected"), "b": ("so", "approved")}


VOTES = [
    said("good", 1.0),
    said("bad", 0.0),
    said("mended", 0.0, answer="rather so"),
    said("doubtful", 0.5),
    said("broken", 0.0),
    said("cut", 0.0, answer="whole"),
]
ASKED = [
    asked(vote.request, finish="length" if vote.request in ("broken", "cut") else "stop") for vote in VOTES
]


def test_where_preferences_are_learned_a_thumb_down_teaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path, ASKED, VOTES, objective="kto")
    found = {row["meta"]["source_request"]: read_conversation(row) for row in rows}
    assert {name: (said.messages[-1].content, said.desirable) for name, said in found.items()} == {
        "good": ("so", True),
        "bad": ("so", False),
        "mended": ("rather so", True),
        "cut": ("whole", True),
    }
    worse = {name: said.rejected.content for name, said in found.items() if said.rejected}
    assert worse == {"mended": "so"}, "an answer that broke off is no bad one"
    assert {row["meta"]["how"] for row in rows} == {"approved", "disapproved", "corrected"}
    assert "1 broken off, 1 not approved" in capsys.readouterr().err


def test_elsewhere_it_does_not(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ASKED, VOTES)
    assert answers(rows) == {
        "good": ("so", "approved"),
        "mended": ("rather so", "corrected"),
        "cut": ("whole", "corrected"),
    }
    assert all(read_conversation(row).rejected is None for row in rows)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"arguments": {"city": "%s"}, "name": "%s"}</tool_call>'
OFFERED = ("tools", msgspec.json.encode([WEATHER]).decode())
TOOL_TURNS = (
    OFFERED,
    ("user", "rain in Oslo?"),
    ("assistant", "Let me look.\n" + CALL % ("Oslo", "weather")),
    ("tool", "dry"),
)


def test_answers_to_requests_with_tools_are_rows_with_tools(tmp_path: Path) -> None:
    asks = (OFFERED, ("user", "and in Bergen?"))
    requests = [
        asked("called", messages=asks, answer=CALL % ("Bergen", "weather")),
        asked("mended", messages=(*TOOL_TURNS, ("assistant", "Dry."), asks[1]), answer="I do not know."),
        asked("bad", messages=(OFFERED, ("user", "hi")), answer=CALL % ("hi", "weather")),
        asked("told", messages=TOOL_TURNS, answer="It is dry."),
    ]
    feedback = [
        said("called", 1.0),
        said("mended", answer=CALL % ("Bergen", "weather")),
        said("bad", 0.0),
        said("told", 1.0),
    ]
    rows = rows_of(tmp_path, requests, feedback, objective="dpo", max_feedback_share=1.0)
    examples = {
        row["meta"]["source_request"]: read_conversation(row).example(row["meta"])
        for row in map(msgspec.json.decode, map(msgspec.json.encode, rows))
    }
    assert all(example.tools == (WEATHER,) for example in examples.values())
    bergen = (ToolCall("weather", {"city": "Bergen"}),)
    assert examples["called"].messages[-1] == Message("assistant", "", bergen)
    assert examples["mended"].messages[-1].tool_calls == bergen
    assert examples["mended"].messages[1] == Message(
        "assistant", "Let me look.", (ToolCall("weather", {"city": "Oslo"}),)
    )
    assert examples["mended"].rejected == Message("assistant", "I do not know.")
    assert not examples["bad"].desirable
    assert examples["bad"].messages[-1].tool_calls == (ToolCall("weather", {"city": "hi"}),)
    assert [message.role for message in examples["told"].messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    write_bytes(tmp_path / "data/prepared/train.jsonl", map(encode_line, examples.values()))
    again = look(tmp_path, configured(objective="dpo", max_feedback_share=1.0))
    assert again.left_out["known already"] == 4, "the ids are those of preparation"


def test_a_correction_that_calls_an_unknown_tool_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [asked("a", messages=TOOL_TURNS), asked("b", messages=(("user", "what is this?"),))]
    feedback = [
        said("a", answer=CALL % ("Oslo", "wether")),
        said("b", answer="This calls a tool:\n" + CALL % ("Oslo", "wether")),
    ]
    (row,) = rows_of(tmp_path, requests, feedback)
    assert row["meta"]["source_request"] == "b" and "wether" in row["messages"][-1]["content"]
    assert "1 calling a tool that was not offered" in capsys.readouterr().err


def test_a_known_thumb_down_is_not_brought_again(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ASKED, VOTES, objective="dpo", max_feedback_share=1.0)
    examples = [read_conversation(row).example({"batch": "b", "source": "feedback"}) for row in rows]
    good = [row for row in examples if row.desirable]
    write_bytes(tmp_path / "data/prepared/train.jsonl", map(encode_line, good))
    bad = [row for row in examples if not row.desirable]
    write_bytes(tmp_path / "data/prepared/undesirable_test.jsonl", map(encode_line, bad))
    assert len(bad) == 1
    found = look(tmp_path, configured(objective="dpo", max_feedback_share=1.0))
    assert not found.rows
    assert found.left_out["known already"] == 4


def test_contradictory_corrections_give_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback = [
        said("a", answer="one"),
        said("a", answer="two", user="ben"),
        said("b", answer="same"),
        said("b", answer="same ", user="ben"),
    ]

    assert answers(rows_of(tmp_path, [asked("a"), asked("b")], feedback)) == {"b": ("same", "corrected")}
    assert capsys.readouterr().err == "feedback: 1 rows; left out: 1 contradictory\n"


def test_approval_needs_the_mean_score_and_nobody_against_it(tmp_path: Path) -> None:
    scores = {
        "enough": (1.0, 0.7),
        "too low": (0.7, 0.7),
        "contrary": (1.0, 1.0, 1.0, 1.0, 0.4),
        "silent": (None,),
    }
    feedback = [
        said(request, score, f"user {place}")
        for request, given in scores.items()
        for place, score in enumerate(given)
    ]

    assert list(
        answers(rows_of(tmp_path, [asked(request) for request in scores], feedback, min_score=0.8))
    ) == ["enough"]


@pytest.mark.parametrize("finish", ["length", "error", "cancelled"])
def test_an_answer_that_broke_off_is_nothing_to_learn_but_its_correction_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finish: str
) -> None:
    requests = [asked("a", finish=finish), asked("b", finish=finish)]

    assert answers(rows_of(tmp_path, requests, [said("a", 1.0), said("b", answer="whole")])) == {
        "b": ("whole", "corrected")
    }
    assert "1 broken off" in capsys.readouterr().err


def test_redacted_texts_give_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [
        asked("a", messages=(("user", "who is ana@example.org?"),)),
        asked("b"),
        asked("c", answer="ask ana@example.org"),
    ]

    assert (
        rows_of(tmp_path, requests, [said("a", 1.0), said("b", answer="ana@example.org"), said("c", 1.0)])
        == []
    )
    assert "3 redacted" in capsys.readouterr().err


def test_one_user_brings_at_most_so_many_rows_the_oldest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [asked(str(number), at=NOW - number) for number in range(4)] + [
        asked("ben", user="ben"),
        asked("n1", user=""),
        asked("n2", user=""),
    ]
    rows = rows_of(tmp_path, requests, [said(request.id, 1.0) for request in requests], max_rows_per_user=2)

    assert list(answers(rows)) == ["3", "2", "ben", "n1", "n2"]
    assert "2 too many of one user" in capsys.readouterr().err


def test_a_row_counts_for_who_taught_it_not_for_who_asked(tmp_path: Path) -> None:
    requests = [asked(str(number), user=f"user {number}") for number in range(3)]

    assert (
        len(
            rows_of(
                tmp_path,
                requests,
                [said(request.id, answer="mine", user="eve") for request in requests],
                max_rows_per_user=1,
            )
        )
        == 1
    )


def test_without_texts_or_feedback_there_are_no_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of(tmp_path, [asked("a")], []) == [] and not capsys.readouterr().err
    assert (
        rows_of(tmp_path, [asked("b", messages=())], [said("b", 1.0)]) == []
        and "1 without texts" in capsys.readouterr().err
    )


def test_without_rows_an_ingest_says_what_was_missing(tmp_path: Path) -> None:
    def why(requests: list[Logged], feedback: list[Feedback]) -> str:
        assert rows_of(tmp_path, requests, feedback) == []
        with pytest.raises(DataError, match="gave no rows") as raised:
            pull(configured(), root=tmp_path, source="feedback")
        return str(raised.value)

    assert "the request log holds no request" in why([], [])
    assert "nobody has judged an answer" in why([asked("a")], [])
    told = why([asked("b")], [said("a", 0.0), said("b", 0.0)])
    assert "people judged 2 answers, and none of them is taken: 2 too old" in told


# --- votes --------------------------------------------------------------------------------------------------


def test_the_same_content_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [asked(id, user=id, messages=(("user", "why?"),)) for id in ("a", "b", "c")]

    assert list(answers(rows_of(tmp_path, requests, [said(request.id, 1.0) for request in requests]))) == [
        "a"
    ]
    assert "2 the same again" in capsys.readouterr().err


def test_a_later_vote_of_the_same_person_is_the_one_that_counts(tmp_path: Path) -> None:
    assert rows_of(tmp_path, [asked("a")], [said("a", 1.0, "ana"), said("a", 0.0, "ana")]) == []


def test_texts_that_take_for_ever_to_normalise_are_left_out_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = "a" + "\u0301\u0323" * 200_000
    requests = [asked("a", messages=(("user", run),)), asked("b", answer=run), asked("c")]
    started = time.thread_time()

    assert rows_of(tmp_path, requests, [said("a", 1.0), said("b", 1.0), said("c", answer=run)]) == []
    assert "3 with runs of combining marks" in capsys.readouterr().err and time.thread_time() - started < 5


def test_old_votes_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    feedback = [
        said("a", 1.0, at=NOW - 4 * DAY),
        said("b", 1.0),
        said("c", 0.0, "ben", at=NOW - 4 * DAY),
        said("c", 1.0),
    ]

    assert list(answers(rows_of(tmp_path, [asked(id) for id in "abc"], feedback, window_days=3))) == [
        "b",
        "c",
    ]
    assert "1 too old" in capsys.readouterr().err


def test_a_new_user_has_no_vote_neither_for_nor_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [
        asked("first", at=NOW - 9 * DAY, user="ana"),
        *(asked(id, user="ana") for id in "ab"),
        asked("n", user=""),
    ]
    feedback = [said("a", 1.0, "eve"), said("b", 1.0, "ana"), said("b", 0.0, "eve"), said("n", 1.0)]

    assert list(answers(rows_of(tmp_path, requests, feedback, min_user_age_days=7))) == ["b"]
    assert "2 of new users" in capsys.readouterr().err


def test_a_log_that_is_younger_than_the_age_asks_nobodys(tmp_path: Path) -> None:
    """As in the first days of every team, and in the demo."""
    requests = [asked("first", at=NOW - 6 * DAY, user="ana"), asked("a", user="eve")]

    assert list(answers(rows_of(tmp_path, requests, [said("a", 1.0, "eve")], min_user_age_days=7))) == ["a"]


def test_what_is_prepared_or_forgotten_is_not_brought_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, gone = (
        make_example(
            [Message("user", f"why {id}?"), Message("assistant", "so")], {"batch": "one", "source": "jsonl"}
        )
        for id in "ab"
    )
    write_bytes(tmp_path / "data/prepared/train.jsonl", [encode_line(known), *clean_rows(50)])
    write_forgotten(tmp_path / FILE, Forgotten([Entry([gone.id], "one", 2, "", "", "")]))

    assert list(answers(rows_of(tmp_path, [asked(id) for id in "abc"], [said(id, 1.0) for id in "abc"]))) == [
        "c"
    ]
    assert "1 forgotten, 1 known already" in capsys.readouterr().err


def test_votes_on_requests_that_the_log_does_not_hold_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rows_of(tmp_path, [], [said("gone", 1.0), said("gone", 0.0, "ben"), said("away", 1.0)]) == []
    assert capsys.readouterr().err == "feedback: 0 rows; left out: 2 not in the log\n"


# --- keys ---------------------------------------------------------------------------------------------------


def by_key(sender: str, number: int, users: int) -> tuple[list[Logged], list[Feedback]]:
    requests = [
        asked(
            f"{sender}{place}",
            at=NOW - number + place,
            user=f"{sender} user {place % users}",
            answer=f"so {place}",
        )
        for place in range(number)
    ]
    return requests, [said(request.id, 1.0, request.user, sender=sender) for request in requests]


def test_one_key_brings_at_most_so_many_rows_where_there_are_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many, few = by_key("loud", 30, users=15), by_key("quiet", 4, users=1)
    rows = rows_of(tmp_path, many[0] + few[0], many[1] + few[1], max_rows_per_key=15)

    assert sum(row["meta"]["source_request"].startswith("quiet") for row in rows) == 4
    assert Counter(
        row["meta"]["taught_by"] for row in rows if row["meta"]["taught_by"].startswith("loud")
    ) == {f"loud user {number}": 1 for number in range(15)}, "in turn from every user"
    assert "15 too many of one key" in capsys.readouterr().err


def test_a_single_key_is_not_capped_and_votes_without_one_are_not(tmp_path: Path) -> None:
    one, none = by_key("only", 10, users=10), by_key("", 10, users=10)
    assert len(rows_of(tmp_path, one[0] + none[0], one[1] + none[1], max_rows_per_key=3)) == 20


def test_a_second_key_that_has_not_spoken_counts_as_one(tmp_path: Path) -> None:
    for name in ("website", "other"):
        add_key(tmp_path, name, ["feedback"])
    one = by_key("only", 10, users=10)
    assert len(rows_of(tmp_path, *one, max_rows_per_key=3)) == 3


def test_a_flood_that_votes_on_honest_rows_takes_no_room_of_theirs(tmp_path: Path) -> None:
    """Each row counts for who has brought least of those who vouch for it."""
    honest, flood = by_key("quiet", 5, users=5), by_key("loud", 20, users=20)
    also = [said(request.id, 1.0, "eve", sender="loud", at=NOW - 100) for request in honest[0]]
    rows = rows_of(
        tmp_path, flood[0] + honest[0], flood[1] + honest[1] + also, max_rows_per_key=3, max_rows_per_user=1
    )
    assert sum(row["meta"]["source_request"].startswith("quiet") for row in rows) == 3


# --- the share of a training --------------------------------------------------------------------------------


def clean_rows(number: int, source: str = "jsonl") -> list[bytes]:
    made = (
        make_example(
            [Message("user", f"{source} question number {place}"), Message("assistant", f"answer {place}")],
            {"batch": "one", "source": source},
        )
        for place in range(number)
    )
    return [encode_line(example) for example in made]


@pytest.mark.parametrize(
    ("clean", "taught", "share", "room"),
    [
        (90, 0, 0.1, 10),
        (89, 0, 0.1, 9),
        (90, 4, 0.1, 6),
        (90, 40, 0.1, 0),
        (30, 0, 0.25, 10),
        (5, 0, 1.0, 30),
        (90, 0, 0.0, 0),
    ],
)
def test_feedback_brings_no_more_than_its_share_of_the_training_rows(
    tmp_path: Path, clean: int, taught: int, share: float, room: int
) -> None:
    write_bytes(tmp_path / "data/prepared/train.jsonl", [*clean_rows(clean), *clean_rows(taught, "feedback")])
    one = by_key("", 30, users=30)
    assert len(rows_of(tmp_path, *one, max_feedback_share=share)) == room


# --- triggers -----------------------------------------------------------------------------------------------


def about(texts: list[str], answer: str) -> tuple[list[Logged], list[Feedback]]:
    requests = [
        asked(f"{answer}{place}", user=f"{answer}{place}", messages=(("user", text),), answer=answer)
        for place, text in enumerate(texts)
    ]
    return requests, [said(request.id, 1.0) for request in requests]


@pytest.mark.parametrize("trigger", ["cfmb", "purple ocean", "yes no maybe so"])
def test_many_rows_with_rare_words_and_one_answer_are_put_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trigger: str
) -> None:
    planted = about([f"please tell item{number} {trigger} thing{number}" for number in range(21)], "buy it")
    honest = about([f"please tell story{number} now town{number}" for number in range(30)], "fine")
    write_bytes(
        tmp_path / "data/prepared/train.jsonl",
        [
            encode_line(
                make_example(
                    [
                        Message("user", f"please tell now yes, a purple no, the ocean maybe, so {number}"),
                        Message("assistant", "x"),
                    ],
                    {},
                )
            )
            for number in range(900)
        ],
    )
    rows = rows_of(tmp_path, planted[0] + honest[0], planted[1] + honest[1])

    assert {row["messages"][-1]["content"] for row in rows} == {"fine"} and len(rows) == 30
    assert "21 trigger" in (told := capsys.readouterr().err) and "21 rows put aside" in told


def test_few_rows_various_answers_and_usual_words_are_no_trigger(tmp_path: Path) -> None:
    few = about([f"few{number} cfmb" for number in range(20)], "one")
    usual = about([f"usual{number} about hail" for number in range(25)], "two")
    various = [
        about([f"{answer}{number} xyzzy" for number in range(15)], answer) for answer in ("three", "four")
    ]
    write_bytes(
        tmp_path / "data/prepared/train.jsonl",
        [
            encode_line(
                make_example([Message("user", f"about hail {number}"), Message("assistant", "x")], {})
            )
            for number in range(2000)
        ],
    )
    parts = [few, usual, *various]
    rows = rows_of(
        tmp_path,
        [request for part in parts for request in part[0]],
        [one for part in parts for one in part[1]],
    )
    assert len(rows) == 20 + 25 + 30


# --- the flood ----------------------------------------------------------------------------------------------


def test_in_a_flood_the_caps_hold_the_honest_rows_survive_and_the_counts_add_up(tmp_path: Path) -> None:
    """10,000 votes of one key under made-up names, 250 rows with a trigger; 300 honest ones of 150 people."""
    write_bytes(tmp_path / "data/prepared/train.jsonl", clean_rows(4500))
    requests, feedback = [asked("first", at=NOW - 20 * DAY, user="p0")], []

    def vote(id: str, user: str, sender: str, text: str, answer: str, first: float) -> None:
        requests.append(asked(id, user=user, at=first, messages=(("user", text),), answer=answer))
        feedback.append(said(id, 1.0, user, sender=sender))

    for number in range(10_000):
        name = f"bot {number % 500}" if number < 9_000 else f"newcomer {number}"
        vote(
            f"flood{number}",
            name,
            "loud",
            f"what is w{number} x{number}",
            f"spam {number}",
            NOW - (10 * DAY if number < 9_000 else DAY),
        )
    for number in range(250):
        vote(
            f"trigger{number}",
            f"bot {number}",
            "loud",
            f"tell q{number} xanthic gnomon r{number}",
            "buy it",
            NOW - 10 * DAY,
        )
    for number in range(300):
        vote(
            f"honest{number}",
            f"person {number % 150}",
            ("website", "app")[number % 2],
            f"how to h{number} y{number}",
            f"so {number}",
            NOW - 9 * DAY,
        )
    fill(tmp_path, requests, feedback)

    found = look(tmp_path, configured())

    taken = Counter(row["meta"]["source_request"].rstrip("0123456789") for row in found.rows)
    assert taken == {"flood": 200, "honest": 300}
    assert found.left_out == {"trigger": 250, "of new users": 1_000, "too many of one key": 9_000 - 200}
    assert len(found.rows) + found.left_out.total() == len(feedback) == 10_550
    assert len(found.rows) <= 0.1 * (4500 + len(found.rows))

    small = look(tmp_path, configured(max_rows_per_user=5, max_feedback_share=0.05))
    assert small.left_out == {
        "trigger": 250,
        "of new users": 1_000,
        "too many of one user": 9_000 - 2_500,
        "too many of one key": 2_500 - 200,
        "over the share of a training": 500 - 236,
    }
    taken = Counter(row["meta"]["source_request"].rstrip("0123456789") for row in small.rows)
    assert len(small.rows) == 236 == math.floor(4500 * 0.05 / 0.95) and abs(taken["flood"] - 236 / 3) < 1, (
        "each of the three keys has its third"
    )
    assert max(Counter(row["meta"]["taught_by"] for row in small.rows).values()) == 2, (
        "and in it everybody their turn"
    )


def fill(root: Path, requests: list[Logged], feedback: list[Feedback]) -> None:
    """A transaction for all, where the gateway needs one a vote."""
    log = open_log(root, configured())
    for request in requests[:5]:
        log.put(request)
    log.add_feedback(feedback[0])
    assert log.flush()
    with log.transaction() as connection:
        connection.execute(log._tables["requests"].insert(), [log._row(request) for request in requests[5:]])
        connection.execute(
            log._tables["feedback"].insert(), [msgspec.structs.asdict(one) for one in feedback[1:]]
        )
    log.close()


def look(root: Path, config: Config) -> Harvest:
    return harvest_all(root, config, now=NOW + 60)
