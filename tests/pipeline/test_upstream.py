"""A checkout that exchanges commits with its git remote, for a retraining that a workflow asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import commit, make_repository, subjects, use_git_without_a_user, write_files

from flows.upstream import give_back, take_in
from ratchet.errors import CheckoutError
from ratchet.pipeline.checkout import git


@pytest.fixture
def pair(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The checkout that is served and a person's clone, with one bare repository as the origin of both."""
    use_git_without_a_user(monkeypatch)
    served = make_repository(tmp_path / "served", {"a.txt": "1\n", "b.txt": "1\n"})
    git(tmp_path, "clone", "--quiet", "--bare", str(served), "origin.git")
    git(served, "remote", "add", "origin", str(tmp_path / "origin.git"))
    git(tmp_path, "clone", "--quiet", str(tmp_path / "origin.git"), "person")
    person = tmp_path / "person"
    git(person, "config", "user.name", "Ben")
    git(person, "config", "user.email", "ben@example.org")
    return served, person


def change(path: Path, name: str, text: str, *, push: bool = False) -> str:
    write_files(path, {name: text})
    made = commit(path, f"Change {name} in {path.name}")
    if push:
        git(path, "push", "--quiet", "origin", "main")
    return made


def test_commits_of_both_sides_meet_and_keep_their_ids(pair):
    served, person = pair
    ours, theirs = change(served, "a.txt", "2\n"), change(person, "b.txt", "2\n", push=True)
    said: list[str] = []

    take_in(served, said.append)
    give_back(served, said.append)

    known = git(served, "log", "--format=%H").split()
    assert {ours, theirs} <= set(known)
    assert (served / "b.txt").read_text() == "2\n"
    assert git(served, "rev-parse", "origin/main") == git(served, "rev-parse", "HEAD")
    assert said == ["took in the commits of origin/main", "pushed to origin/main"]


def test_a_push_that_comes_too_late_merges_and_tries_again(pair):
    served, person = pair
    take_in(served, print)
    change(person, "b.txt", "3\n", push=True)
    change(served, "a.txt", "3\n")
    git(served, "tag", "model/small/v1")

    give_back(served, print)

    origin = served.parent / "origin.git"
    assert {"Change b.txt in person", "Change a.txt in served"} <= set(subjects(origin))
    assert git(origin, "tag", "--list").split() == ["model/small/v1"]


def test_lines_that_both_changed_stop_it_and_leave_the_checkout_as_it_was(pair):
    served, person = pair
    change(person, "a.txt", "theirs\n", push=True)
    before = change(served, "a.txt", "ours\n")

    with pytest.raises(CheckoutError, match="both changed"):
        take_in(served, print)

    assert git(served, "rev-parse", "HEAD").strip() == before
    assert git(served, "status", "--porcelain") == ""


def test_without_a_remote_or_with_changes_it_is_refused(pair):
    served, _ = pair
    write_files(served, {"a.txt": "not committed\n"})
    with pytest.raises(CheckoutError, match="uncommitted changes"):
        take_in(served, print)
    git(served, "checkout", "--quiet", "a.txt")
    git(served, "remote", "remove", "origin")
    with pytest.raises(CheckoutError, match="no git remote 'origin'"):
        take_in(served, print)
