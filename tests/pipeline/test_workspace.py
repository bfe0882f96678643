"""A flow works in a clone: the checkout moves only when clean; nothing finished is lost or half-merged."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from patience import scaled
from places import commit, make_repository, subjects, use_git_without_a_user, write_files

from flows.retries import on_top
from ratchet.errors import CheckoutError, CommandError, StageError
from ratchet.pipeline.checkout import check_checkout, check_lock, dvc, git, locked, who
from ratchet.pipeline.dvc import bring, check_out, push_data, run_stage, stale_stages
from ratchet.pipeline.workspace import catch_up, failed_workspaces, land, open_workspace

STAGES = """
stages:
  fine:
    cmd: python -c "import os; print('one'); print(os.environ['RATCHET_ROOT'])" && cat in.txt > out.txt
    deps: [in.txt]
    outs: [out.txt]
  after:
    cmd: cat out.txt > after.txt
    deps: [out.txt]
    outs: [after.txt]
  users:
    cmd: python -c "import sys; print('a helper exited with 1'); print('the key is wrong'); sys.exit(2)"
  ours:
    cmd: python -c "import sys; print('a helper exited with 2'); sys.exit(3)"
  slow:
    cmd: python -c "import os, time; print('process', os.getpid(), flush=True); time.sleep(60)"
"""


@pytest.fixture(autouse=True)
def _plain_git(monkeypatch):
    use_git_without_a_user(monkeypatch)


@pytest.fixture
def root(tmp_path) -> Path:
    return make_repository(tmp_path / "my checkout")


def quiet(line: str) -> None:
    """Nobody listens."""


def opened(root: Path, purpose: str = "test", **settings):
    return open_workspace(root, purpose, quiet, **settings)


def refused(root: Path) -> str:
    with pytest.raises(CheckoutError) as caught:
        check_checkout(root)
    return str(caught.value)


# --- what a checkout has to be ---


def test_a_clean_checkout_is_fit_and_its_branch_is_told(root):
    assert check_checkout(root) == "main"
    git(root, "switch", "--quiet", "--create", "topic/one")
    assert check_checkout(root) == "topic/one"


def test_a_folder_without_git_is_refused(tmp_path):
    assert "is no git repository" in refused(tmp_path)
    assert "git init" in refused(tmp_path)


def test_a_folder_inside_a_repository_is_refused_with_its_root(root):
    (root / "inside").mkdir()
    assert f"run the command with -C {root}" in refused(root / "inside")


def test_a_repository_without_a_commit_is_refused(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert "has no commit yet" in refused(tmp_path)


def test_a_detached_head_is_refused(root):
    git(root, "checkout", "--quiet", "--detach")
    assert "git switch main" in refused(root)


def test_uncommitted_changes_are_refused_with_the_files(root):
    write_files(root, {"params.yaml": "project:\n  name: other\n", ".gitignore": ".ratchet/\n*.pyc\n"})
    git(root, "add", ".gitignore")
    assert "uncommitted changes: .gitignore, params.yaml" in refused(root)
    assert "git stash" in refused(root)


def test_a_lock_that_git_does_not_know_is_told_before_a_retraining(root):
    write_files(root, {"dvc.lock": "schema: '2.0'\n"})
    assert check_checkout(root) == "main"
    with pytest.raises(CheckoutError, match=r"(?s)git does not know.*git add dvc.lock"):
        check_lock(root)
    git(root, "add", "dvc.lock")
    check_lock(root)


def test_files_that_git_does_not_track_are_no_hindrance(root):
    write_files(root, {"notes.txt": "mine"})
    assert check_checkout(root) == "main"


def test_a_checkout_without_dvc_is_refused(root):
    git(root, "rm", "-r", "--quiet", ".dvc")
    git(root, "commit", "--quiet", "--message", "No DVC")
    assert "dvc init" in refused(root)


def test_a_checkout_of_another_user_is_refused_with_the_command_that_helps(root, monkeypatch):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert f"git config --global --add safe.directory {root}" in refused(root)


def test_no_workspace_is_made_of_a_checkout_that_is_not_fit(root):
    write_files(root, {"params.yaml": "project:\n  name: other\n"})
    with pytest.raises(CheckoutError), opened(root):
        pytest.fail("the block must not be entered")
    assert not (root / ".ratchet" / "workspaces").exists()


# --- a workspace's life ---


def test_a_workspace_is_a_clone_of_the_branch_and_goes_when_it_ends_well(root):
    git(root, "switch", "--quiet", "--create", "topic/one")
    with opened(root) as workspace:
        assert workspace.branch == "topic/one"
        assert workspace.git("rev-parse", "HEAD") == git(root, "rev-parse", "HEAD")
        assert workspace.path.parent == root / ".ratchet" / "workspaces"
        assert failed_workspaces(root) == []
    assert not workspace.path.exists()
    assert git(root, "status", "--porcelain").strip() == ""


def fail_in(root: Path, purpose: str = "test", **settings) -> Path:
    """The folder that is left, if one is."""
    told: list[str] = []
    with (
        pytest.raises(ZeroDivisionError),
        open_workspace(root, purpose, told.append, **settings) as workspace,
    ):
        write_files(workspace.path, {"trace.txt": "look at me"})
        raise ZeroDivisionError
    assert not workspace.path.exists()
    return Path(told[0].partition(": ")[2]) if told else Path()


def test_the_last_workspaces_that_failed_are_kept_to_look_at(root):
    left = [fail_in(root, keep_failed=2) for _ in range(3)]
    assert [path.exists() for path in left] == [False, True, True]
    assert (left[2] / "trace.txt").read_text() == "look at me"
    assert failed_workspaces(root) == [left[2], left[1]]


def test_with_nothing_to_keep_a_failed_workspace_is_removed(root):
    assert fail_in(root, keep_failed=0) == Path()
    assert failed_workspaces(root) == []


def test_workspaces_of_another_purpose_stay(root):
    """A rollback keeps none of its own, and leaves the retraining's to look at."""
    kept = fail_in(root, "retrain", keep_failed=2)
    fail_in(root, "rollback", keep_failed=0)
    with opened(root, "rollback", keep_failed=0):
        assert kept.exists()
    assert failed_workspaces(root) == [kept]


WORK = """
import sys, time
from pathlib import Path
from ratchet.pipeline.workspace import open_workspace
with open_workspace(Path(sys.argv[1]), "test", print) as workspace:
    print(workspace.path, flush=True)
    time.sleep(300)
"""


def test_the_clone_of_a_killed_process_counts_as_failed_and_that_of_a_living_one_does_not(root):
    with subprocess.Popen([sys.executable, "-c", WORK, root], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        works = Path(process.stdout.readline().strip())
        # A container sees other process ids, so the id in the name says nothing.
        assert works.is_dir()
        assert failed_workspaces(root) == []
        with opened(root, keep_failed=0):
            assert works.exists()
        process.kill()
        process.wait()
    assert failed_workspaces(root) == [works]
    with opened(root, keep_failed=0):
        assert not works.exists()
    assert list((root / ".ratchet" / "workspaces").iterdir()) == []


def test_a_clone_whose_name_has_the_id_of_a_living_process_of_elsewhere_counts_as_failed(root):
    gone = root / ".ratchet" / "workspaces" / f"20200101T000000-test-{os.getpid()}"
    gone.mkdir(parents=True)
    assert failed_workspaces(root) == [gone]


# --- landing ---


def test_landing_moves_the_files_of_a_clean_checkout(root):
    with opened(root) as workspace:
        write_files(workspace.path, {"champion.json": "{}", "other.txt": "not named"})
        landed = land(workspace, "Promote v1", ["champion.json"])
    assert (root / "champion.json").read_text() == "{}"
    assert not (root / "other.txt").exists()
    assert git(root, "rev-parse", "HEAD").strip() == landed
    assert subjects(root)[0] == "Promote v1"
    assert check_checkout(root) == "main"


def test_the_users_own_configuration_stays_as_it_was(root):
    before = (root / ".git" / "config").read_text()
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert (root / ".git" / "config").read_text() == before


def test_landing_nothing_makes_no_commit(root):
    before = git(root, "rev-parse", "HEAD").strip()
    with opened(root) as workspace:
        assert land(workspace, "Nothing", ["params.yaml"]) == before
    assert git(root, "rev-parse", "HEAD").strip() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"params.yaml": "project:\n  name: other\n"}, "unstaged changes"),
        ({"new.txt": "mine"}, "(?s)holds new.txt, which git does not know.*git add new.txt"),
    ],
    ids=["a changed file", "an untracked file in the way"],
)
def test_a_checkout_that_changed_meanwhile_stays_and_the_work_is_kept(root, changes, told):
    with pytest.raises(CheckoutError, match=told), opened(root) as workspace:
        write_files(root, changes)
        write_files(workspace.path, {"new.txt": "of the run"})
        land(workspace, "The run's", ["new.txt"])
    for name, text in changes.items():
        assert (root / name).read_text() == text
    assert subjects(root)[0] == "Start"
    [left] = failed_workspaces(root)
    assert subjects(left)[0] == "The run's"


def test_a_second_try_lands_what_the_first_one_committed(root):
    with opened(root) as workspace:
        write_files(root, {"params.yaml": "project:\n  name: other\n"})
        write_files(workspace.path, {"new.txt": "of the run"})
        with pytest.raises(CheckoutError):
            land(workspace, "The run's", ["new.txt"])
        git(root, "checkout", "--", "params.yaml")
        landed = land(workspace, "The run's, again", ["new.txt"])
    assert git(root, "rev-parse", "HEAD").strip() == landed
    assert subjects(root)[0] == "The run's"


def test_a_commit_that_came_first_stays_and_ours_goes_on_top(root):
    with opened(root) as workspace:
        write_files(root, {"theirs.txt": "b"})
        theirs = commit(root, "Theirs")
        write_files(workspace.path, {"ours.txt": "a"})
        write_files(workspace.path, {"params.yaml": "project:\n  name: not-committed\n"})
        landed = land(workspace, "Ours", ["ours.txt"])
    assert subjects(root)[:2] == ["Ours", "Theirs"]
    assert git(root, "rev-parse", "HEAD", "HEAD~1").split() == [landed, theirs]
    assert (root / "ours.txt").exists()


def test_two_commits_to_the_same_lines_are_an_error_and_no_mark_of_it_lands(root):
    with opened(root) as workspace:
        write_files(root, {"champion.json": "theirs\n"})
        commit(root, "Theirs")
        write_files(workspace.path, {"champion.json": "ours\n"})
        for _ in range(2):  # a flow tries again
            with pytest.raises(CommandError, match=r"another commit on main changed champion\.json as well"):
                land(workspace, "Ours", ["champion.json"])
        assert (workspace.path / "champion.json").read_text() == "ours\n"
    assert subjects(root) == ["Theirs", "Start"]
    assert (root / "champion.json").read_text() == "theirs\n"


def test_what_landed_meanwhile_can_be_brought_in(root):
    with opened(root) as workspace:
        assert catch_up(workspace) is False
        write_files(root, {"theirs.txt": "b"})
        commit(root, "Theirs")
        assert catch_up(workspace) is True
        assert (workspace.path / "theirs.txt").read_text() == "b"


def test_a_landing_waits_while_the_user_works_with_git(root):
    """The index is locked for as long as a git command of the user's runs."""
    lock = root / ".git" / "index.lock"
    with opened(root) as workspace:
        write_files(workspace.path, {"new.txt": "a"})
        lock.touch()
        helper = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import time, pathlib; time.sleep(0.7); pathlib.Path({str(lock)!r}).unlink()",
            ]
        )
        landed = land(workspace, "New", ["new.txt"])
        helper.wait()
    assert git(root, "rev-parse", "HEAD").strip() == landed
    assert (root / "new.txt").exists()


def test_a_tag_lands_with_its_commit_also_when_another_commit_came_first(root):
    with opened(root) as workspace:
        write_files(root, {"theirs.txt": "b"})
        commit(root, "Theirs")
        write_files(workspace.path, {"champion.json": "{}"})
        landed = land(workspace, "Promote v1", ["champion.json"], tag="model/small/v1")
    assert git(root, "rev-parse", "model/small/v1").strip() == landed


def test_a_tag_does_not_land_without_its_commit(root):
    with opened(root) as workspace:
        write_files(root, {"params.yaml": "project:\n  name: other\n"})
        write_files(workspace.path, {"champion.json": "{}"})
        with pytest.raises(CheckoutError):
            land(workspace, "Promote v1", ["champion.json"], tag="model/small/v1")
    assert git(root, "tag", "--list").strip() == ""


def author(root: Path) -> str:
    return git(root, "log", "-1", "--format=%an <%ae> %cn <%ce>").strip()


def test_a_commit_is_by_the_user_whom_the_checkout_knows(root):
    """Also where that stands in the checkout's own configuration, which a clone does not have."""
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert author(root) == "Ana <ana@example.org> Ana <ana@example.org>"
    assert who(root) == "Ana"


def test_where_git_knows_nobody_a_neutral_name_is_taken(root, monkeypatch):
    git(root, "config", "--remove-section", "user")
    monkeypatch.delenv("LOGNAME", raising=False)
    monkeypatch.setenv("USER", "runner")
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert author(root) == "Ratchet <ratchet@localhost> Ratchet <ratchet@localhost>"
    assert who(root) == "runner"


def test_a_name_in_the_environment_wins(root, monkeypatch):
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "Bo")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "bo@example.org")
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert author(root) == "Bo <bo@example.org> Bo <bo@example.org>"


def test_the_variables_of_a_surrounding_git_hook_do_not_reach_in(root, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert (root / "a.txt").exists()


def test_a_lock_is_one_processs_at_a_time_and_free_again_when_that_ends(root):
    with locked(root, "promote"):
        with locked(root, "retrain", wait=False):
            pass
        with (
            pytest.raises(CheckoutError, match="another `promote` runs"),
            locked(root, "promote", wait=False),
        ):
            pytest.fail("the block must not be entered")
    with locked(root, "promote", wait=False):
        pass


def test_the_lock_of_a_killed_process_is_free(root):
    program = (
        "import pathlib, sys; from ratchet.pipeline.checkout import locked\nwith "
        "locked(pathlib.Path(sys.argv[1]), 'promote'): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(root)]
    code = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckoutError, match="another `promote` runs"),
            locked(root, "promote", wait=False),
        ):
            pytest.fail("the block must not be entered")
        holder.kill()
    with locked(root, "promote", wait=False):
        pass


# --- how the user's git is set up ---


def write_hook(root: Path, name: str, text: str) -> None:
    write_files(root, {f".git/hooks/{name}": f"#!/bin/sh\n{text}\n"})
    (root / ".git/hooks" / name).chmod(0o755)


def test_hooks_of_the_checkout_that_do_not_run_are_named(root):
    write_hook(root, "pre-commit", "exit 1")
    write_hook(root, "commit-msg", "exec dvc git-hook commit-msg $@")  # DVC's own
    told: list[str] = []
    with open_workspace(root, "test", told.append) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    [line] = told
    assert line.endswith(": pre-commit") and subjects(root)[0] == "A"


def test_hooks_of_the_users_own_configuration_run_and_stop_a_commit(root, tmp_path, monkeypatch):
    write_hook(root, "pre-commit", "echo the rows are wrong >&2; exit 1")
    write_files(tmp_path, {"gitconfig": f'[core]\n    hooksPath = "{root}/.git/hooks"\n'})
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    told: list[str] = []
    with (
        pytest.raises(CommandError, match="the rows are wrong"),
        open_workspace(root, "test", told.append) as workspace,
    ):
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert not any("hooks do not run" in line for line in told) and subjects(root)[0] == "Start"


def test_commits_are_signed_where_the_checkout_wants_that(root, tmp_path):
    if not shutil.which("ssh-keygen"):
        pytest.skip("there is no ssh-keygen in PATH")
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    wanted = {"commit.gpgsign": "true", "gpg.format": "ssh", "user.signingkey": f"{key}.pub"}
    for name, value in wanted.items():
        git(root, "config", name, value)
    with opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert "gpgsig -----BEGIN SSH SIGNATURE-----" in git(root, "cat-file", "commit", "HEAD")


def test_a_commit_that_cannot_be_signed_says_how_to_go_on(root):
    git(root, "config", "commit.gpgsign", "true")
    git(root, "config", "gpg.program", "false")
    with pytest.raises(CheckoutError, match=r"git config commit\.gpgsign false"), opened(root) as workspace:
        write_files(workspace.path, {"a.txt": "a"})
        land(workspace, "A", ["a.txt"])
    assert subjects(root)[0] == "Start"


def test_a_stages_inputs_are_the_same_bytes_whatever_autocrlf_says(root, tmp_path, monkeypatch):
    rows, settings = "data/golden.jsonl", tmp_path / "gitconfig"
    attributes = (Path(__file__).parents[2] / ".gitattributes").read_text()
    write_files(root, {rows: "{}\n{}\n", ".gitattributes": attributes})
    commit(root, "Add golden rows")
    settings.write_text("[core]\n    autocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))

    git(tmp_path, "clone", "--quiet", str(root), "another")
    assert (tmp_path / "another" / rows).read_bytes() == (root / rows).read_bytes() == b"{}\n{}\n"
    git(root, "rm", "--quiet", ".gitattributes")
    git(root, "commit", "--quiet", "--message", "Without the file")
    with opened(root) as workspace:
        assert (workspace.path / rows).read_bytes() == b"{}\n{}\n"


# --- data and stages: these start DVC, two seconds each ---


@pytest.fixture
def staged(root) -> Path:
    write_files(
        root, {"dvc.yaml": STAGES, "in.txt": "input\n", ".gitignore": ".ratchet/\n/out.txt\n/after.txt\n"}
    )
    commit(root, "Add stages")
    return root


def test_data_reach_the_remote_the_checkout_and_the_next_workspace(root):
    """The remote's path is relative to the checkout, not to the clone.

    The next workspace reads the shared cache, so the remote may be away.
    """
    write_files(
        root, {".dvc/config": "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../a store\n"}
    )
    commit(root, "Add a remote")
    store = root.parent / "a store"
    with opened(root) as workspace:
        write_files(workspace.path, {"data/raw/rows.jsonl": "{}\n"})
        workspace.dvc("add", "--quiet", "data/raw")
        push_data(workspace, quiet)
        land(workspace, "Ingest", ["data/raw.dvc", "data/.gitignore"])
        assert not (workspace.path / ".dvc" / "cache").exists()
    assert "{}\n" in [path.read_text() for path in store.rglob("*") if path.is_file()]
    assert (root / "data/raw/rows.jsonl").read_text() == "{}\n"
    assert check_checkout(root) == "main"
    shutil.rmtree(store)
    with opened(root) as workspace:
        check_out(workspace)
        assert (workspace.path / "data/raw/rows.jsonl").read_text() == "{}\n"
        site = workspace.path / ".dvc" / "tmp" / "site"
        assert any(site.iterdir())  # DVC's notes about the clone go with the clone


@pytest.mark.parametrize("remote", [False, True])
def test_data_that_are_not_here_are_told_as_what_they_are(root, remote):
    """A clone by git alone has the name of the data, and neither cache nor remote that holds them."""
    write_files(root, {"data/raw/rows.jsonl": "{}\n"})
    git(root, "config", "core.autocrlf", "false")
    dvc(root, "add", "--quiet", "data/raw")
    if remote:
        (root.parent / "store").mkdir()
        dvc(root, "remote", "add", "--quiet", "--default", "store", str(root.parent / "store"))
    commit(root, "Ingest")
    git(root.parent, "clone", "--quiet", str(root), "fresh")
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        with opened(root.parent / "fresh", keep_failed=0) as workspace:
            (bring(workspace, "data/raw") if len(tries) < 2 else check_out(workspace))

    for attempt in (1, 2):
        with pytest.raises(CheckoutError, match="data/raw are not here") as caught:
            on_top(work, quiet)
        assert "dvc pull" in str(caught.value) and len(tries) == attempt, "no second try mends that"


def test_what_the_user_put_among_the_data_stays(root):
    with opened(root) as workspace:
        write_files(root, {"data/raw/mine.jsonl": "mine\n"})
        write_files(workspace.path, {"data/raw/rows.jsonl": "{}\n"})
        workspace.dvc("add", "--quiet", "data/raw")
        land(workspace, "Ingest", ["data/raw.dvc", "data/.gitignore"])
    assert (root / "data/raw/mine.jsonl").read_text() == "mine\n"
    assert subjects(root)[0] == "Ingest"


def test_without_a_remote_the_user_is_told_that_the_data_stay_here(root):
    told: list[str] = []
    with opened(root) as workspace:
        push_data(workspace, told.append)
    [line] = told
    assert "no DVC remote" in line and "dvc remote add" in line


def test_a_password_in_the_local_configuration_stays_readable_by_its_owner_alone(root):
    write_files(
        root,
        {".dvc/config.local": "['remote \"store\"']\n    url = s3://bucket/a%20b\n    password = pa%ss\n"},
    )
    with opened(root) as workspace:
        local = workspace.path / ".dvc" / "config.local"
        assert local.stat().st_mode & 0o077 == 0
        assert "pa%ss" in local.read_text()
        assert "url = s3://bucket/a%20b" in local.read_text()
        assert workspace.git("status", "--porcelain").strip() == ""


def test_a_stage_runs_once_and_its_lines_are_passed_on(staged):
    """It is told where the checkout is: a training keeps checkpoints there, since the workspace may go."""
    lines: list[str] = []
    with opened(staged) as workspace:
        assert run_stage(workspace, "fine", lines.append) is True
        assert lines == ["one", str(staged.resolve())]
        assert run_stage(workspace, "fine", lines.append) is False
        assert stale_stages(workspace) == {"after", "users", "ours", "slow"}


@pytest.mark.parametrize(("stage", "code"), [("users", 2), ("ours", 1)])
def test_a_failed_stage_tells_its_last_lines_and_whose_fault_it_is(staged, stage, code):
    lines: list[str] = []
    with (
        opened(staged) as workspace,
        pytest.raises(StageError, match=f"(?s)stage {stage} failed:\na helper exited with") as caught,
    ):
        run_stage(workspace, stage, lines.append)
    assert caught.value.exit_code == code
    assert ("the key is wrong" in str(caught.value)) == (stage == "users")


def wait_until_gone(process: int) -> bool:
    deadline = time.monotonic() + scaled(10)
    while time.monotonic() < deadline:
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_an_interruption_ends_the_stages_process(staged):
    started: list[int] = []

    def interrupt(line: str) -> None:
        if line.startswith("process "):
            started.append(int(line.split()[1]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(staged) as workspace:
        run_stage(workspace, "slow", interrupt)
    assert wait_until_gone(started[0])


PROGRAM = """
import sys
from pathlib import Path
from ratchet.pipeline.workspace import open_workspace; from ratchet.pipeline.dvc import run_stage
with open_workspace(Path(sys.argv[1]), "test", print) as workspace:
    run_stage(workspace, "slow", lambda line: print(line, flush=True))
"""


def test_ctrl_c_at_a_prompt_ends_the_stages_process_too(staged):
    """The stage is in a session of its own, so the terminal's signal does not reach it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(staged)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        stage = int(next(line for line in process.stdout if line.startswith("process ")).split()[1])
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.returncode != 0
    assert wait_until_gone(stage)
