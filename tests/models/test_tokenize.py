"""Which rows are trained on, and that none of them is lost without a word."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from ratchet.config.data import TokenizeConfig
from ratchet.config.params import Config
from ratchet.config.training import TrainConfig
from ratchet.data.examples import Example, encode_line, read_examples
from ratchet.data.mixture import choose_rows
from ratchet.errors import DataError
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_tokenizer
from ratchet.training.packing import read_windows
from tasks.tokenize import tokenize


@pytest.fixture(scope="module")
def rows(prepared: Path) -> list[Example]:
    return list(read_examples(prepared / "train.jsonl"))


@pytest.fixture(scope="module")
def old(rows: list[Example]) -> str:
    """The first month's batch."""
    return min(str(row.meta["batch"]) for row in rows)


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory, old: str) -> Path:
    """One that has seen the first month."""
    folder = tmp_path_factory.mktemp("champion")
    write_json(folder / "manifest.json", {"version": 1, "batches": [old]})
    return folder


def with_train(config: Config, **settings) -> Config:
    return config.model_copy(update={"train": TrainConfig(**settings)})


def with_tokenize(config: Config, **settings) -> Config:
    return config.model_copy(update={"tokenize": TokenizeConfig(**settings)})


def test_new_and_replay_takes_every_new_row_and_the_asked_share_of_the_old(rows, old):
    num_old = sum(row.meta["batch"] == old for row in rows)
    for share in (0.0, 0.25, 1.0):
        chosen = choose_rows(rows, {old}, TrainConfig(replay=share))
        assert sum(row.meta["batch"] == old for row in chosen) == round(share * num_old)
        assert [row for row in chosen if row.meta["batch"] != old] == [
            row for row in rows if row.meta["batch"] != old
        ]
    assert 0 < num_old < len(rows)


def test_chosen_rows_keep_their_order_and_come_once(rows, old):
    chosen = choose_rows(rows, {old}, TrainConfig(replay=0.5))
    places = [rows.index(row) for row in chosen]
    assert places == sorted(set(places))


def test_the_replayed_rows_do_not_depend_on_the_order_and_grow_with_the_share(rows, old):
    def replayed(given: list[Example], share: float) -> set[str]:
        return {
            row.id for row in choose_rows(given, {old}, TrainConfig(replay=share)) if row.meta["batch"] == old
        }

    assert replayed(rows, 0.3) == replayed(rows[::-1], 0.3)
    assert replayed(rows, 0.3) < replayed(rows, 0.6) < replayed(rows, 1.0)


def test_the_replayed_rows_are_no_special_part_of_the_old_ones(rows, old):
    """Splits are cut by the start of the id; the choice must not follow it."""
    ids = [row.id for row in choose_rows(rows, {old}, TrainConfig(replay=0.5)) if row.meta["batch"] == old]
    assert (
        sum(name > sorted(row.id for row in rows if row.meta["batch"] == old)[len(ids)] for name in ids)
        > len(ids) / 4
    )


@pytest.mark.parametrize("settings", [{"rows": "all"}, {"start_from": "base"}])
def test_everything_is_taken_when_it_is_asked_for_and_when_the_weights_start_anew(rows, old, settings):
    assert choose_rows(rows, {old}, TrainConfig(replay=0.0, **settings)) == rows


def test_the_profile_tells_new_rows_from_replayed_ones(
    tmp_path, prepared, tiny_base, champion, tiny_config, rows, old
):
    profile = tokenize(prepared, tiny_base, champion, tmp_path / "out", with_train(tiny_config, replay=0.5))
    assert profile.train.rows == profile.train.new + profile.train.replayed
    assert profile.train.rows + profile.rejected.get("train", 0) == len(
        (tmp_path / "out/rows.txt").read_text().split()
    )
    assert 0 < profile.train.replayed <= sum(row.meta["batch"] == old for row in rows) / 2 + 1
    assert profile.batches == sorted({str(row.meta["batch"]) for row in rows})


def test_every_fitting_row_is_in_the_windows_with_its_own_tokens(tokens, prepared, tiny_base, tiny_config):
    chat = ChatFormat(load_tokenizer(tiny_base))
    for split in ("train", "validation"):
        encoded = [chat.encode(row).ids for row in read_examples(prepared / f"{split}.jsonl")]
        fitting = [ids for ids in encoded if len(ids) <= tiny_config.tokenize.max_length]
        windows = read_windows(tokens / f"{split}.arrow")
        found = [ids for window in windows for ids in split_rows(window)]
        assert sorted(found) == sorted(fitting)
        assert max(len(window.input_ids) for window in windows) <= tiny_config.tokenize.window


def split_rows(window) -> list[list[int]]:
    starts = [index for index, position in enumerate(window.position_ids) if position == 0]
    return [
        window.input_ids[start:end]
        for start, end in zip(starts, [*starts[1:], len(window.input_ids)], strict=True)
    ]


def test_rows_that_are_too_long_are_rejected_counted_and_listed(
    tmp_path, prepared, tiny_base, nobody, tiny_config, rows
):
    chat = ChatFormat(load_tokenizer(tiny_base))
    lengths = {
        row.id: len(chat.encode(row).ids)
        for split in ("train", "validation")
        for row in read_examples(prepared / f"{split}.jsonl")
    }
    profile = tokenize(
        prepared, tiny_base, nobody, tmp_path / "out", with_tokenize(tiny_config, max_length=50, window=64)
    )
    listed = [
        msgspec.json.decode(line) for line in (tmp_path / "out/rejected.jsonl").read_bytes().splitlines()
    ]
    assert {row["id"] for row in listed} == {name for name, length in lengths.items() if length > 50} != set()
    assert {row["reason"] for row in listed} == {"too_long"}
    assert all(
        f"{lengths[row['id']]} tokens" in row["message"] and "`tokenize.max_length` is 50" in row["message"]
        for row in listed
    )
    assert profile.rejected == {
        split: sum(row["split"] == split for row in listed) for split in ("train", "validation")
    }
    assert profile.train.rows + profile.rejected["train"] == len(rows)


def test_a_window_over_the_bases_context_is_refused_with_both_numbers(
    tmp_path, prepared, tiny_base, nobody, tiny_config
):
    with pytest.raises(
        DataError, match=r"(?s)`tokenize.window` is 257, the base has 256 positions.*256 or less"
    ):
        tokenize(
            prepared,
            tiny_base,
            nobody,
            tmp_path / "out",
            with_tokenize(tiny_config, max_length=96, window=257),
        )
    assert not (tmp_path / "out").exists()


def test_when_no_row_fits_nothing_is_left_to_train_on(tmp_path, tiny_base, nobody, tiny_config, rows):
    for split in ("train", "validation"):
        write_bytes(
            tmp_path / f"prepared/{split}.jsonl",
            [encode_line(row) for row in rows if len(row.question) > 100],
        )
    with pytest.raises(DataError, match=r"(?s)no row is left to train on.*tokenize\.max_length"):
        tokenize(
            tmp_path / "prepared",
            tiny_base,
            nobody,
            tmp_path / "out",
            with_tokenize(tiny_config, max_length=16, window=16),
        )


def test_when_the_champion_has_seen_it_all_and_nothing_is_replayed_nothing_is_left(
    tmp_path, prepared, tiny_base, tiny_config, rows
):
    write_json(
        tmp_path / "incumbent/manifest.json",
        {"version": 1, "batches": sorted({str(row.meta["batch"]) for row in rows})},
    )
    with pytest.raises(DataError, match=r"(?s)no row is left to train on.*train\.replay"):
        tokenize(
            prepared, tiny_base, tmp_path / "incumbent", tmp_path / "out", with_train(tiny_config, replay=0.0)
        )


def test_without_validation_rows_there_are_no_validation_windows(
    tmp_path, prepared, tiny_base, nobody, tiny_config, rows
):
    write_bytes(tmp_path / "prepared/train.jsonl", map(encode_line, rows[:5]))
    write_bytes(tmp_path / "prepared/validation.jsonl", [])
    profile = tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", tiny_config)
    assert read_windows(tmp_path / "out/validation.arrow") == []
    assert profile.validation.rows == 0 < profile.train.rows


def test_the_same_rows_give_the_same_bytes(tmp_path, prepared, tiny_base, nobody, tiny_config, tokens):
    tokenize(prepared, tiny_base, nobody, tmp_path / "again", tiny_config)
    names = sorted(path.name for path in tokens.iterdir())
    assert names == ["profile.json", "rejected.jsonl", "rows.txt", "train.arrow", "validation.arrow"]
    assert all((tmp_path / "again" / name).read_bytes() == (tokens / name).read_bytes() for name in names)
    assert read_json(tokens / "profile.json")["train"]["rows"] > 300
