"""A stage that another machine computes: two checkouts, a bare git remote, a folder as DVC remote."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from places import commit, make_repository, use_git_without_a_user, write_files
from two_machines import LEARN, Machines, make_machines

from ratchet.errors import CheckoutError, CommandError, StageError, SupersededError
from ratchet.files import sha256_file
from ratchet.pipeline import work_branch
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.checkpoint_files import FOLDER
from ratchet.pipeline.dvc import Workspace, run_stage, stale_stages
from ratchet.pipeline.work_branch import (
    BEGUN,
    DONE,
    SAVED,
    Attempt,
    advance,
    begin,
    compute,
    forget,
    open_attempt,
    read,
    take,
)
from ratchet.pipeline.workspace import open_workspace


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    use_git_without_a_user(monkeypatch)
    monkeypatch.setattr(work_branch, "OUTAGE_SECONDS", 0.0)
    monkeypatch.setattr(work_branch, "CHECK_SECONDS", 0.1)


@pytest.fixture
def machines(tmp_path) -> Machines:
    return make_machines(tmp_path)


def quiet(line: str) -> None:
    """Nobody listens."""


def work(machine: Path, attempt: Attempt, say=quiet) -> Attempt:
    """What a worker does with an attempt."""
    with open_attempt(machine, attempt, say) as workspace:
        return compute(workspace, "train", attempt, say)


def asked(workspace: Workspace, stage: str = "train") -> Attempt:
    run_stage(workspace, "make", quiet)
    return begin(workspace, stage, quiet)


def another_machine(machines: Machines) -> Path:
    git(machines.hub.parent, "clone", "--quiet", "origin.git", "third")
    return machines.hub.parent / "third"


def test_a_stage_that_was_done_elsewhere_is_unchanged_here_and_has_the_bytes_of_one_done_here(machines):
    with open_workspace(machines.hub, "test", quiet) as workspace:
        run_stage(workspace, "make", quiet)
        run_stage(workspace, "train", quiet)
        here = (workspace.path / "dvc.lock").read_text()
        bytes_here = sha256_file(workspace.path / "models/learned/weights")
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace)
        assert (attempt.number, attempt.state) == (1, BEGUN)
        assert not (machines.other / ".dvc/cache/files").exists()
        done = work(machines.other, attempt)
        assert not (workspace.path / "models/learned").exists()
        take(workspace, "train", done, quiet)
        assert sha256_file(workspace.path / "models/learned/weights") == bytes_here
        assert (workspace.path / "dvc.lock").read_text() == here
        assert run_stage(workspace, "train", quiet) is False
        assert "train" not in stale_stages(workspace)
        assert git(machines.hub, "log", "--format=%s", "-1").strip() == "Add files", "nothing has landed"
        forget(workspace, [done.branch])
        assert read(workspace, done.branch) is None


def test_a_run_that_starts_again_finds_the_result_of_the_earlier_one(machines):
    with open_workspace(machines.hub, "test", quiet) as workspace:
        done = work(machines.other, asked(workspace))
    with open_workspace(machines.hub, "test", quiet) as workspace:
        assert asked(workspace) == done._replace(state=DONE)


def test_another_machine_goes_on_from_the_checkpoint_of_one_that_was_killed(machines):
    """The first machine is a process that is killed; its successor has nothing but git and DVC remote."""
    (machines.other / "wait").touch()
    told: list[str] = []
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace)
        code = (
            "from pathlib import Path; from ratchet.pipeline import work_branch as w; w.CHECK_SECONDS = 0.1\n"
            f"attempt = w.Attempt(*{tuple(attempt)!r})\n"
            f"with w.open_attempt(Path({str(machines.other)!r}), attempt, print) as workspace:\n"
            "    w.compute(workspace, 'train', attempt, lambda line: print(line, flush=True))\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            for line in process.stdout or []:
                if "step-00000003 is pushed" in line:
                    break
            process.kill()
        (machines.other / "wait").unlink()  # its stage may end, unseen by anybody
        tip = read(workspace, attempt.branch)
        assert tip and tip.state == SAVED
        again = begin(workspace, "train", quiet)
        assert (again.number, again.branch) == (2, attempt.branch)
        done = work(another_machine(machines), again, told.append)
        assert "from 3" in told and any("took step-00000003" in line for line in told)
        take(workspace, "train", done, quiet)
        weights = (workspace.path / "models/learned/weights").read_text()
        assert weights == json.dumps([0, 1, 4, 9, 16, 25]) + "made"
        assert workspace.git("status", "--porcelain", "checkpoint.dvc") == ""


def test_a_machine_that_was_thought_lost_cannot_write_when_it_wakes_up(machines):
    """Neither a checkpoint nor its result, also when the branch is gone; its stage is ended."""
    (machines.other / "wait").touch()
    with open_workspace(machines.hub, "test", quiet) as workspace:
        first = asked(workspace)
        faults: list[BaseException] = []
        waits = threading.Event()

        def say(line: str) -> None:
            if "step-00000003 is pushed" in line:
                waits.set()

        def sleeper() -> None:
            try:
                work(machines.other, first, say)
            except SupersededError as error:
                faults.append(error)

        thread = threading.Thread(target=sleeper)
        thread.start()
        assert waits.wait(200)
        second = begin(workspace, "train", quiet)
        (machines.other / "wait").unlink()  # the machine wakes up, with three steps still to do
        thread.join(200)
        assert "attempt 1 is over" in str(faults[0])
        assert read(workspace, first.branch) == second
        with open_attempt(machines.other, second, quiet) as late:
            with pytest.raises(SupersededError, match="is at attempt 2"):
                advance(late, "train", first, DONE, quiet)
            forget(workspace, [first.branch])
            with pytest.raises(SupersededError, match="is gone"):
                advance(late, "train", second, DONE, quiet)
        assert read(workspace, first.branch) is None
        with pytest.raises(CheckoutError, match="has no branch"):
            work(machines.other, second)


def test_a_push_between_two_looks_is_refused_by_the_remote_itself(machines, monkeypatch):
    """The sender has seen the branch, and another attempt begins before its push arrives."""
    with open_workspace(machines.hub, "test", quiet) as workspace:
        first = asked(workspace)
        push = work_branch.push_branch

        def late(other, *arguments):
            monkeypatch.setattr(work_branch, "push_branch", push)
            begin(workspace, "train", quiet)
            return push(other, *arguments)

        with open_attempt(machines.other, first, quiet) as other:
            monkeypatch.setattr(work_branch, "push_branch", late)
            with pytest.raises(SupersededError, match="is at attempt 2"):
                advance(other, "train", first, DONE, quiet)
        tip = read(workspace, first.branch)
        assert tip and (tip.number, tip.state) == (2, BEGUN)


def test_outputs_that_did_not_all_arrive_are_never_taken_for_complete(machines):
    """The DVC remote refuses some of the outputs: no commit names them."""
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace)
        files = machines.store / "files/md5"
        places = {path.name for path in files.iterdir()}
        for number in range(256):  # a file is where the folder of an object would be made
            if f"{number:02x}" not in places:
                (files / f"{number:02x}").touch()
        with pytest.raises(CommandError, match="push"):
            work(machines.other, attempt)
        tip = read(workspace, attempt.branch)
        assert tip and tip.state != DONE
        for path in files.iterdir():
            if path.is_file():
                path.unlink()
        take(workspace, "train", work(machines.other, begin(workspace, "train", quiet)), quiet)
        assert run_stage(workspace, "train", quiet) is False


@pytest.mark.parametrize("how", ["damaged", "cut", "away"])
def test_a_damaged_object_is_refused(machines, how):
    with open_workspace(machines.hub, "test", quiet) as workspace:
        done = work(machines.other, asked(workspace))
        [weights] = [
            path
            for path in machines.store.rglob("*")
            if path.is_file() and path.read_bytes().startswith(b"[0, 1")
        ]
        content = weights.read_bytes()
        weights.chmod(0o644)
        if how == "away":
            weights.unlink()
        else:
            weights.write_bytes(b"[9" + content[2:] if how == "damaged" else content[:-5])
        with pytest.raises(CommandError) as caught:
            take(workspace, "train", done, quiet)
        assert "not what their hashes say" in str(caught.value) or how == "away"
        assert not (workspace.path / "models/learned/weights").exists()
        assert not any(
            path.is_file() and path.read_bytes().startswith((b"[9", b"[0, 1"))
            for path in (machines.hub / ".dvc/cache").rglob("*")
        )


def test_a_branch_that_changes_code_is_refused(machines):
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace)
        with open_attempt(machines.other, attempt, quiet) as other:
            write_files(other.path, {"learn.py": "print('mine')\n"})
            git(other.path, "-c", "user.name=B", "-c", "user.email=b@example.org", "commit", "-qam", "Mine")
            message = "Mine\n\nAttempt: 1\nState: done"
            head = other.git("rev-parse", "HEAD").strip()
            tree = other.git("rev-parse", "HEAD^{tree}").strip()
            author = ("-c", "user.name=B", "-c", "user.email=b@example.org")
            foreign = git(other.path, *author, "commit-tree", tree, "-p", head, "-m", message).strip()
            assert work_branch.push_branch(other, foreign, attempt.branch, attempt.commit)
        found = read(workspace, attempt.branch)
        assert found and found.state == DONE
        with pytest.raises(CheckoutError, match=r"changes learn\.py, which no stage writes"):
            take(workspace, "train", found, quiet)
        assert (workspace.path / "learn.py").read_text() == LEARN


def test_a_stage_that_fails_by_its_settings_fails_with_its_own_words(machines):
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace, "wrong")
        with open_attempt(machines.other, attempt, quiet) as other, pytest.raises(StageError) as caught:
            compute(other, "wrong", attempt, quiet)
        assert caught.value.exit_code == 2 and "the rate is wrong" in str(caught.value)


@pytest.mark.parametrize("lacking", ["git", "dvc"])
def test_without_a_way_to_the_other_machine_the_run_says_which_is_missing(machines, lacking):
    if lacking == "git":
        git(machines.hub, "remote", "remove", "origin")
    else:
        dvc(machines.hub, "remote", "remove", "store")
        commit(machines.hub, "No store")
    words = "has no git remote" if lacking == "git" else "no DVC remote"
    with open_workspace(machines.hub, "test", quiet) as workspace, pytest.raises(CheckoutError, match=words):
        asked(workspace)


def test_a_worker_in_a_checkout_of_another_project_is_told(machines, tmp_path):
    stranger = make_repository(tmp_path / "stranger")
    git(tmp_path, "clone", "--quiet", "--bare", "stranger", "theirs.git")
    git(stranger, "remote", "add", "origin", str(tmp_path / "theirs.git"))
    with open_workspace(machines.hub, "test", quiet) as workspace:
        attempt = asked(workspace)
    with pytest.raises(CheckoutError, match="a checkout of the same repository"):
        work(stranger, attempt)
    assert not (stranger / FOLDER).exists()
