"""Give a flow a clone of the repository to work in, never the user's checkout.

A workspace is cloned from the checkout's branch and shares its DVC cache. The flow runs and commits there,
and pushes back; if others pushed meanwhile, it rebases and tries again. The push updates the checkout's
files only if they are clean (git's `updateInstead`). With `landing: push` it goes to the checkout's git
remote first, with `pull_request` to a branch there at the end. A clone runs one DVC command at a time; a
checkout receives one push at a time.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from ratchet.config.params import load_config
from ratchet.errors import CheckoutError, CommandError, DamagedError
from ratchet.files import write_text
from ratchet.pipeline.checkout import (
    Say,
    check_checkout,
    commit_settings,
    dvc,
    git,
    locked,
    unheard_hooks,
)
from ratchet.pipeline.dvc import Workspace, share_cache
from ratchet.pipeline.integrity import check_fetched
from ratchet.pipeline.upstream import follow, offer, publish, put_on_top
from ratchet.storage.leases import require_held

WORKSPACES = Path(".ratchet/workspaces")
LANDING = Path(".ratchet/landing")  # exists while the checkout's data may be older than its commit
NAME = re.compile(r"(?P<start>\d{8}T\d{6})[\d.]*-(?P<purpose>.+)-\d+")
LANDING_TRIES = 5
# Git's errors if the checkout contains changes, or files unknown to it, that the push would overwrite.
IN_THE_WAY = re.compile(r"(Working directory has (?:un)?staged changes)")
UNKNOWN = re.compile(r"Untracked working tree file '(.*?)' would")


@contextmanager
def open_workspace(root: Path, purpose: str, say: Say, *, keep_failed: int = 2) -> Iterator[Workspace]:
    """Open a fresh clone, and remove it when the block ends without an error. Raises CheckoutError.

    The last `keep_failed` failed clones with the same purpose are kept for inspection.
    """
    finish_landing(root, say)
    branch = check_checkout(root)
    landing = load_config(root / "params.yaml").landing
    with clone(root, purpose, say, "--branch", branch, keep_failed=keep_failed) as path:
        if hooks := unheard_hooks(root):
            say(f"this checkout's hooks do not run for the commits of a run: {', '.join(hooks)}")
        workspace = Workspace(root, path, branch, landing)
        if landing != "checkout":
            follow(workspace)
        yield workspace
        if landing == "pull_request" and (told := offer(workspace)):
            say(told)


@contextmanager
def clone(root: Path, purpose: str, say: Say, *options: str, keep_failed: int) -> Iterator[Path]:
    """Clone the checkout with `options` of git's, share its DVC cache, and remove the clone at the end.

    The last `keep_failed` failed clones with the same purpose are kept for inspection.
    """
    path = root / WORKSPACES / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{purpose}-{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_failed(root, purpose, keep_failed)
    with _in_use(path):
        try:
            # Line ends stay as committed, because the inputs of stages are hashed by their bytes.
            plain = ("--config", "core.autocrlf=false")
            git(root, "clone", "--quiet", *plain, *options, str(root), str(path))
            share_cache(root, path)
            yield path
        except BaseException:
            if path.exists():
                _set_aside(root, path, purpose, keep_failed, say)
            raise
        shutil.rmtree(path, ignore_errors=True)


def failed_workspaces(root: Path) -> list[Path]:
    """List failed workspaces and those whose process was killed, the newest first."""
    return _workspaces(root, in_use=False)


def running(root: Path) -> list[tuple[str, datetime]]:
    """List what runs in workspaces of this checkout, the newest first: its purpose and its start in UTC."""
    names = [NAME.match(path.name) for path in _workspaces(root, in_use=True)]
    return [
        (name["purpose"], datetime.strptime(name["start"], "%Y%m%dT%H%M%S").replace(tzinfo=UTC))
        for name in names
        if name
    ]


def purpose_of(workspace: Path) -> str:
    """Return what a workspace was opened for, by its name; "" for another folder."""
    name = NAME.match(workspace.name)
    return name["purpose"] if name else ""


def _workspaces(root: Path, *, in_use: bool) -> list[Path]:
    found = [path for path in (root / WORKSPACES).glob("*") if path.is_dir() and _is_in_use(path) == in_use]
    return sorted(found, reverse=True)


def _set_aside(root: Path, path: Path, purpose: str, keep: int, say: Say) -> None:
    """Rename a failed workspace, since the lock beside its name is still held."""
    failed = path.rename(path.with_name(f"{path.name}-failed"))
    _drop_failed(root, purpose, keep)
    if keep:
        say(f"kept for inspection: {failed}")


def _drop_failed(root: Path, purpose: str, keep: int) -> None:
    for path in [path for path in failed_workspaces(root) if f"-{purpose}-" in path.name][keep:]:
        drop_workspace(path)


def drop_workspace(path: Path) -> None:
    """Remove a workspace, unless a run works in it."""
    if not _is_in_use(path):
        shutil.rmtree(path, ignore_errors=True)
        _lock(path).unlink(missing_ok=True)


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
            with bringing_data(workspace.root):
                _push(workspace, tag)
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
        if workspace.landing == "push":  # first, because commits that landed in the checkout cannot be moved
            publish(workspace, tag)
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
    put_on_top(workspace, f"origin/{workspace.branch}", workspace.branch)
    return True


def finish_landing(root: Path, say: Say) -> None:
    """Bring the data of a commit that reached the checkout when its process was killed before they did.

    It does nothing while another process lands.
    """
    if not (root / LANDING).exists():
        return
    with suppress(CheckoutError), locked(root, "land", wait=False):
        moved = _data_moved(root)
        if fault := _bring_data(root):
            say(f"the data in {root} are not those of its newest commit, and stay as they are: {fault}")
        elif moved:
            say(f"brought the data of the newest commit into {root}: an earlier run was killed as it landed")


@contextmanager
def bringing_data(root: Path) -> Iterator[None]:
    """Move the checkout's branch in the block, then bring the data of its newest commit.

    A note of the commit before stays for `finish_landing` when the process is killed. Hold the lock `land`.
    """
    if not (root / LANDING).exists():
        write_text(root / LANDING, git(root, "rev-parse", "HEAD"))
    yield
    _bring_data(root)


def _bring_data(root: Path) -> str:
    """Check out the data of the checkout's newest commit; return why some stay as they are, or "".

    Local changes are kept, because DVC does not overwrite them without --force.
    """
    if _data_moved(root):
        try:
            dvc(root, "checkout", "--quiet", "--allow-missing")
        except CommandError as error:
            return " ".join(str(error).split())[:400]
    (root / LANDING).unlink(missing_ok=True)
    return ""


def _data_moved(root: Path) -> bool:
    """Return whether commits since the one of the note changed data; one that is not known any more did."""
    try:
        changed = git(root, "diff", "--name-only", (root / LANDING).read_text().strip(), "HEAD").splitlines()
    except CommandError:
        return True
    return any(name.endswith((".dvc", "dvc.lock")) for name in changed)


def get_output(root: Path, commit: str, path: str, out: Path) -> None:
    """Write the file or folder `path` of `commit` to `out`, from cache or remote.

    Raises CommandError if it cannot be had, and DamagedError, with nothing left at `out`, if its bytes are
    not those that the commit names.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    dvc(root, "get", "--quiet", ".", path, "--rev", commit, "--out", str(out))
    try:
        check_fetched(root, path, out, partial(read_at, root, commit))
    except DamagedError:
        shutil.rmtree(out) if out.is_dir() else out.unlink()
        raise


def read_at(root: Path, commit: str, name: str) -> str | None:
    """Return the text of a file of a commit, or None if it has none of that name."""
    try:
        return git(root, "show", f"{commit}:{name}")
    except CommandError:
        return None


def require_output(root: Path, commit: str, path: str, out: Path) -> None:
    """Call `get_output`, but raise CheckoutError, which no flow retries: the data have to be pulled first."""
    try:
        get_output(root, commit, path, out)
    except CommandError as error:
        raise CheckoutError(
            f"{path} of {commit[:8]} cannot be had: {' '.join(str(error).split())[:400]}",
            remedy="dvc pull brings what another machine made",
        ) from None


@contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Mark a workspace as in use for as long as this process lives.

    A lock, not a process id: other containers and machines that share the folder see it too, and the system
    releases it when the process is killed.
    """
    from filelock import FileLock

    with FileLock(_lock(path), thread_local=False, fallback_to_soft=False):
        try:
            yield
        finally:
            _lock(path).unlink(missing_ok=True)


def _is_in_use(path: Path) -> bool:
    if not _lock(path).exists():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(_lock(path), blocking=False, thread_local=False, fallback_to_soft=False):
            return False
    except Timeout:
        return True


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
