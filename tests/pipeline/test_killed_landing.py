"""A process that is killed as its commit lands leaves nothing that the next command does not mend.

git runs the checkout's hook `post-receive` when the commit has landed; here it kills the process that pushed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import commit, make_repository, subjects, use_git_without_a_user, write_files

from ratchet.cli.context import Here, find_root
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.workspace import LANDING, finish_landing, land, open_workspace

HOOK = '#!/bin/sh\nkill -9 "$KILLED"\n'
ROOT = Path(__file__).parents[2]
# A batch as `ingest` lands it; the process tells the hook its own id.
INGEST = """
import os, sys
from pathlib import Path
from ratchet.pipeline.workspace import land, open_workspace
os.environ["KILLED"] = str(os.getpid())
with open_workspace(Path(sys.argv[1]), "ingest", print) as workspace:
    (workspace.path / "data/raw/second").write_text("more")
    workspace.dvc("add", "--quiet", "data/raw")
    land(workspace, "Ingest", ["data/raw.dvc"])
"""


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A checkout whose one batch is in DVC, after a second one landed in it by a process that was killed."""
    use_git_without_a_user(monkeypatch)
    root = make_repository(tmp_path / "checkout")
    write_files(root, {"data/raw/first": "rows", "data/.gitignore": "/raw\n"})
    dvc(root, "add", "--quiet", "data/raw")
    commit(root, "First")
    hook = root / ".git/hooks/post-receive"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    ran = INGEST.replace("(workspace.path", "workspace.dvc('checkout', '--quiet')\n    (workspace.path")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ran, root], env=environment, check=False)
    assert done.returncode == -9 and subjects(root)[0] == "Ingest"
    assert sorted(path.name for path in (root / "data/raw").iterdir()) == ["first"], "the data did not follow"
    hook.unlink()
    return root


def batches(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "data/raw").iterdir())


def test_a_command_brings_the_data_and_says_so(root, monkeypatch, capsys):
    monkeypatch.setattr(Here, "path", root)
    assert find_root() == root and batches(root) == ["first", "second"]
    assert "brought the data of the newest commit" in capsys.readouterr().err
    find_root()
    assert capsys.readouterr().err == "" and git(root, "status", "--porcelain").strip() == ""
    assert dvc(root, "status", "data/raw.dvc").strip() == "Data and pipelines are up to date."


def test_a_run_brings_them_before_its_own_work_lands(root):
    told: list[str] = []
    with open_workspace(root, "test", told.append, keep_failed=0) as workspace:
        assert batches(root) == ["first", "second"]
        write_files(workspace.path, {"note": "x"})
        land(workspace, "Note", ["note"])
    assert [line for line in told if "brought the data" in line] and not (root / LANDING).exists()


def test_what_the_user_changed_stays_and_is_told_at_each_start(root):
    write_files(root, {"data/raw/third": "mine"})
    for _ in range(2):
        told: list[str] = []
        finish_landing(root, told.append)
        assert ["stay as they are" in line for line in told] == [True]
    assert (root / "data/raw/third").read_text() == "mine" and (root / LANDING).exists()


def test_a_push_that_was_refused_leaves_nothing_to_tell(root):
    finish_landing(root, lambda line: None)
    before = git(root, "rev-parse", "HEAD")
    write_files(root, {LANDING: before})
    told: list[str] = []
    finish_landing(root, told.append)
    assert told == [] and not (root / LANDING).exists()
