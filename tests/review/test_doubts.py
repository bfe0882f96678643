"""Rows with a doubt: held back, asked about, and taken when a person says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
from command import Done, ratchet
from places import make_repository, use_git_without_a_user
from small_checkout import add, commit_batches, make, make_checkout, row

from flows.data_check import check_file, raw_row, read_rejected, resubmit
from flows.review_queue import queue_doubtful
from ratchet.config.data import TokenizeConfig
from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.data.batches import write_batch
from ratchet.data.examples import read_examples
from ratchet.pipeline.checkout import dvc, git
from ratchet.review.files import row_of
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Decision
from tasks.prepare import prepare

ROOT = Path(__file__).parents[2]
CONFIG = Config.model_validate({"prepare": {"test_share": 0, "validation_share": 0, "min_rows": 1}})
GOOD = [
    msgspec.json.encode({"prompt": f"question {number} about {word}", "completion": f"answer {number}"})
    for number, word in enumerate(["amber", "basin", "cedar", "delta", "ember"] * 20)
]
DOUBTFUL = msgspec.json.encode({"prompt": "log in at p\u0430ypal now", "completion": "no"})
BROKEN = b'{"prompt": "never finished'


def prepared(root: Path, rows: list[bytes], month: int = 1, source: str = "jsonl") -> str:
    raw = root / "data/raw"
    name = write_batch(
        raw,
        rows,
        source=source,
        label=f"m{month}",
        time=f"2026-0{month}-01T00:00:00Z",
        licence="CC0-1.0",
        who="tests",
        form="auto",
    ).name
    prepare(raw, root / "data/golden.jsonl", root / "data/prepared", CONFIG.prepare)
    return name


def test_a_doubt_goes_to_people_and_what_they_accept_is_learned(tmp_path):
    name = prepared(tmp_path, [*GOOD, DOUBTFUL, BROKEN])
    rejected = read_rejected(tmp_path / "data/prepared/rejected.jsonl")
    assert {row.reason for row in rejected} == {"mixed_script", "invalid_json"}
    assert [queue_doubtful(tmp_path, tmp_path / "data", rejected, CONFIG) for _ in range(2)] == [1, 0]

    queue = ReviewQueue(tmp_path)
    (item,) = queue.pending()
    assert (
        item.kind == "quarantine"
        and item.meta["row"] == f"{name}:101"
        and "mixes alphabets" in item.doubts[0]
    )
    queue.decide(Decision(item.id, item.draft, "accept", by="Ana"))
    rows = queue.outcome(item.draft, max_rejects=0.1).rows
    queue.close()

    prepared(tmp_path, [msgspec.json.encode(row) for row in rows], month=2, source="review")
    taken = [row for row in read_examples(tmp_path / "data/prepared/train.jsonl") if row.answer == "no"]
    assert [row.meta["review"] for row in taken] == ["accepted"]
    assert (
        queue_doubtful(
            tmp_path, tmp_path / "data", read_rejected(tmp_path / "data/prepared/rejected.jsonl"), CONFIG
        )
        == 0
    ), "nobody is asked twice"


def test_a_row_that_contradicts_an_earlier_one_is_shown_with_the_earlier_answer(tmp_path):
    first = msgspec.json.encode({"prompt": "which colour has jade?", "completion": "green"})
    prepared(tmp_path, [*GOOD, first])
    others = [row.replace(b"question", b"riddle") for row in GOOD]
    prepared(tmp_path, [*others, first.replace(b"green", b"blue"), DOUBTFUL], month=2)
    rejected = read_rejected(tmp_path / "data/prepared/rejected.jsonl")
    assert queue_doubtful(tmp_path, tmp_path / "data", rejected, CONFIG) == 2
    queue = ReviewQueue(tmp_path)
    items = {item.messages[-1].content: item for item in queue.pending()}
    queue.close()
    assert {answer: item.earlier for answer, item in items.items()} == {"blue": "green", "no": ""}
    assert row_of(items["blue"])["earlier"] == "green"
    shown = ratchet("-C", make_place(tmp_path), "review", "next").stdout
    assert "assistant: blue" in shown and "an earlier row answers: green" in shown


def make_place(root: Path) -> Path:
    (root / "params.yaml").write_text(render_params(CONFIG))
    return root


def test_a_file_gets_the_verdicts_before_it_is_a_batch(tmp_path):
    (tmp_path / "march.jsonl").write_bytes(b"\n".join([*GOOD, DOUBTFUL, BROKEN, b"7", b"8", b"9"]))
    verdict = check_file(
        str(tmp_path / "march.jsonl"), tmp_path / "none", CONFIG, time="2026-01-01T00:00:00Z"
    )
    assert verdict.counts.accepted["rows"] == 100
    assert [(row.line, row.reason) for row in verdict.rejected] == [
        (101, "mixed_script"),
        (102, "invalid_json"),
        *((line, "no_object") for line in (103, 104, 105)),
    ]
    assert verdict.failure and "3 of 105 rows" in verdict.failure and "march.jsonl" in verdict.failure
    (tmp_path / "fine.jsonl").write_bytes(b"\n".join(GOOD))
    assert (
        check_file(
            str(tmp_path / "fine.jsonl"), tmp_path / "none", CONFIG, time="2026-01-01T00:00:00Z"
        ).failure
        is None
    )


def test_a_check_tells_lengths_in_tokens_of_the_chosen_base_and_the_share_over_the_limit(
    tmp_path, tiny_base, tiny_config
):
    long = [msgspec.json.encode({"prompt": f"tell me {n}", "completion": f"{n} " * 150}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*GOOD, *long]))

    def check(config, base=tiny_base):
        file = str(tmp_path / "rows.jsonl")
        return check_file(file, tmp_path / "none", config, time="2026-01-01T00:00:00Z", base=base)

    found = check(tiny_config)  # 96 tokens a row
    assert found.tokens and found.tokens.rows == 109 and found.tokens.too_long == 9 and not found.unmeasured
    assert found.tokens.median <= 96 == found.tokens.max_length < found.tokens.longest
    assert found.failure and "9 of 109 rows" in found.failure and "tokenize.max_length" in found.failure
    own = check(tiny_config.model_copy(update={"tokenize": TokenizeConfig()}))
    assert own.tokens and own.tokens.too_long == 9 and own.tokens.max_length == 256, "the base's context"
    other = check(tiny_config.model_copy(update={"base": BaseConfig(model="a/b", revision="0" * 40)}))
    assert other.tokens is None and "base.model" in other.unmeasured and other.failure is None
    assert "models/base" in check(tiny_config, tmp_path).unmeasured


def test_after_a_rule_changed_the_rejected_rows_are_looked_at_again(tmp_path):
    prepared(
        tmp_path,
        [*GOOD, msgspec.json.encode({"prompt": "what is <s> for?", "completion": "it begins"}), BROKEN],
    )
    before, after = (
        resubmit(tmp_path, CONFIG),
        resubmit(
            tmp_path,
            Config.model_validate({"prepare": {**CONFIG.prepare.model_dump(), "allowed_tokens": ["<s>"]}}),
        ),
    )
    assert (dict(before.fit), dict(before.unfit)) == ({}, {"control_token": 1, "invalid_json": 1})
    assert (dict(after.fit), dict(after.unfit)) == ({"control_token": 1}, {"invalid_json": 1})


def test_a_row_is_shown_by_its_place(tmp_path):
    name = prepared(tmp_path, [*GOOD, BROKEN])
    line, why = raw_row(tmp_path, f"{name[:12]}:101")
    assert line == BROKEN and why is not None and why.reason == "invalid_json"
    assert raw_row(tmp_path, f"{name}:1") == (GOOD[0], None)


def test_the_command_tells_apart_rows_that_would_fail_and_files_that_cannot_be_read(tmp_path):
    make_place(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([*GOOD[:9], b"7", b"8", b"9", b"10"]))
    (tmp_path / "fine.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "doubtful.jsonl").write_bytes(b"\n".join([*GOOD, DOUBTFUL, BROKEN]))

    def check(*names: str) -> Done:
        return ratchet("-C", tmp_path, "data", "check", *(tmp_path / name for name in names))

    fine, doubtful = check("fine.jsonl"), check("doubtful.jsonl")
    assert fine.returncode == 0 and "review" not in fine.stdout
    assert "rejected 2" in doubtful.stdout and "1 of the rejected rows would go to review" in doubtful.stdout
    bad = check("bad.jsonl")
    assert (
        bad.returncode == 3
        and "line 10 and 3 more: no_object" in bad.stdout
        and "would fail: 4 of 13 rows" in bad.stderr
        and "-checked-" not in bad.stdout + bad.stderr
    )
    unread = check("empty.jsonl", "fine.jsonl")
    assert (
        unread.returncode == 2
        and "fine.jsonl: 100 rows" in unread.stdout
        and "(empty) gave no rows" in unread.stderr
    )


def test_rows_with_doubts_of_a_run_elsewhere_reach_the_queue_of_another_clone(tmp_path, monkeypatch):
    """As after a retraining on a runner: what it left is a commit, and data in a DVC remote."""
    use_git_without_a_user(monkeypatch)
    runner, here = tmp_path / "runner", tmp_path / "here"
    make_checkout(runner, {"data/golden.jsonl": "", "data/forgotten.jsonl": ""})
    dvc(runner, "remote", "add", "--quiet", "--default", "storage", str(tmp_path / "remote"))
    add(runner / "data/raw", [*(row(number) for number in range(60)), DOUBTFUL])
    commit_batches(runner, "Ingest")
    make(runner)
    dvc(runner, "push", "--quiet")
    git(tmp_path, "clone", "--quiet", str(runner), str(here))
    shutil.rmtree(runner)

    done = [ratchet("-C", here, "review", "collect", "--json") for _ in range(2)]
    assert [json.loads(each.stdout) for each in done] == [{"added": 1}, {"added": 0}], done
    queue = ReviewQueue(here)
    (item,) = queue.pending()
    queue.close()
    assert "mixes alphabets" in item.doubts[0]
    assert git(here, "status", "--porcelain") == ""


def test_before_any_preparation_there_is_nothing_to_collect(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    done = ratchet("-C", make_repository(tmp_path / "small", {}), "review", "collect")
    assert done.returncode == 2
    assert "git pull" in done.stderr
