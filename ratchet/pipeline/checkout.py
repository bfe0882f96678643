"""Run git and DVC in a folder, check a checkout, and hold its locks."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ratchet.errors import CheckoutError, CommandError
from ratchet.pipeline.processes import STARTER, name_process
from ratchet.storage.database import find_database
from ratchet.storage.leases import TakenError, hold

Say = Callable[[str], None]
FOREIGN = "dubious ownership"  # part of git's error for another user's checkout
# The checkout's own settings that apply to the commits of a run; a clone does not inherit them.
SETTINGS = r"^(user\.(name|email|signingkey)|commit\.gpgsign|gpg\..*)$"
OF_THE_CHECKOUT = ("up", "land")  # locks of one machine's services, and of pushes into one checkout
COMMIT_HOOKS = ("pre-commit", "prepare-commit-msg", "commit-msg")


def check_checkout(root: Path) -> str:
    """Check the checkout and return its branch.

    Raises CheckoutError: no git, no repository, no commit, no branch, DVC not set up, uncommitted changes.
    """
    if shutil.which("git") is None:
        raise CheckoutError("git is not installed", remedy="install it (apt-get install git), then run again")
    try:
        top = Path(git(root, "rev-parse", "--show-toplevel").strip())
    except CommandError as error:
        if FOREIGN in str(error):
            raise CheckoutError(
                f"{root} belongs to another user, so git refuses to work in it", remedy=trust(root)
            ) from None
        raise CheckoutError(
            f"{root} is no git repository",
            remedy="work in a clone: every run is traced to a commit (a downloaded archive: git init && git "
            "add -A && git commit -m start)",
        ) from None
    if top.resolve() != root.resolve():
        raise CheckoutError(
            f"{root} is inside the repository {top}, not its root", remedy=f"run the command with -C {top}"
        )
    try:
        branch = git(root, "symbolic-ref", "--short", "HEAD").strip()
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except CommandError:
        raise CheckoutError(
            f"{root} is on no branch, or has no commit yet", remedy="git switch main, or commit once"
        ) from None
    if not (root / ".dvc" / "config").exists():
        raise CheckoutError(
            f"{root} has no .dvc/config: DVC is not set up",
            remedy="git checkout .dvc, or `dvc init` and commit",
        )
    if changed := git(root, "status", "--porcelain", "--untracked-files=no").strip():
        files = ", ".join(line[2:].strip() for line in changed.splitlines()[:5])
        raise CheckoutError(
            f"{root} has uncommitted changes: {files}",
            remedy="git commit -a (a run is traced to a commit), or git stash; then run again",
        )
    return branch


def check_lock(root: Path) -> None:
    """Raise CheckoutError if dvc.lock is in the way of the one that a retraining commits."""
    if git(root, "status", "--porcelain", "--untracked-files=all", "--", "dvc.lock").startswith("??"):
        raise CheckoutError(
            f"{root} has a dvc.lock that git does not know, as `dvc repro` leaves it; a retraining commits "
            "its own",
            remedy="git add dvc.lock && git commit -m 'Stages that ran here'; then run again",
        )


def trust(root: Path) -> str:
    """Return the command by which git accepts a checkout of another user."""
    return f"git config --global --add safe.directory {root}"


def commit_settings(root: Path) -> list[str]:
    """Return git's options for a commit: author and signature from the checkout's configuration.

    Without a configured author (on a CI runner, in a container) the author is Ratchet.
    """
    known = {"user.name": "Ratchet", "user.email": "ratchet@localhost"}
    with suppress(CommandError):  # exit code 1: there is no such key
        for line in git(root, "config", "--get-regexp", SETTINGS).splitlines():
            key, _, value = line.partition(" ")
            known[key] = value or known.get(key, "true")
    return [part for key, value in known.items() for part in ("-c", f"{key}={value}")]


def unheard_hooks(root: Path) -> list[str]:
    """List the checkout's commit hooks, which do not run for a run's commits: a clone has no hooks.

    Return none if the user's configuration sets `core.hooksPath`, whose hooks run in every clone. DVC's
    hooks are left out, since a workspace does their work itself.
    """
    with suppress(CommandError):
        git(root, "config", "--global", "core.hooksPath")
        return []
    folder = root / git(root, "rev-parse", "--git-path", "hooks").strip()
    return [
        name
        for name in COMMIT_HOOKS
        if os.access(folder / name, os.X_OK) and b"dvc git-hook" not in (folder / name).read_bytes()
    ]


def who(root: Path) -> str:
    """Return the name of the user for the ledger: from git, the environment, or the system's user entry."""
    try:
        return git(root, "config", "user.name").strip()
    except CommandError:
        pass
    try:
        return os.environ.get("GIT_AUTHOR_NAME") or getpass.getuser()
    except (OSError, KeyError):  # in a container a user may be a number alone
        return f"user {os.getuid()}"


@contextmanager
def locked(root: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock `name` of the project: one process and one thread at a time.

    With a shared database it is a lease there, except for what concerns this checkout alone. Raises
    CheckoutError if it is taken and `wait` is False, ServiceError.
    """
    database = None if name in OF_THE_CHECKOUT else find_database(root)
    if database is None:
        with _locked_file(root, name, wait=wait):
            yield
        return
    try:
        with hold(database, name, wait=wait):
            yield
    except TakenError as taken:
        raise CheckoutError(
            f"another `{name}` runs ({taken})",
            remedy="wait for it; a lease that nobody renews ends by itself",
        ) from None


@contextmanager
def _locked_file(root: Path, name: str, *, wait: bool) -> Iterator[None]:
    """Hold a lock of the checkout's files. The system releases the lock of a killed process.

    A filesystem without such locks is an error: a lock that is a mere file would outlive its process.
    """
    from filelock import FileLock, Timeout  # importing it takes 0.25 s, which other commands need not spend

    path = root / ".ratchet" / "locks" / f"{name}.lock"
    try:
        held = FileLock(path, blocking=wait, thread_local=False, fallback_to_soft=False).acquire()
    except Timeout:
        raise CheckoutError(
            f"another `{name}` runs in {root}", remedy="wait for it; `ratchet status` shows it"
        ) from None
    with held:
        yield


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` and return its output. Raises CommandError."""
    return _run(["git", *arguments], folder)


def dvc(folder: Path, *arguments: str) -> str:
    """Run this environment's DVC in `folder` and return its output. Raises CommandError."""
    return _run([sys.executable, "-m", "dvc", *arguments], folder)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        words = " ".join(command[-len(command) + (2 if command[0] != "git" else 0) :])
        raise CommandError(
            f"{words[:200]} failed in {folder}: {(done.stderr or done.stdout).strip()[-1500:]}"
        )
    return done.stdout


# GOMP_SPINCOUNT: OpenMP's threads sleep after a short spin. On a busy machine a training step took 0.25 s
# with this value and 1.1 s with long spinning; threads that never spin are a third slower on a quiet machine.
# MALLOC_*: malloc keeps freed memory between two steps, which saves a tenth of a step.
STAGE_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(64 * 2**20)}


def child_environment() -> dict[str, str]:
    """Return the environment of child processes: this interpreter is first in PATH, as stages call `python`.

    A stage ends with this process, which it knows by STARTER. The variables of a surrounding git hook are
    removed, because they would point git to another repository.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "PYTHONPATH")
    }
    return {
        **STAGE_ENVIRONMENT,
        **kept,
        STARTER: name_process(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
