"""Where a run's commits go beside the checkout: to the branch of a git remote, or to a pull request."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import commit, make_repository, subjects, use_git_without_a_user, write_files

from ratchet.errors import CheckoutError, CommandError
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import land, open_workspace


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    use_git_without_a_user(monkeypatch)


def quiet(line: str) -> None:
    """Nobody listens."""


def project(tmp_path: Path, landing: str) -> tuple[Path, Path, Path]:
    """Our checkout, the bare remote, a colleague's checkout."""
    ours = make_repository(
        tmp_path / "ours", {"params.yaml": f"project:\n  name: small\nlanding: {landing}\n"}
    )
    git(tmp_path, "clone", "--quiet", "--bare", "ours", "origin.git")
    git(ours, "remote", "add", "origin", str(tmp_path / "origin.git"))
    git(tmp_path, "clone", "--quiet", "origin.git", "theirs")
    theirs = tmp_path / "theirs"
    git(theirs, "config", "user.name", "Bo")
    git(theirs, "config", "user.email", "bo@example.org")
    return ours, tmp_path / "origin.git", theirs


def push_theirs(theirs: Path, name: str, text: str = "x") -> None:
    git(theirs, "pull", "--quiet", "--rebase")
    write_files(theirs, {name: text})
    commit(theirs, f"Their {name}")
    git(theirs, "push", "--quiet")


def land_file(workspace, name: str, text: str = "ours", **settings) -> str:
    write_files(workspace.path, {name: text})
    return land(workspace, f"Our {name}", [name], **settings)


def head(repository: Path, ref: str = "main") -> str:
    return git(repository, "rev-parse", ref).strip()


def test_by_default_nothing_leaves_the_checkout(tmp_path):
    ours, origin, _ = project(tmp_path, "checkout")
    before = head(origin)
    with open_workspace(ours, "test", quiet) as workspace:
        land_file(workspace, "one")
    assert head(origin) == before and subjects(ours)[0] == "Our one"


def test_a_run_begins_with_what_others_pushed_and_lands_on_top_of_what_they_push_meanwhile(tmp_path):
    ours, origin, theirs = project(tmp_path, "push")
    push_theirs(theirs, "before")
    with open_workspace(ours, "test", quiet) as workspace:
        assert (workspace.path / "before").exists()
        push_theirs(theirs, "meanwhile")
        landed = land_file(workspace, "one", tag="model/small/v1")
        push_theirs(theirs, "again")
        land_file(workspace, "two")
    assert head(ours) == head(origin)
    assert subjects(ours)[:5] == ["Our two", "Their again", "Our one", "Their meanwhile", "Their before"]
    assert head(origin, "model/small/v1") == head(ours, "model/small/v1") == landed
    assert (ours / "again").exists() and git(ours, "status", "--porcelain") == ""


def test_a_line_that_both_changed_lands_nowhere(tmp_path):
    ours, origin, theirs = project(tmp_path, "push")
    with open_workspace(ours, "test", quiet, keep_failed=0) as workspace:
        push_theirs(theirs, "one", "theirs")
        with pytest.raises(CommandError, match="changed one as well"):
            land_file(workspace, "one")
    assert subjects(origin)[0] == "Their one" and subjects(ours)[0] != "Our one"


def test_own_commits_that_nobody_has_beside_theirs_are_left_to_a_person(tmp_path):
    ours, origin, theirs = project(tmp_path, "push")
    write_files(ours, {"mine": "x"})
    commit(ours, "Mine")
    push_theirs(theirs, "other")
    with (
        pytest.raises(CheckoutError, match=r"(?s)both have commits.*git pull --rebase origin main"),
        open_workspace(ours, "test", quiet),
    ):
        pytest.fail("the block must not be entered")
    assert subjects(ours)[0] == "Mine" and subjects(origin)[0] == "Their other"


def test_a_protected_branch_is_named_with_the_setting_that_helps_and_nothing_lands(tmp_path):
    ours, origin, _ = project(tmp_path, "push")
    protect(origin)
    before = head(ours)
    with (
        pytest.raises(CheckoutError, match=r"(?s)hook declined.*landing: pull_request"),
        open_workspace(ours, "test", quiet, keep_failed=0) as workspace,
    ):
        land_file(workspace, "one")
    assert head(ours) == before


def protect(origin: Path) -> None:
    """As GitHub does it: main takes no push, other branches do."""
    hook = origin / "hooks/update"
    hook.write_text('#!/bin/sh\ntest "$1" != refs/heads/main || { echo "protected branch"; exit 1; }\n')
    hook.chmod(0o755)


def test_for_a_protected_branch_a_run_pushes_one_of_its_own_and_says_how_to_go_on(tmp_path):
    ours, origin, theirs = project(tmp_path, "pull_request")
    protect(origin)
    before, told = head(origin), list[str]()
    for name in ("one", "two"):
        with open_workspace(ours, "test", told.append) as workspace:
            land_file(workspace, name)
    assert head(origin) == before
    assert head(origin, "ratchet/main") == head(ours)
    assert len(told) == 2 and "gh pr create --head ratchet/main --base main" in told[0]
    with open_workspace(ours, "test", told.append):
        pass
    assert len(told) == 2, "nothing new to offer"
    (origin / "hooks/update").unlink()
    git(theirs, "fetch", "--quiet")
    git(theirs, "merge", "--quiet", "--no-ff", "--message", "Merge", "origin/ratchet/main")
    git(theirs, "push", "--quiet")
    with open_workspace(ours, "test", told.append) as workspace:
        land_file(workspace, "three")
    assert subjects(ours)[0] == "Our three" and "Merge" in subjects(ours)


def test_a_checkout_without_a_remote_is_told(tmp_path):
    ours, _, _ = project(tmp_path, "push")
    git(ours, "remote", "remove", "origin")
    with pytest.raises(CheckoutError, match="has no git remote"), open_workspace(ours, "test", quiet):
        pytest.fail("the block must not be entered")
