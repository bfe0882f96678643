"""Give a flow a clone of the repository to work in, never the user's checkout.

A workspace is cloned from the checkout's branch and shares its DVC cache. The flow runs and commits there,
and pushes back; if others pushed meanwhile, it rebases and tries again. The push updates the checkout's
files only if they are clean (git's `updateInstead`). A clone runs one DVC command at a time; a checkout
receives one push at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ratchet.errors import CheckoutError, CommandError
from ratchet.pipeline.checkout import (
    Say,
    check_checkout,
    child_environment,
    commit_settings,
    dvc,
    git,
    locked,
    unheard_hooks,
)
from ratchet.pipeline.dvc import Workspace, share_cache
from ratchet.storage.leases import require_held

WORKSPACES = Path(".ratchet/workspaces")
LANDING_TRIES = 5
# Git's errors if the checkout contains changes, or files unknown to it, that the push would overwrite.
IN_THE_WAY = re.compile(r"(Working directory has (?:un)?staged changes)")
UNKNOWN = re.compile(r"Untracked working tree file '(.*?)' would")


@contextmanager
def open_workspace(root: Path, purpose: str, say: Say, *, keep_failed: int = 2) -> Iterator[Workspace]:
    """Open a fresh clone, and remove it when the block ends without an error. Raises CheckoutError.

    The last `keep_failed` failed clones with the same purpose are kept for inspection.
    """
    branch = check_checkout(root)
    path = root / WORKSPACES / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{purpose}-{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_failed(root, purpose, keep_failed)
    try:
        # Line ends stay as committed, because the inputs of stages are hashed by their bytes.
        plain = ("--config", "core.autocrlf=false")
        git(root, "clone", "--quiet", *plain, "--branch", branch, str(root), str(path))
        if hooks := unheard_hooks(root):
            say(f"this checkout's hooks do not run for the commits of a run: {', '.join(hooks)}")
        share_cache(root, path)
        yield Workspace(root, path, branch)
    except BaseException:
        if path.exists():
            _set_aside(root, path, purpose, keep_failed, say)
        raise
    shutil.rmtree(path, ignore_errors=True)


def failed_workspaces(root: Path) -> list[Path]:
    """List failed workspaces and those whose process was killed, the newest first."""
    found = [
        path
        for path in (root / WORKSPACES).glob("*")
        if path.is_dir() and not _is_alive(path.name.rpartition("-")[2])
    ]
    return sorted(found, reverse=True)


def _set_aside(root: Path, path: Path, purpose: str, keep: int, say: Say) -> None:
    """Rename a failed workspace: a name that ends with the id of a live process counts as in use."""
    failed = path.rename(path.with_name(f"{path.name}-failed"))
    _drop_failed(root, purpose, keep)
    if keep:
        say(f"kept for inspection: {failed}")


def _drop_failed(root: Path, purpose: str, keep: int) -> None:
    for path in [path for path in failed_workspaces(root) if f"-{purpose}-" in path.name][keep:]:
        shutil.rmtree(path, ignore_errors=True)


def land(workspace: Workspace, message: str, paths: list[str], *, tag: str | None = None) -> str:
    """Commit `paths`, push, and return the id of HEAD.

    If somebody else pushed first, rebase and push again. A call after a failed push also pushes what the
    earlier call committed. Raises CheckoutError, CommandError, and LeaseError when another process has taken
    over the caller's lock.
    """
    workspace.git("add", "--", *paths)
    if workspace.git("diff", "--cached", "--name-only").strip():
        _commit(workspace, message)
    before = workspace.git("rev-parse", f"origin/{workspace.branch}").strip()
    if tag or before != workspace.git("rev-parse", "HEAD").strip():
        with locked(workspace.root, "land"):
            require_held()
            _push(workspace, tag)
            _bring_data(workspace, before)
    return workspace.git("rev-parse", "HEAD").strip()


def _commit(workspace: Workspace, message: str) -> None:
    """Commit the staged changes, signed if the user's configuration asks for it. Raises CheckoutError."""
    try:
        git(workspace.path, *commit_settings(workspace.root), "commit", "--quiet", "--message", message)
    except CommandError as error:
        if "failed to sign" not in str(error) and "gpg" not in str(error):
            raise
        raise CheckoutError(
            f"the commit could not be signed: {' '.join(str(error).split())[-300:]}",
            remedy="unlock the key (an agent, for schedules), or `git config commit.gpgsign false` in the "
            "checkout",
        ) from None


def _push(workspace: Workspace, tag: str | None) -> None:
    """Push the branch and the tag atomically: both or neither."""
    # Set for the receiving side of this push only, so that the user's configuration does not change.
    receive = "--receive-pack=git -c receive.denyCurrentBranch=updateInstead receive-pack"
    refs = [f"HEAD:refs/heads/{workspace.branch}", *([f"+HEAD:refs/tags/{tag}"] if tag else [])]
    for tries_left in reversed(range(LANDING_TRIES)):
        try:
            workspace.git("push", "--quiet", "--atomic", receive, "origin", *refs)
            return
        except CommandError as error:
            if found := UNKNOWN.search(str(error)):
                raise CheckoutError(
                    f"{workspace.root} holds {found.group(1)}, which git does not know and this run writes",
                    remedy=f"git add {found.group(1)} && git commit, or move it away; then run again: "
                    "finished stages are kept in the cache",
                ) from None
            if found := IN_THE_WAY.search(str(error)):
                raise CheckoutError(
                    f"{workspace.root} was changed while the run worked: {found.group(1)}",
                    remedy="git commit -a or git stash there, then run again: finished stages are kept in "
                    "the cache",
                ) from None
            if not tries_left:
                raise
            if not catch_up(workspace):
                # Nobody pushed meanwhile: a git command of the user may hold the lock of the index.
                time.sleep(0.5)


def catch_up(workspace: Workspace) -> bool:
    """Rebase the workspace's commits onto new commits of the branch; return False if there are none.

    Raises CommandError if both changed the same lines.
    """
    workspace.git("fetch", "--quiet", "origin", workspace.branch)
    if not workspace.git("rev-list", "--max-count=1", f"HEAD..origin/{workspace.branch}").strip():
        return False
    try:
        rebase = ("rebase", "--quiet", "--autostash", f"origin/{workspace.branch}")
        git(workspace.path, *commit_settings(workspace.root), *rebase)
    except CommandError as error:
        files = workspace.git("diff", "--name-only", "--diff-filter=U").split()
        with suppress(CommandError):
            workspace.git("rebase", "--abort")  # otherwise a second try would commit the conflict markers
        if not files:
            raise
        raise CommandError(
            f"another commit on {workspace.branch} changed {', '.join(files)} as well",
            remedy="run it again: finished stages are kept in the cache",
        ) from error
    return True


def _bring_data(workspace: Workspace, before: str) -> None:
    """Check out the data of the new commit in the user's checkout, if the commit changed data.

    Local changes are kept, because DVC does not overwrite them without --force.
    """
    if any(
        name.endswith((".dvc", "dvc.lock"))
        for name in workspace.git("diff", "--name-only", before, "HEAD").splitlines()
    ):
        command = [sys.executable, "-m", "dvc", "checkout", "--quiet", "--allow-missing"]
        subprocess.run(command, cwd=workspace.root, env=child_environment(), capture_output=True, check=False)


def get_output(root: Path, commit: str, path: str, out: Path) -> None:
    """Write the file or folder `path` of `commit` to `out`, from cache or remote. Raises CommandError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    dvc(root, "get", "--quiet", ".", path, "--rev", commit, "--out", str(out))


def require_output(root: Path, commit: str, path: str, out: Path) -> None:
    """Call `get_output`, but raise CheckoutError, which no flow retries: the data have to be pulled first."""
    try:
        get_output(root, commit, path, out)
    except CommandError as error:
        raise CheckoutError(
            f"{path} of {commit[:8]} cannot be had: {' '.join(str(error).split())[:400]}",
            remedy="dvc pull brings what another machine made",
        ) from None


def _is_alive(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()
