"""A flow works in a clone of the repository, never in the user's checkout.

A workspace is cloned from the checkout's branch, shares its DVC cache, runs, commits, and pushes back with
rebase-and-retry. The push moves the checkout's files only when it is clean (git's `updateInstead`). One DVC command at a
time a clone; one push at a time a checkout.
"""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ratchet.errors import CheckoutError, CommandError, StageError
from ratchet.pipeline.dag import KEYS, write_keys

EXITED = re.compile(r"exited with (-?\d+)")
TORCHRUN = re.compile(r"[EW]\d{4} \S+ \d+ torch/distributed/elastic/")  # begins its own report, which stands behind what a process said, and is long
WORKSPACES = Path(".ratchet/workspaces")
CACHE_TYPES = "reflink,symlink,hardlink,copy"
LANDING_TRIES = 5
# What git says when the checkout holds something that a landing would overwrite.
IN_THE_WAY = re.compile(r"(Working directory has (?:un)?staged changes|Untracked working tree file .*? would)")
# DVC's advice for people at a prompt; the flow does these things itself.
CHATTER = (
    ">",
    "Use `dvc push`",
    "To track the changes",
    "To enable auto staging",
    "\tgit add",
    "\tdvc config",
    "Updating lock file",
    "Generating lock file",
    "WARNING: 'data/golden.jsonl' is empty",
    "WARNING: 'data/forgotten.jsonl' is empty",
    "Running stage",
)

Say = Callable[[str], None]


class Workspace(NamedTuple):
    """A clone at `path` of the checkout at `root`, on `branch`."""

    root: Path
    path: Path
    branch: str

    def git(self, *arguments: str) -> str:
        return git(self.path, *arguments)

    def dvc(self, *arguments: str) -> str:
        return dvc(self.path, *arguments)


@contextmanager
def open_workspace(root: Path, purpose: str, say: Say, *, keep_failed: int = 2) -> Iterator[Workspace]:
    """A fresh clone, removed when the block ends well; of a purpose, the last `keep_failed` that did not are kept to look at. Raises CheckoutError."""
    branch = check_checkout(root)
    path = root / WORKSPACES / f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{purpose}-{os.getpid()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_failed(root, purpose, keep_failed)
    try:
        git(root, "clone", "--quiet", "--branch", branch, str(root), str(path))
        _share_cache(root, path)
        yield Workspace(root, path, branch)
    except BaseException:
        if path.exists():
            _set_aside(root, path, purpose, keep_failed, say)
        raise
    shutil.rmtree(path, ignore_errors=True)


def failed_workspaces(root: Path) -> list[Path]:
    """Workspaces that failed, and clones whose process was killed; the newest first."""
    found = [path for path in (root / WORKSPACES).glob("*") if path.is_dir() and not _is_alive(path.name.rpartition("-")[2])]
    return sorted(found, reverse=True)


def _set_aside(root: Path, path: Path, purpose: str, keep: int, say: Say) -> None:
    """Under a name without a process, so that nobody takes it for one in which somebody works."""
    failed = path.rename(path.with_name(f"{path.name}-failed"))
    _forget_failed(root, purpose, keep)
    if keep:
        say(f"left to look at: {failed}")


def _forget_failed(root: Path, purpose: str, keep: int) -> None:
    for path in [path for path in failed_workspaces(root) if f"-{purpose}-" in path.name][keep:]:
        shutil.rmtree(path, ignore_errors=True)


def check_checkout(root: Path) -> str:
    """The checkout's branch. Raises CheckoutError: no git, no repository, no commit, no branch, DVC not set up, uncommitted changes."""
    if shutil.which("git") is None:
        raise CheckoutError("git is not installed", remedy="install it (apt-get install git), then run again")
    try:
        top = Path(git(root, "rev-parse", "--show-toplevel").strip())
    except CommandError as error:
        if "dubious ownership" in str(error):
            raise CheckoutError(f"{root} belongs to another user, so git refuses to work in it", remedy=f"git config --global --add safe.directory {root}") from None
        raise CheckoutError(
            f"{root} is no git repository", remedy="work in a clone: every run is traced to a commit (a downloaded archive: git init && git add -A && git commit -m start)"
        ) from None
    if top.resolve() != root.resolve():
        raise CheckoutError(f"{root} is inside the repository {top}, not its root", remedy=f"run the command with -C {top}")
    try:
        branch = git(root, "symbolic-ref", "--short", "HEAD").strip()
        git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    except CommandError:
        raise CheckoutError(f"{root} is on no branch, or has no commit yet", remedy="git switch main, or commit once") from None
    if not (root / ".dvc" / "config").exists():
        raise CheckoutError(f"{root} has no .dvc/config: DVC is not set up", remedy="git checkout .dvc, or `dvc init` and commit")
    if changed := git(root, "status", "--porcelain", "--untracked-files=no").strip():
        files = ", ".join(line[2:].strip() for line in changed.splitlines()[:5])
        raise CheckoutError(f"{root} has uncommitted changes: {files}", remedy="git commit -a (a run is traced to a commit), or git stash; then run again")
    return branch


def run_stage(workspace: Workspace, stage: str, say: Say) -> bool:
    """Run one stage in its own process, its lines passed to `say`. Whether its outputs were made or fetched anew (False: unchanged). Raises StageError."""
    write_keys(workspace.path)
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    lines, code = _stream(command, workspace, say)
    if code:
        codes = EXITED.findall("\n".join(lines))  # DVC's own word comes last
        told = [line for line in without_torchrun(lines) if line and not line.startswith(("ERROR: failed to reproduce", "Verifying", *CHATTER))]
        if codes and codes[-1].startswith("-"):
            told.append(f"its process was killed by signal {codes[-1][1:]}" + ("; the same command goes on from the newest checkpoint" if stage == "train" else ""))
        raise StageError(f"stage {stage} failed:\n" + "\n".join(told[-12:] or lines[-3:]), exit_code=2 if codes[-1:] == ["2"] else 1)
    return not any(line.startswith(f"Stage '{stage}' didn't change") for line in lines)


def without_torchrun(lines: list[str]) -> list[str]:
    """What the processes themselves said, their own tracebacks included."""
    first = next((place for place, line in enumerate(lines) if TORCHRUN.match(line)), len(lines))
    return lines[:first] or lines


def _stream(command: list[str], workspace: Workspace, say: Say) -> tuple[list[str], int]:
    """Lines and exit code of a command. A signal to us ends its whole process group: DVC does not pass one on to the stage."""
    lines: list[str] = []
    environment = {**child_environment(), "RATCHET_ROOT": str(workspace.root.resolve())}  # where a training's checkpoints outlive the workspace
    with subprocess.Popen(
        command, cwd=workspace.path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            for line in process.stdout or []:
                lines.append(line.rstrip())
                if line.strip() and not line.startswith(CHATTER):
                    say(line.rstrip())
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return lines, process.returncode


def stale_stages(workspace: Workspace) -> set[str]:
    """Ask DVC which stages' inputs, code, params or outputs changed since they last ran, none downstream.

    `code` is none of them: DVC calls it changed at all times.
    """
    write_keys(workspace.path)
    found = json.loads(workspace.dvc("status", "--json"))
    return {name.rpartition(":")[2] for name in found if not name.endswith(".dvc")} - {KEYS.name}


def check_out(workspace: Workspace) -> None:
    """Bring what the last run made into the clone, from the shared cache or the remote. A file that is nowhere is made anew by its stage."""
    has_remote = bool(configured_remote(workspace.root))
    workspace.dvc(*(["pull", "--quiet", "--allow-missing"] if has_remote else ["checkout", "--quiet", "--allow-missing"]))


def configured_remote(root: Path) -> str | None:
    return next((found for name in ("config.local", "config") if (found := _dvc_config(root, name).get("core", "remote", fallback=None))), None)


def push_data(workspace: Workspace, say: Say) -> None:
    """`dvc push` where there is a remote; a warning where there is none."""
    if configured_remote(workspace.root) is None:
        say("no DVC remote is configured: the data stay on this machine (dvc remote add --default NAME URL)")
        return
    workspace.dvc("push", "--quiet")


def land(workspace: Workspace, message: str, paths: list[str], *, tag: str | None = None) -> str:
    """Commit `paths` and push, rebasing when somebody was faster. The commit's id; that of HEAD when nothing changed. Raises CheckoutError, CommandError.

    A second try after a push that failed lands what the first one committed.
    """
    workspace.git("add", "--", *paths)
    if workspace.git("diff", "--cached", "--name-only").strip():
        git(workspace.path, *_identity(workspace.root), "commit", "--quiet", "--message", message)
    before = workspace.git("rev-parse", f"origin/{workspace.branch}").strip()
    if tag or before != workspace.git("rev-parse", "HEAD").strip():
        with locked(workspace.root, "land"):
            _push(workspace, tag)
            _bring_data(workspace, before)
    return workspace.git("rev-parse", "HEAD").strip()


def _push(workspace: Workspace, tag: str | None) -> None:
    """The branch and the tag together or not at all."""
    # Given to the receiving side of this push alone: the user's own configuration stays as it is.
    receive = "--receive-pack=git -c receive.denyCurrentBranch=updateInstead receive-pack"
    refs = [f"HEAD:refs/heads/{workspace.branch}", *([f"+HEAD:refs/tags/{tag}"] if tag else [])]
    for tries_left in reversed(range(LANDING_TRIES)):
        try:
            workspace.git("push", "--quiet", "--atomic", receive, "origin", *refs)
            return
        except CommandError as error:
            if found := IN_THE_WAY.search(str(error)):
                raise CheckoutError(
                    f"{workspace.root} was changed while the run worked: {found.group(1).removesuffix(' would')}",
                    remedy="git commit -a or git stash there, then run again: finished stages are kept in the cache",
                ) from None
            if not tries_left:
                raise
            if not catch_up(workspace):
                time.sleep(0.5)  # nobody was faster: the checkout's index may be locked by a command of the user's


def catch_up(workspace: Workspace) -> bool:
    """Bring what landed meanwhile into the workspace, its own commits on top. Whether there was anything. Raises CommandError when both changed the same lines."""
    workspace.git("fetch", "--quiet", "origin", workspace.branch)
    if not workspace.git("rev-list", "--max-count=1", f"HEAD..origin/{workspace.branch}").strip():
        return False
    try:
        git(workspace.path, *_identity(workspace.root), "rebase", "--quiet", "--autostash", f"origin/{workspace.branch}")
    except CommandError as error:
        files = workspace.git("diff", "--name-only", "--diff-filter=U").split()
        with suppress(CommandError):
            workspace.git("rebase", "--abort")  # or a second try would commit the conflict's marks
        if not files:
            raise
        raise CommandError(f"another commit on {workspace.branch} changed {', '.join(files)} as well", remedy="run it again: finished stages are kept in the cache") from error
    return True


def _bring_data(workspace: Workspace, before: str) -> None:
    """The checkout's data to the new commit. Local changes are kept: without --force DVC refuses to overwrite them."""
    if any(name.endswith((".dvc", "dvc.lock")) for name in workspace.git("diff", "--name-only", before, "HEAD").splitlines()):
        command = [sys.executable, "-m", "dvc", "checkout", "--quiet", "--allow-missing"]
        subprocess.run(command, cwd=workspace.root, env=child_environment(), capture_output=True, check=False)


def _identity(root: Path) -> list[str]:
    """The user's own, also where only the checkout's configuration has it; a neutral one where git knows none (a CI runner, a container)."""
    known = {"user.name": "Ratchet", "user.email": "ratchet@localhost"}
    for key in known:
        with suppress(CommandError):
            known[key] = git(root, "config", key).strip() or known[key]
    return [part for key, value in known.items() for part in ("-c", f"{key}={value}")]


def who(root: Path) -> str:
    """Name of the person that git knows, for the ledger."""
    try:
        return git(root, "config", "user.name").strip()
    except CommandError:
        return os.environ.get("USER", "unknown")


@contextmanager
def locked(root: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that died. Raises CheckoutError when it is taken and `wait` is False."""
    path = root / ".ratchet" / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise CheckoutError(f"another `{name}` runs in {root}", remedy="wait for it; `ratchet status` shows it") from None
        yield


def git(folder: Path, *arguments: str) -> str:
    return _run(["git", *arguments], folder)


def dvc(folder: Path, *arguments: str) -> str:
    return _run([sys.executable, "-m", "dvc", *arguments], folder)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        words = " ".join(command[-len(command) + (2 if command[0] != "git" else 0) :])
        raise CommandError(f"{words[:200]} failed in {folder}: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout


# Threads that wait for long take the cores from each other: on a busy machine a training step took 1.1 s, and 0.25 s when they sleep.
# Threads that never wait lose a third on a quiet one. Memory is kept and not given back between two steps: a tenth of a step.
STAGE_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(64 * 2**20)}


def child_environment() -> dict[str, str]:
    """Ours, with this interpreter's folder first in PATH: stages say `python`. A surrounding git hook's variables stay out."""
    kept = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "PYTHONPATH")}
    return {
        **STAGE_ENVIRONMENT,
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONUNBUFFERED": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }


def _share_cache(root: Path, path: Path) -> None:
    """What `dvc cache dir --local` and `dvc config --local` would write, without their second of start-up."""
    config, committed = _dvc_config(root, "config.local"), _dvc_config(root, "config")
    for section in ("core", "cache"):
        if not config.has_section(section):
            config.add_section(section)
    known = config.get("cache", "dir", fallback=committed.get("cache", "dir", fallback="cache")).strip("\"'")
    # Quoted: DVC reads an unquoted comma as the end of a list's item.
    config.set("cache", "dir", f'"{(root / ".dvc" / known).resolve()}"')
    config.set("cache", "type", f'"{CACHE_TYPES}"')
    # DVC's own notes about a clone would otherwise outlive it under /var/tmp.
    config.set("core", "site_cache_dir", f'"{path / ".dvc" / "tmp" / "site"}"')
    _keep_remotes(root, config, committed)
    local = path / ".dvc" / "config.local"
    local.touch(mode=0o600)  # it may hold a remote's password
    with local.open("w", encoding="utf-8") as out:
        config.write(out)


def _keep_remotes(root: Path, config: configparser.ConfigParser, committed: configparser.ConfigParser) -> None:
    """DVC reads a remote's relative path from the folder of the configuration, which is another one in the clone."""
    for section in {*config.sections(), *committed.sections()}:
        url = config.get(section, "url", fallback=committed.get(section, "url", fallback="")).strip("\"'")
        if section.startswith("'remote ") and url and "://" not in url and not url.startswith(("/", "~")):
            if not config.has_section(section):
                config.add_section(section)
            config.set(section, "url", f'"{(root / ".dvc" / url).resolve()}"')


def _dvc_config(root: Path, name: str) -> configparser.ConfigParser:
    config = configparser.ConfigParser(interpolation=None)
    config.read(root / ".dvc" / name, encoding="utf-8")
    return config


def _is_alive(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()
