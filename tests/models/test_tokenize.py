"""Which rows are trained on, and that none of them is lost without a word."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import pytest

from ratchet.config.data import PrepareConfig, TokenizeConfig
from ratchet.config.params import Config
from ratchet.config.training import TrainConfig
from ratchet.data.examples import Example, Message, ToolCall, encode_line, make_example, read_examples
from ratchet.data.mixture import choose_rows
from ratchet.errors import DataError
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.chat_template import ChatFormat
from ratchet.models.lengths import choose_limits
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


def write_splits(folder: Path, **splits: list[Example]) -> None:
    for split in ("train", "validation", "test", "golden"):
        write_bytes(folder / f"{split}.jsonl", map(encode_line, splits.get(split, [])))


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
        for split in ("train", "validation", "test")
        for row in read_examples(prepared / f"{split}.jsonl")
    }
    config = with_tokenize(tiny_config, max_length=50, window=64)
    config = config.model_copy(update={"prepare": PrepareConfig(max_rejected_share=1.0)})
    profile = tokenize(prepared, tiny_base, nobody, tmp_path / "out", config)
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
        split: sum(row["split"] == split for row in listed) for split in ("train", "validation", "test")
    }
    assert profile.train.rows + profile.rejected["train"] == len(rows)


TAGGED_CALLS = (
    "{%- if tools -%}<|system|>{{ tools | tojson }}<|end|>{%- endif -%}"
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}"
    "{%- for call in message.tool_calls or [] -%}<call>{{ call.function.name }}"
    "{%- for name, value in call.function.arguments | items -%}<key>{{ name }}</key>{{ value }}</value>"
    "{%- endfor -%}</call>{%- endfor -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def test_calls_that_would_be_read_otherwise_are_rejected_counted_and_listed(
    tmp_path, tiny_base, nobody, tiny_config, old
):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TAGGED_CALLS
    tokenizer.save_pretrained(base)
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}, "untold": {}}
    parameters = {"type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": "rain", "parameters": parameters}}
    arguments = {"typed": {"city": "5", "days": 5}, "untyped": {"untold": 5}, "control": {"city": "<|end|>"}}
    examples = {
        name: make_example(
            [Message("user", name), Message("assistant", "", (ToolCall("rain", given),))],
            {"batch": old},
            tools=[tool],
        )
        for name, given in arguments.items()
    }
    write_splits(tmp_path / "prepared", train=[*examples.values()])
    tiny_config = with_tokenize(tiny_config, max_length=250, window=256)
    profile = tokenize(tmp_path / "prepared", base, nobody, tmp_path / "out", tiny_config)
    listed = {
        row["id"]: row
        for row in map(msgspec.json.decode, (tmp_path / "out/rejected.jsonl").read_bytes().splitlines())
    }
    assert listed.keys() == {examples["untyped"].id, examples["control"].id}
    assert {row["reason"] for row in listed.values()} == {"tool_call"}
    assert "reads back as" in listed[examples["untyped"].id]["message"]
    assert (profile.train.rows, profile.rejected) == (1, {"train": 2})
    chat = ChatFormat(tokenizer)
    assert [chat.fits(example, 250) for example in examples.values()] == [True, False, False]
    write_splits(tmp_path / "prepared", train=[examples["typed"]], golden=[examples["untyped"]])
    with pytest.raises(DataError, match=f"the golden row {examples['untyped'].id} cannot be written"):
        tokenize(tmp_path / "prepared", base, nobody, tmp_path / "again", tiny_config)
    write_splits(tmp_path / "prepared", train=[*examples.values(), examples["untyped"]])
    with pytest.raises(DataError, match=r"3 of 4 train rows.*'tool_call': 3") as raised:
        tokenize(tmp_path / "prepared", base, nobody, tmp_path / "again", tiny_config)
    assert "no length would do" in raised.value.remedy and "reads back as" in raised.value.remedy


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


def test_when_no_row_fits_it_is_told_before_anything_is_written(
    tmp_path, tiny_base, nobody, tiny_config, rows
):
    write_splits(tmp_path / "prepared", train=[row for row in rows if len(row.question) > 100])
    with pytest.raises(DataError, match=r"(?s)train rows would be dropped.*tokenize\.max_length"):
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
    write_splits(tmp_path / "prepared", train=rows[:5])
    profile = tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", tiny_config)
    assert read_windows(tmp_path / "out/validation.arrow") == []
    assert profile.validation.rows == 0 < profile.train.rows


def test_the_same_rows_give_the_same_bytes(tmp_path, prepared, tiny_base, nobody, tiny_config, tokens):
    tokenize(prepared, tiny_base, nobody, tmp_path / "again", tiny_config)
    names = sorted(path.name for path in tokens.iterdir())
    assert names == ["profile.json", "rejected.jsonl", "rows.txt", "train.arrow", "validation.arrow"]
    assert all((tmp_path / "again" / name).read_bytes() == (tokens / name).read_bytes() for name in names)
    assert read_json(tokens / "profile.json")["train"]["rows"] > 300


# --- rows that are too long ---


def long_rows(count: int, words: int, *, first: int = 0) -> list[Example]:
    """Rows whose answers have `words` words, one batch."""
    return [
        make_example(
            [
                Message("user", f"What is number {first + number}?"),
                Message("assistant", "word " * words + str(number)),
            ],
            {"batch": "long", "source": "tests"},
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def length_of(tiny_base):
    chat = ChatFormat(load_tokenizer(tiny_base))
    return lambda row: len(chat.encode(row).ids)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_more_rows_too_long_than_the_limit_fail_before_training_with_the_length_that_would_do(
    tmp_path, tiny_base, nobody, tiny_config, length_of, split
):
    short, long = long_rows(30, 1), long_rows(4, 30, first=50)
    rows = {name: list(short) for name in ("train", "validation", "test")}
    rows[split] = [*short, *long]
    write_splits(tmp_path / "prepared", **rows)
    config = with_tokenize(tiny_config, max_length=48)
    with pytest.raises(DataError) as caught:
        tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", config)
    told = str(caught.value)
    assert f"4 of 34 {split} rows" in told and "prepare.max_rejected_share" in told
    enough = int(re.search(r"max_length: (\d+)", told)[1])
    assert enough >= max(map(length_of, long)) > 48 and enough % 64 == 0
    assert not (tmp_path / "out").exists()
    tokenize(
        tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", with_tokenize(config, max_length=enough)
    )


def test_one_golden_row_that_cannot_be_asked_fails_before_training(tmp_path, tiny_base, nobody, tiny_config):
    write_splits(tmp_path / "prepared", train=long_rows(30, 1), golden=[*long_rows(9, 1), *long_rows(1, 30)])
    with pytest.raises(DataError, match=r"(?s)1 of 10 golden rows.*max_length: \d+"):
        tokenize(
            tmp_path / "prepared",
            tiny_base,
            nobody,
            tmp_path / "out",
            with_tokenize(tiny_config, max_length=48),
        )


def test_the_longest_row_follows_the_rows_where_nobody_sets_it(
    tmp_path, tiny_base, nobody, tiny_config, length_of
):
    usual, longer, golden = long_rows(398, 10), long_rows(2, 100), long_rows(1, 60)
    write_splits(tmp_path / "prepared", train=[*usual, *longer], golden=golden)
    profile = tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", with_tokenize(tiny_config))
    assert max(map(length_of, usual)) < length_of(golden[0]) <= profile.max_length < length_of(longer[0])
    assert profile.max_length % 64 == 0 and profile.max_length - length_of(golden[0]) < 64
    assert profile.window == min(2 * profile.max_length, 256) and profile.rejected == {"train": 2}


def test_no_automatic_length_is_over_the_bases_context(tmp_path, tiny_base, nobody, tiny_config):
    write_splits(tmp_path / "prepared", train=long_rows(30, 300))
    with pytest.raises(DataError, match=r"(?s)30 of 30 train rows.*256.*longer context"):
        tokenize(tmp_path / "prepared", tiny_base, nobody, tmp_path / "out", with_tokenize(tiny_config))


@pytest.mark.parametrize(
    ("max_length", "window", "found"),
    [
        ("auto", "auto", (128, 256)),
        ("auto", 100, (100, 100)),
        (70, "auto", (70, 140)),
        (1500, "auto", (1500, 2048)),
        (3000, "auto", (3000, 3000)),
        (96, 192, (96, 192)),
    ],
)
def test_numbers_and_auto_go_together(max_length, window, found):
    config = TokenizeConfig(max_length=max_length, window=window)
    assert choose_limits([80] * 200, [], 4096, config) == found
