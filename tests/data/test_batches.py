"""Batches are immutable: what was written is what is read, or an error names the difference."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratchet.data.batches import (
    MANIFEST,
    Batch,
    check_batch,
    content_hash,
    raw_lines,
    read_manifest,
    write_batch,
)
from ratchet.errors import DataError
from ratchet.files import sha256_file

LINES = [b'{"text": "a"}', '{"text": "one\u2028two"}'.encode(), b"no json"]


def write(raw, lines=LINES, label="json", time="2026-01-02T03:04:05Z") -> Batch:
    return write_batch(
        raw, lines, source="jsonl", label=label, time=time, licence="CC0-1.0", who="someone", form="text"
    )


def test_a_batch_is_read_back_as_it_was_written(tmp_path):
    batch = write(tmp_path)
    assert read_manifest(tmp_path) == [batch]
    assert [line for _, line in raw_lines(check_batch(tmp_path, batch))] == LINES
    assert [number for number, _ in raw_lines(tmp_path / batch.name)] == [1, 2, 3]
    assert batch == Batch(
        batch.name,
        3,
        sha256_file(tmp_path / batch.name),
        content_hash(LINES),
        "jsonl",
        "2026-01-02T03:04:05Z",
        "CC0-1.0",
        "someone",
        "text",
    )


def test_a_name_holds_the_time_the_label_and_the_content(tmp_path):
    batch = write(tmp_path, label="Support Tickets, May")
    assert batch.name == f"20260102T030405Z-support-tickets-may-{content_hash(LINES)[:8]}.jsonl"


def test_the_manifest_keeps_the_order_in_which_batches_came(tmp_path):
    batches = [
        write(tmp_path, [b"1"]),
        write(tmp_path, [b"2"], time="2025-01-01T00:00:00Z"),
        write(tmp_path, [b"3"]),
    ]
    assert read_manifest(tmp_path) == batches
    assert len((tmp_path / MANIFEST).read_bytes().splitlines()) == 3
    assert len({batch.name for batch in batches}) == 3


def test_the_content_hash_knows_where_a_line_ends():
    assert content_hash([b"ab", b"c"]) != content_hash([b"a", b"bc"])
    assert content_hash(LINES) == content_hash(iter(LINES))


def test_without_a_manifest_there_is_no_batch(tmp_path):
    assert read_manifest(tmp_path) == []


def test_a_changed_file_is_refused_with_both_hashes(tmp_path):
    batch = write(tmp_path)
    path = tmp_path / batch.name
    path.write_bytes(path.read_bytes().replace(b"a", b"b"))
    with pytest.raises(DataError, match="a batch is immutable") as caught:
        check_batch(tmp_path, batch)
    assert batch.sha256[:12] in str(caught.value)
    assert sha256_file(path)[:12] in str(caught.value)
    assert batch.sha256 != sha256_file(path)


def test_a_truncated_file_is_refused(tmp_path):
    batch = write(tmp_path)
    path = tmp_path / batch.name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="a batch is immutable"):
        check_batch(tmp_path, batch)


def test_a_missing_file_is_named_with_its_rows_and_what_to_do(tmp_path):
    batch = write(tmp_path)
    (tmp_path / batch.name).unlink()
    with pytest.raises(DataError, match=r"(?s)is missing; the manifest lists it with 3 rows.*dvc pull"):
        check_batch(tmp_path, batch)


@pytest.mark.parametrize(
    "garbage",
    [
        b"garbage",
        b"{}",
        b"[]",
        b"null",
        b'{"name": 4}',
        b'{"name": "\xff"}',
        b"\x00",
        b'{"name": "a", "rows": "3"}',
    ],
)
def test_a_manifest_line_that_is_no_entry_is_refused_and_nothing_is_written_over_it(tmp_path, garbage):
    write(tmp_path)
    manifest = tmp_path / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + garbage + b"\n")
    before = manifest.read_bytes()
    with pytest.raises(
        DataError, match=r"(?s)manifest\.jsonl holds a line that is no manifest entry.*dvc checkout"
    ):
        read_manifest(tmp_path)
    with pytest.raises(DataError):
        write(tmp_path, [b"more"])
    assert manifest.read_bytes() == before


@settings(deadline=None, max_examples=50)
@given(
    label=st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["", "../../etc/passwd", "a/b", ".", "-rf", "..", "x" * 500, "Ünïcode", "a\nb", "\x00"])
)
def test_any_label_gives_a_safe_name(tmp_path_factory, label):
    raw = tmp_path_factory.mktemp("raw")
    batch = write(raw, label=label)
    assert re.fullmatch(r"20260102T030405Z-[a-z0-9][a-z0-9-]{0,39}-[0-9a-f]{8}\.jsonl", batch.name)
    assert sorted(path.name for path in raw.iterdir()) == sorted([batch.name, MANIFEST])
