"""champion.json and its git history: who is in charge, and who was."""

from __future__ import annotations

import msgspec
import pytest
from places import commit, make_repository, use_git_without_a_user, write_files

from ratchet.errors import CheckoutError
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import (
    FILE,
    Champion,
    Data,
    GateLine,
    last_entry,
    read_champion,
    read_ledger,
    write_champion,
)


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    use_git_without_a_user(monkeypatch)


@pytest.fixture
def root(tmp_path):
    return make_repository(tmp_path / "checkout")


def entry(version: int, previous: int | None = None, **changes: object) -> Champion:
    usual = Champion(
        name="small",
        version=version,
        previous=previous,
        commit="c" * 40,
        run_key="k" * 32,
        run_id="r" * 32,
        adapter_sha256="a" * 64,
        batches=["one.jsonl", "zwei-ü.jsonl"],
        data=Data("d.dir", 2, 10),
        gate=GateLine("promote", previous, "exact_match", 0.2, 0.1, 0.3),
        at="2026-01-02T03:04:05Z",
        by="Ana",
        why="better",
        move="promote",
        replaced=previous,
    )
    return msgspec.structs.replace(usual, **changes)


def put(root, champion: Champion) -> str:
    write_champion(root, champion)
    return commit(root, f"{champion.move} v{champion.version}")


def test_before_the_first_promotion_nobody_is_in_charge(root):
    assert read_champion(root) is None
    assert read_ledger(root) == []
    assert last_entry(root, 1) is None


def test_an_entry_is_read_as_it_was_written(root):
    write_champion(root, entry(3, 2))
    assert read_champion(root) == entry(3, 2)


def test_equal_entries_are_equal_bytes(root):
    write_champion(root, entry(3, 2))
    first = (root / FILE).read_bytes()
    write_champion(root, entry(3, 2))
    assert (root / FILE).read_bytes() == first


def test_the_ledger_is_the_files_history_the_newest_first(root):
    commits = [
        put(root, champion) for champion in (entry(1), entry(2, 1), entry(1, move="rollback", replaced=2))
    ]
    write_files(root, {"other.txt": "no move"})
    commit(root, "Something else")
    assert [(found, champion.move, champion.version) for found, champion in read_ledger(root)] == list(
        zip(reversed(commits), ["rollback", "promote", "promote"], [1, 2, 1], strict=True)
    )


def test_the_last_entry_of_a_version_is_the_newest_of_them(root):
    for champion in (
        entry(1, why="first"),
        entry(2, 1),
        entry(1, why="again", move="rollback", replaced=2),
        entry(3, 1),
    ):
        put(root, champion)
    assert last_entry(root, 1).why == "again"
    assert last_entry(root, 4) is None


def test_a_ledger_that_was_begun_anew_holds_what_was_before(root):
    put(root, entry(1))
    (root / FILE).unlink()
    commit(root, "Begin anew")
    put(root, entry(2))
    assert [champion.version for _, champion in read_ledger(root)] == [2, 1]


def test_without_git_the_ledger_is_empty(tmp_path):
    assert read_ledger(tmp_path) == []


GARBAGE = [
    "",
    "garbage",
    "[]",
    "null",
    "{}",
    '{"version": 3}',
    "<<<<<<< HEAD\n{}",
    '{"name": "small", "version": "three"}',
    "\x00",
]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_file_that_is_no_entry_is_refused_with_the_way_back(root, garbage):
    write_files(root, {FILE: garbage})
    with pytest.raises(
        CheckoutError, match=r"(?s)champion\.json is no champion entry: .*git checkout HEAD -- champion\.json"
    ):
        read_champion(root)


def test_a_broken_entry_is_named_by_its_commit_and_does_not_hide_what_is_newer(root):
    write_files(root, {FILE: "garbage"})
    broken = commit(root, "Broken")
    put(root, entry(1))
    put(root, entry(2, 1))
    assert last_entry(root, 1) == entry(1)
    with pytest.raises(CheckoutError, match=f"{FILE} at {broken[:8]} is no champion entry"):
        read_ledger(root)


def test_a_shallow_clone_knows_the_entries_that_it_has(root, tmp_path):
    put(root, entry(1))
    put(root, entry(2, 1))
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{root}", "shallow")
    assert [champion.version for _, champion in read_ledger(tmp_path / "shallow")] == [2]
    assert last_entry(tmp_path / "shallow", 1) is None


def test_rows_that_stayed_at_nodes_are_told_as_such():
    assert Data("d.dir", 2, 10).told == "10 rows in 2 batches, DVC d.dir"
    assert Data("d.dir", 0, 62, nodes=["north", "south"]).told == (
        "62 rows at 2 nodes (north, south); judged on DVC d.dir"
    )
    assert Data("d.dir", 1, 62, nodes=["north"], share="own share 1 of an adapter").told == (
        "62 rows at 1 nodes (north), own share 1 of an adapter; judged on DVC d.dir"
    )
