"""People's feedback is a small part of every training, and clean rows are always with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, encode_line, make_example, read_examples
from ratchet.data.mixture import choose_rows, is_feedback, limit_feedback, mix_rows, room_for
from ratchet.errors import DataError
from ratchet.files import write_bytes, write_json
from tasks.tokenize import tokenize

OLD, EARLIER, NEW = (
    "20260101T000000Z-old.jsonl",
    "20260201T000000Z-feedback.jsonl",
    "20260301T000000Z-feedback.jsonl",
)


def rows_of(batch: str, number: int, source: str = "jsonl", **meta: Any) -> list[Example]:
    return [
        make_example(
            [Message("user", f"{batch} {place}?"), Message("assistant", "yes")],
            {"batch": batch, "source": source, **meta},
        )
        for place in range(number)
    ]


def split(rows: list[Example]) -> tuple[int, int]:
    """(clean, feedback)."""
    taught = sum(is_feedback(row.meta) for row in rows)
    return len(rows) - taught, taught


@pytest.mark.parametrize("replay", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("settings", [{}, {"rows": "all"}, {"start_from": "base"}])
def test_a_retraining_on_feedback_has_clean_rows_whatever_is_replayed(
    replay: float, settings: dict[str, Any]
) -> None:
    """Without the floor, `replay: 0` would train on feedback alone."""
    rows = [*rows_of(OLD, 900), *rows_of(NEW, 50, "feedback")]
    config = Config.model_validate({"train": {"replay": replay, **settings}})
    chosen = mix_rows(rows, {OLD}, config.train).rows
    clean, taught = split(chosen)
    assert taught == 50 and clean == (450 if replay < 0.5 and not settings else 900)
    assert taught <= 0.1 * len(chosen)
    assert [row for row in rows if row in chosen] == chosen, "in their order, each once"


def test_the_floor_extends_what_replay_has_chosen() -> None:
    rows = [*rows_of(OLD, 900), *rows_of(NEW, 50, "feedback")]
    config = Config.model_validate({"train": {"replay": 0.2}})
    replayed = {row.id for row in choose_rows(rows, {OLD}, config.train)}
    assert replayed < {row.id for row in limit_feedback(rows, choose_rows(rows, {OLD}, config.train), 0.1)}


def test_feedback_over_its_share_stays_out_the_oldest_first() -> None:
    rows = [*rows_of(OLD, 900), *rows_of(EARLIER, 80, "feedback"), *rows_of(NEW, 60, "feedback")]
    chosen = limit_feedback(rows, rows, 0.1)
    assert split(chosen) == (900, 100)
    assert sum(row.meta["batch"] == NEW for row in chosen) == 60
    assert limit_feedback(rows[::-1], rows[::-1], 0.1) == chosen[::-1], "the order of rows chooses nothing"


def test_feedback_that_came_back_as_a_file_is_still_feedback() -> None:
    rows = [*rows_of(OLD, 90), *rows_of(NEW, 50, kind="feedback")]
    assert split(limit_feedback(rows, rows, 0.1)) == (90, 10)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (0.5, 50), (1.0, 50)])
def test_the_share_can_be_anything_from_none_to_all(share: float, kept: int) -> None:
    rows = [*rows_of(OLD, 90), *rows_of(NEW, 50, "feedback")]
    assert split(limit_feedback(rows, rows, share)) == (90, kept)
    assert limit_feedback(rows[:90], rows[:90], share) == rows[:90]


def test_shares_are_exact() -> None:
    assert [room_for(clean, 0.1) for clean in (0, 8, 9, 900, 9_000_000)] == [0, 0, 1, 100, 1_000_000]


def test_what_stays_out_is_counted_and_feedback_alone_trains_nothing(
    tmp_path: Path, prepared: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    clean, taught = list(read_examples(prepared / "train.jsonl"))[:90], rows_of(NEW, 25, "feedback")
    write_bytes(tmp_path / "prepared/train.jsonl", map(encode_line, [*clean, *taught]))
    for split in ("validation", "test", "golden"):
        write_bytes(tmp_path / f"prepared/{split}.jsonl", [])
    profile = tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", tiny_config)
    assert (profile.feedback.rows, profile.feedback.left_out) == (10, 15)
    assert profile.train.rows + profile.rejected.get("train", 0) == 100

    write_bytes(tmp_path / "prepared/train.jsonl", map(encode_line, taught))
    with pytest.raises(DataError, match=r"(?s)no row is left to train on.*train\.max_feedback_share"):
        tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", tiny_config)


def test_a_champion_that_has_seen_all_but_the_feedback_learns_it_beside_clean_rows(
    tmp_path: Path, prepared: Path, tiny_base: Path, tiny_config: Config
) -> None:
    clean = list(read_examples(prepared / "train.jsonl"))
    write_json(
        tmp_path / "incumbent/manifest.json",
        {"version": 1, "batches": sorted({str(row.meta["batch"]) for row in clean})},
    )
    write_bytes(tmp_path / "prepared/train.jsonl", map(encode_line, [*clean, *rows_of(NEW, 20, "feedback")]))
    for split in ("validation", "test", "golden"):
        write_bytes(tmp_path / f"prepared/{split}.jsonl", [])
    config = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"replay": 0.0})})
    profile = tokenize(tmp_path / "prepared", tiny_base, tmp_path / "incumbent", tmp_path / "out", config)
    assert (profile.feedback.rows, profile.feedback.left_out) == (20, 0)
    assert profile.train.replayed + profile.rejected.get("train", 0) == 180
