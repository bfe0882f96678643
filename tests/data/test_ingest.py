"""Rows come in once, as one immutable batch and one commit; the golden set is frozen once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from patience import scaled
from places import make_repository, subjects, use_git_without_a_user, write_files

from ratchet.config.data import IngestConfig, JsonlSource
from ratchet.config.monitoring import TopicSource
from ratchet.config.params import Config
from ratchet.data.batches import check_batch, read_manifest, write_batch
from ratchet.data.dedup import split_by_hash
from ratchet.data.examples import Message, example_id
from ratchet.errors import DataError
from ratchet.media.store import MediaStore
from ratchet.pipeline.checkout import git
from tasks.ingest import Pulled, add_batch, check_rows, count_new, freeze_golden, label_of, pull
from tests.media.test_media import encoded, noise, question

CONFIG = Config()


def lines(start: int, stop: int) -> list[bytes]:
    return [
        json.dumps({"question": f"What is number {number}?", "answer": f"{number}"}).encode()
        for number in range(start, stop)
    ]


def write_rows(path: Path, start: int, stop: int) -> Path:
    path.write_bytes(b"\n".join(lines(start, stop)) + b"\n")
    return path


def rows(start: int, stop: int, form: str = "question") -> Pulled:
    return Pulled(lines(start, stop), "jsonl", "questions", form)


# --- sources ------------------------------------------------------------------------------------------------


def test_a_path_is_read_as_json_lines_with_its_name_as_label(tmp_path):
    pulled = pull(CONFIG, path=str(write_rows(tmp_path / "March tickets.jsonl", 0, 5)))
    assert pulled[:4] == (lines(0, 5), "jsonl", "March tickets", "question")


def test_rows_of_a_topic_come_from_its_own_columns_and_paths_count_from_the_checkout(tmp_path):
    (tmp_path / "arrays.csv").write_text("asked,label\nwhat is an axis?,numpy\n")
    settings = {"columns": {"prompt": "text", "completion": "category"}}
    config = CONFIG.model_copy(update={"ingest": IngestConfig(**settings)})
    columns = {"prompt": "asked", "completion": "label"}
    source = TopicSource(match="array", source="jsonl", path="arrays.csv", columns=columns)
    pulled = pull(config, root=tmp_path, **source.arguments())
    assert msgspec.json.decode(pulled.lines[0]) == {"prompt": "what is an axis?", "completion": "numpy"}


def test_rows_that_cannot_be_used_are_refused_before_anything_is_committed(tmp_path):
    (tmp_path / "more.csv").write_text("question,label\n" + "why?,bug\n" * 8)
    unmapped = pull(CONFIG, path=str(tmp_path / "more.csv"))
    with pytest.raises(DataError, match=r"8 of 8 rows of more cannot be used \(8 \w+\)") as raised:
        check_rows(unmapped, CONFIG)
    assert "--columns" in raised.value.remedy and "nothing was committed" in raised.value.remedy
    check_rows(pull(CONFIG, path=str(tmp_path / "more.csv"), columns={"answer": "label"}), CONFIG)
    good = [*lines(0, 98), b'{"question": "why?"}', b"no JSON"]
    check_rows(Pulled(good, "jsonl", "two bad rows", "question"), CONFIG)
    with pytest.raises(DataError, match=r"1 no_answer|1 invalid_json"):
        check_rows(Pulled([*good[:2], b"{}", *good[-2:]], "jsonl", "few", "question"), CONFIG)


def test_packages_are_read_as_documentation():
    pulled = pull(CONFIG.model_copy(update={"ingest": IngestConfig(source="jsonl")}), packages=["email"])
    assert (pulled.source, pulled.label, pulled.form) == ("pydoc", "email", "messages")
    assert len(pulled.lines) > 10


def test_a_glob_reads_all_files_and_its_star_is_no_part_of_the_label(tmp_path):
    write_rows(tmp_path / "part-1.jsonl", 0, 2)
    write_rows(tmp_path / "part-2.jsonl", 2, 4)
    pulled = pull(CONFIG, path=str(tmp_path / "part-*.jsonl"))
    assert pulled[:4] == (lines(0, 4), "jsonl", "part-", "question")
    assert [(file.name, file.rows) for file in pulled.files] == [("part-1.jsonl", 2), ("part-2.jsonl", 2)]
    assert pull(CONFIG, path=str(tmp_path / "*.jsonl")).label == "rows"


def test_an_unknown_source_is_refused_with_those_that_are_known():
    with pytest.raises(DataError, match=r"(?s)source 'mongodb' is unknown.*pydoc, jsonl"):
        pull(CONFIG, source="mongodb")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_a_source_without_rows_is_refused(tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"the source jsonl \(empty\) gave no rows"):
        pull(CONFIG, path=str(tmp_path / "empty.jsonl"))


def test_a_form_that_nobody_knows_is_refused_with_the_rows_keys(tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"frage": "?", "antwort": "!"}\n')
    with pytest.raises(
        DataError, match=r"(?s)odd\.jsonl: keys \['antwort', 'frage'\] fit no form.*ingest\.jsonl\.form"
    ):
        pull(CONFIG, path=str(tmp_path / "odd.jsonl"))


def test_a_form_that_was_named_is_taken(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "question": "b", "answer": "c"}\n')
    assert pull(CONFIG, path=str(tmp_path / "rows.jsonl")).form == "question"
    named = CONFIG.model_copy(update={"ingest": IngestConfig(jsonl=JsonlSource(form="text"))})
    assert pull(named, path=str(tmp_path / "rows.jsonl")).form == "text"


@pytest.mark.parametrize("first", [b"no json", b"{", b"\xff\xfe\xfd broken", b"42", b"null"])
def test_a_broken_first_row_is_left_to_preparation(tmp_path, first):
    (tmp_path / "rows.jsonl").write_bytes(b"  " + first + b"\n" + b"\n".join(lines(0, 2)) + b"\n")
    pulled = pull(CONFIG, path=str(tmp_path / "rows.jsonl"))
    assert pulled.form == "question"
    assert len(pulled.lines) == 3


# --- batches ------------------------------------------------------------------------------------------------


def add(raw: Path, pulled: Pulled) -> tuple[Any, bool]:
    return add_batch(raw, pulled, licence="CC0-1.0", who="Ana")


def test_the_same_rows_again_make_no_second_batch(tmp_path):
    first, is_new = add(tmp_path, rows(0, 5))
    assert is_new
    assert add(tmp_path, rows(0, 5)._replace(label="another word")) == (first, False)
    assert read_manifest(tmp_path) == [first]
    assert (first.rows, first.source, first.form, first.licence, first.who) == (
        5,
        "jsonl",
        "question",
        "CC0-1.0",
        "Ana",
    )


@pytest.mark.parametrize(
    "other",
    [rows(0, 6), rows(1, 5), rows(0, 5)._replace(lines=lines(0, 5)[::-1])],
    ids=["more", "fewer", "another order"],
)
def test_other_rows_are_another_batch(tmp_path, other):
    first, _ = add(tmp_path, rows(0, 5))
    second, is_new = add(tmp_path, other)
    assert is_new
    assert read_manifest(tmp_path) == [first, second]


@pytest.mark.parametrize(
    "label", ["../../etc/passwd", "a b/c", "", "Ünï", "-rf", "x" * 300, "data?token=secret"]
)
def test_a_label_cannot_lead_out_of_the_folder(tmp_path, label):
    batch, _ = add(tmp_path / "raw", rows(0, 2)._replace(label=label))
    assert (tmp_path / "raw" / batch.name).parent.resolve() == tmp_path / "raw"
    assert set(batch.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.TZ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_the_secret_of_a_signed_url_is_no_part_of_the_label(tmp_path):
    """Labels stand in commit messages and file names."""
    write_rows(tmp_path / "rows", 0, 2)
    assert pull(CONFIG, path=f"file://{tmp_path}/rows").label == "rows"
    assert label_of("https://bucket.example.org/rows.jsonl?X-Amz-Signature=a.secret") == "rows"
    assert label_of("https://ana:secret@example.org/part-*.jsonl") == "part-"
    assert label_of("exports/rows-?.jsonl") == "rows-?"


# --- the golden set -----------------------------------------------------------------------------------------


def frozen(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_golden_rows_of_pydoc_come_from_the_share_that_preparation_tests_on(tmp_path):
    """The demo's base reads the same packages, and leaves that share out."""
    assert (
        freeze_golden(tmp_path / "golden.jsonl", rows(0, 400)._replace(source="pydoc"), CONFIG, rows=20) == 20
    )
    found = frozen(tmp_path / "golden.jsonl")
    assert len(found) == 20
    for row in found:
        assert (
            split_by_hash(example_id(Message(**message) for message in row["messages"]), CONFIG.prepare)
            == "test"
        )


def test_the_same_rows_are_chosen_whatever_their_order(tmp_path):
    freeze_golden(tmp_path / "one.jsonl", rows(0, 400), CONFIG, rows=20)
    freeze_golden(tmp_path / "two.jsonl", rows(0, 400)._replace(lines=lines(0, 400)[::-1]), CONFIG, rows=20)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_a_teams_own_golden_file_is_taken_whole(tmp_path):
    assert freeze_golden(tmp_path / "golden.jsonl", rows(0, 100), CONFIG, rows=1000) == 100
    assert len(frozen(tmp_path / "golden.jsonl")) == 100


def test_a_golden_set_that_is_there_stays(tmp_path):
    path = tmp_path / "golden.jsonl"
    path.write_text("")  # as in a fresh clone
    freeze_golden(path, rows(0, 200), CONFIG, rows=5)
    before = path.read_bytes()
    with pytest.raises(DataError, match="holds a golden set already"):
        freeze_golden(path, rows(200, 400), CONFIG, rows=5)
    assert path.read_bytes() == before


def test_a_golden_row_that_could_not_be_asked_is_refused_when_it_is_frozen(tmp_path, tiny_base, tiny_config):
    long = json.dumps({"question": "What is number 7?", "answer": "word " * 60}).encode()
    pulled = Pulled([*lines(0, 9), long], "jsonl", "questions", "question")
    said: list[str] = []
    path, config = tmp_path / "golden.jsonl", tiny_config  # 96 tokens a row
    with pytest.raises(DataError, match=r"(?s)1 of 10 golden rows.*tokenize\.max_length: \d+"):
        freeze_golden(path, pulled, config, rows=10, base=tiny_base, tell=said.append)
    assert not path.exists() and said == []
    assert freeze_golden(path, rows(0, 9), config, rows=10, base=tiny_base, tell=said.append) == 9
    assert said == []
    freeze_golden(tmp_path / "two.jsonl", pulled, config, rows=10, base=tmp_path, tell=said.append)
    assert len(said) == 1 and "models/base" in said[0], "nothing to measure with yet: it is said"


def test_rows_that_are_broken_are_no_golden_rows(tmp_path):
    broken = [
        b"no json",
        b"[]",
        b"null",
        b'{"question": "?"}',
        b'{"question": [], "answer": {}}',
        b'{"question": "", "answer": ""}',
        b'{"question": "a", "answer": "b", "meta": 5}',
    ]
    with pytest.raises(DataError, match="no row is fit for the golden set"):
        freeze_golden(
            tmp_path / "golden.jsonl", Pulled(broken[:-1], "jsonl", "broken", "auto"), CONFIG, rows=5
        )
    assert not (tmp_path / "golden.jsonl").exists()
    assert (
        freeze_golden(
            tmp_path / "golden.jsonl",
            Pulled([*broken, *lines(0, 100)], "jsonl", "broken", "auto"),
            CONFIG,
            rows=500,
        )
        > 0
    )


# --- the whole flow -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefect() -> Iterator[None]:
    """A server of Prefect's with its own database; half a minute until it answers."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=int(scaled(120))):
        yield


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    use_git_without_a_user(monkeypatch)
    monkeypatch.delenv("RATCHET_CONSOLE", raising=False)
    return make_repository(tmp_path / "checkout")


@pytest.mark.e2e
def test_a_batch_lands_as_one_commit_and_the_same_rows_again_make_none(root, tmp_path, prefect):
    from flows.ingest import ingest

    write_rows(tmp_path / "March tickets.jsonl", 0, 30)
    done = ingest(root=str(root), path=str(tmp_path / "March tickets.jsonl"))
    assert (done["rows"], done["new"]) == (30, True)
    assert done["commit"] == git(root, "rev-parse", "HEAD").strip()
    assert subjects(root)[0] == "Ingest 30 rows from jsonl (March tickets)"
    assert git(root, "log", "-1", "--format=%b").strip() == f"Batch: {done['batch']}"
    assert git(root, "show", "--format=", "--name-only", "HEAD").split() == [
        "data/.gitignore",
        "data/raw.dvc",
    ]
    assert [batch.name for batch in read_manifest(root / "data/raw")] == [done["batch"]]
    assert read_manifest(root / "data/raw")[0].who == "Ana"

    again = ingest(root=str(root), path=str(tmp_path / "March tickets.jsonl"))
    assert again == {**done, "new": False}

    write_rows(tmp_path / "April.jsonl", 30, 50)
    later = ingest(root=str(root), path=str(tmp_path / "April.jsonl"))
    assert [batch.name for batch in read_manifest(root / "data/raw")] == [done["batch"], later["batch"]]

    write_rows(tmp_path / "golden.jsonl", 1000, 1300)
    golden = ingest(root=str(root), path=str(tmp_path / "golden.jsonl"), golden=10)
    assert (golden["rows"], len(frozen(root / "data/golden.jsonl"))) == (10, 10)
    with pytest.raises(DataError, match="holds a golden set already"):
        ingest(root=str(root), path=str(tmp_path / "golden.jsonl"), golden=10)
    assert subjects(root)[:3] == [
        "Freeze a golden set of 10 rows from jsonl (golden)",
        "Ingest 20 rows from jsonl (April)",
        "Ingest 30 rows from jsonl (March tickets)",
    ]


@pytest.mark.e2e
def test_pictures_land_with_their_batch_and_with_their_golden_rows(root, tmp_path, prefect):
    from flows.ingest import ingest

    shown = [question(number, image=f"{number}.png") for number in range(20)]
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(encoded(noise(number)))
    (tmp_path / "march.jsonl").write_text("\n".join(map(json.dumps, shown[:15])))
    (tmp_path / "golden.jsonl").write_text("\n".join(map(json.dumps, shown[15:])))
    done = ingest(root=str(root), path=str(tmp_path / "march.jsonl"))
    (batch,) = read_manifest(root / "data/raw")
    assert (done["batch"], batch.pictures) == (batch.name, 15)
    assert len(MediaStore([check_batch(root / "data/raw", batch).with_suffix(".tar")])) == 15
    assert ingest(root=str(root), path=str(tmp_path / "march.jsonl")) == {**done, "new": False}

    assert ingest(root=str(root), path=str(tmp_path / "golden.jsonl"), golden=3)["rows"] == 3
    landed = git(root, "show", "--format=", "--name-only", "HEAD").split()
    assert landed == ["data/golden.jsonl", "data/golden.tar"]
    assert len(MediaStore([root / "data/golden.tar"])) == 3 and git(root, "status", "--porcelain") == ""


# Somebody else's batch lands between our commit and our push: a hook that every clone gets.
RACE = """#!/bin/sh
cd ../../..
test -f .ratchet/raced && exit 0
touch .ratchet/raced
env -i PATH="$PATH" sh -c 'sed -i "s/size: /size: 1/" data/raw.dvc &&
    git commit --quiet --all --message "Somebody else"'
"""


@pytest.mark.e2e
def test_an_ingestion_starts_over_on_top_of_a_commit_that_came_first(root, tmp_path, prefect, monkeypatch):
    """Both changed data/raw.dvc: that cannot be merged, and need not be."""
    from flows.ingest import ingest

    ingest(root=str(root), path=str(write_rows(tmp_path / "one.jsonl", 0, 10)))
    write_files(tmp_path, {"template/hooks/post-commit": RACE})
    (tmp_path / "template/hooks/post-commit").chmod(0o755)
    monkeypatch.setenv("GIT_TEMPLATE_DIR", str(tmp_path / "template"))
    done = ingest(root=str(root), path=str(write_rows(tmp_path / "two.jsonl", 10, 20)))
    assert done["new"]
    assert subjects(root)[:2] == ["Ingest 10 rows from jsonl (two)", "Somebody else"]
    assert len(read_manifest(root / "data/raw")) == 2


def test_rows_that_the_champion_does_not_know_are_counted_once(tmp_path):
    raw = tmp_path / "data/raw"
    rows = [
        msgspec.json.encode({"prompt": f"question {number}", "completion": "yes"}) for number in range(10)
    ]
    old = write_batch(
        raw,
        rows[:4],
        source="jsonl",
        label="old",
        time="2026-01-01T00:00:00Z",
        licence="",
        who="",
        form="auto",
    )
    write_batch(
        raw,
        [*rows[2:7], rows[5]],
        source="jsonl",
        label="new",
        time="2026-02-01T00:00:00Z",
        licence="",
        who="",
        form="auto",
    )
    (tmp_path / "data/golden.jsonl").write_bytes(rows[6] + b"\n")
    pulled = Pulled([rows[5], rows[8]], "feedback", "feedback", "auto")
    assert count_new(tmp_path, {old.name}, [pulled]) == 3, "rows 4, 5 and 8: 6 is golden, 5 came twice"


def test_a_path_with_another_source_than_files_is_refused():
    with pytest.raises(DataError, match="a path is named"):
        pull(Config(), source="pydoc", path="rows.jsonl")
