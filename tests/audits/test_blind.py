"""Rows with pictures that are asked again without them, and with another row's."""

from __future__ import annotations

from ratchet.audits.blind import WHATS, make_blind
from ratchet.data.examples import MEDIA_MARK, Example, Message, make_example
from ratchet.evaluation.scoring import ATTACKED, BLIND, Asked


def shown(number: int, *media: str, text: str = "What is drawn?") -> Example:
    asked = Message("user", MEDIA_MARK * len(media) + text, media=media)
    return make_example([asked, Message("assistant", f"answer {number}")], {"batch": "one"})


def test_every_row_is_asked_without_its_picture_and_with_another_rows() -> None:
    rows = [shown(number, f"{number:x}.png") for number in range(5)]
    plain = make_example([Message("user", "Who are you?"), Message("assistant", "a model")], {"batch": "one"})
    blind = make_blind([*rows, plain], most=200)
    of = {row.id: row for row in rows}
    assert {(one.of, one.kind) for one in blind} == {
        (row.id, kind) for row in rows for kind in ("without", "another")
    }
    for one in blind:
        assert one.row.answer == of[one.of].answer and one.row.question.endswith("What is drawn?")
        if one.kind == "without":
            assert one.row.media == () and MEDIA_MARK not in one.row.question
        else:
            assert len(one.row.media) == 1 and one.row.media != of[one.of].media


def test_pictures_are_changed_only_for_as_many_others() -> None:
    pair, other = shown(0, "a.png", "b.png"), shown(1, "c.png")
    assert [one.kind for one in make_blind([pair, other], most=9)] == ["without", "without"]
    alike = [pair, shown(2, "d.png", "e.png"), shown(3, "a.png", "f.png")]
    changed = {one.of: one.row.media for one in make_blind(alike, most=9) if one.kind == "another"}
    assert changed[pair.id] == ("d.png", "e.png")


def test_a_question_that_is_nothing_but_a_picture_is_not_asked_without_it() -> None:
    rows = [shown(number, f"{number:x}.png", text="") for number in range(3)]
    assert {one.kind for one in make_blind(rows, most=9)} == {"another"}


def test_only_so_many_rows_are_asked_and_always_the_same() -> None:
    rows = [shown(number, f"{number:x}.png") for number in range(9)]
    few = make_blind(rows, most=3)
    assert len({one.of for one in few}) == 3 and few == make_blind(rows[::-1], most=3)


def test_recordings_are_changed_for_recordings_and_count_by_themselves() -> None:
    seen = [shown(number, f"{number:x}.png") for number in range(4)]
    heard = [shown(number, f"{number:x}.flac") for number in range(4, 8)]
    both = [shown(number, f"{number:x}.png", f"{number:x}.flac") for number in range(8, 10)]
    blind = make_blind([*seen, *heard, *both], most=3)
    assert {what: len({one.of for one in blind if one.what == what}) for what in WHATS.values()} == {
        "pictures": 3,
        "recordings": 3,
        "both": 2,
    }
    of = {row.id: row for row in (*seen, *heard, *both)}
    for one in blind:
        ends = [name.rpartition(".")[2] for name in one.row.media]
        assert one.kind == "without" or ends == [name.rpartition(".")[2] for name in of[one.of].media]


def test_copies_that_are_asked_again_count_apart_from_the_rows() -> None:
    rows = [shown(number, f"{number:x}.png") for number in range(5)]
    copies = [one.row for one in make_blind(rows, most=3)]
    groups = ["one"] * 5 + [ATTACKED] + [BLIND] * 6
    assert (
        Asked([*rows, rows[0], *copies], groups).counted()
        == "5 rows and 1 attacked copies and 6 blind copies"
    )
    assert Asked(rows, ["one"] * 5).counted() == "5 rows"
