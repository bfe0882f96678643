"""Carry one stage to another machine and back: code and dvc.lock by a git branch, data by DVC's remote.

The branch is named by its tree, so a run that starts again finds what an earlier one asked for. Its commits
are a chain: an attempt that the asking machine begins, checkpoints and at last the result from the working
machine. Each is pushed only on top of the commit that its sender has seen. When another attempt begins, a
machine that was thought lost has no commit any more on which a push would be taken.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import psutil

from ratchet.errors import CheckoutError, CommandError, RatchetError, StageError, SupersededError
from ratchet.pipeline.checkout import Say, commit_settings, git
from ratchet.pipeline.checkpoint_files import FOLDER, link, list_whole, restore
from ratchet.pipeline.dag import KEYS
from ratchet.pipeline.dvc import MISSING, Workspace, configured_remote, read_stages, run_stage, stale_stages
from ratchet.pipeline.upstream import delete_branch, fetch_branch, push_branch
from ratchet.pipeline.workspace import clone

T = TypeVar("T")
OUTPUTS = ("data", "models", "reports")  # folders of what stages read and write
# What a stage may change. Git tracks only parts of these: locks, .gitignore files, the verdict.
TRAVELS = ("dvc.lock", *OUTPUTS)
CHECKPOINT = Path("checkpoint")  # in the branch as checkpoint.dvc
DONE, BEGUN, SAVED = "done", "begun", "checkpoint"
ATTEMPT = re.compile(r"^Attempt: (\d+)$", re.MULTILINE)
STATE = re.compile(r"^State: (\w+)$", re.MULTILINE)
CHECK_SECONDS = 2.0  # between two looks for a new checkpoint
OUTAGE_SECONDS = 300.0  # for which git's and DVC's remotes may be away


class Attempt(NamedTuple):
    """The newest commit of a stage's branch."""

    branch: str
    commit: str
    number: int
    state: str


def begin(workspace: Workspace, stage: str, say: Say) -> Attempt:
    """Push the stage's inputs, and its branch with another attempt; return that, or the result that is there.

    Raises CheckoutError without a git or DVC remote, and CommandError.
    """
    if configured_remote(workspace.root) is None:
        raise CheckoutError(
            f"{stage} is to run on another machine, and no DVC remote brings its inputs there",
            remedy="dvc remote add --default NAME URL, with a URL that both machines reach; then commit",
        )
    if inputs := _inputs(workspace, stage):
        outlast(lambda: workspace.dvc("push", *inputs), say)
    tree = _write_tree(workspace)
    branch = f"ratchet/{stage}/{tree[:16]}"
    for _ in range(5):
        tip = outlast(lambda: read(workspace, branch), say)
        if tip and tip.state == DONE:
            return tip
        number = tip.number + 1 if tip else 1
        parent = tip.commit if tip else workspace.git("rev-parse", "HEAD").strip()
        of = workspace.git("rev-parse", f"{parent}^{{tree}}").strip() if tip else tree
        commit = _commit_tree(workspace, of, parent, stage, number, BEGUN)
        if push_branch(workspace, commit, branch, tip.commit if tip else None):
            return Attempt(branch, commit, number, BEGUN)
    raise CommandError(f"{branch} moved at each of five tries to begin an attempt", remedy="run it again")


def read(workspace: Workspace, branch: str) -> Attempt | None:
    """Return the newest commit of the branch, or None if there is no such branch. Raises CommandError."""
    commit = fetch_branch(workspace, branch)
    if commit is None:
        return None
    message = workspace.git("show", "--no-patch", "--format=%B", commit)
    number, state = ATTEMPT.search(message), STATE.search(message)
    if not number or not state:
        raise CheckoutError(
            f"{branch} ends in {commit[:8]}, which no attempt at a stage has made", remedy="delete the branch"
        )
    return Attempt(branch, commit, int(number[1]), state[1])


def take(workspace: Workspace, stage: str, done: Attempt, say: Say) -> None:
    """Bring a stage's result into the workspace, where DVC then finds the stage unchanged.

    Raises CommandError if the data do not match their hashes; CheckoutError if the branch changed other
    files, or the result is of other inputs.
    """
    outlast(lambda: fetch_branch(workspace, done.branch), say)
    tree = done.branch.rpartition("/")[2]
    begun = next(
        commit
        for commit in workspace.git("rev-list", done.commit).split()
        if workspace.git("rev-parse", f"{commit}^{{tree}}").startswith(tree)
    )
    changed = workspace.git("diff", "--name-only", begun, done.commit).splitlines()
    changed = [name for name in changed if name != f"{CHECKPOINT}.dvc"]
    if odd := [name for name in changed if not name.startswith(TRAVELS)]:
        raise CheckoutError(
            f"{done.branch} changes {', '.join(odd[:5])}, which no stage writes",
            remedy="nothing of it was taken: see who pushed it, and delete the branch",
        )
    for name in changed:
        workspace.git("checkout", "--quiet", done.commit, "--", name)
    workspace.git("reset", "--quiet")
    _pull(workspace, [stage], f"delete the branch {done.branch} there, then run again", say)
    if stage in stale_stages(workspace):
        raise CheckoutError(
            f"what {done.branch} brought is no result of these inputs and this code",
            remedy="delete the branch",
        )


@contextmanager
def open_attempt(root: Path, attempt: Attempt, say: Say) -> Iterator[Workspace]:
    """Open a clone at the attempt's commit, on the machine that works on it.

    Raises CheckoutError if the checkout's remote has no such branch; SupersededError after a newer attempt.
    """
    with clone(root, "stage", say, "--no-checkout", keep_failed=0) as path:
        workspace = Workspace(root, path, "")
        found = outlast(lambda: read(workspace, attempt.branch), say)
        if found is None:
            raise CheckoutError(
                f"the git remote of {root} has no branch {attempt.branch}",
                remedy="start the worker in a checkout of the same repository, one pool for each project",
            )
        if found.number != attempt.number or found.state == DONE:
            raise SupersededError(
                f"attempt {attempt.number} is over: {attempt.branch} is at attempt {found.number}, "
                f"{found.state}"
            )
        workspace.git("checkout", "--quiet", "--detach", found.commit)
        yield workspace


def compute(workspace: Workspace, stage: str, attempt: Attempt, say: Say) -> Attempt:
    """Pull the inputs, run the stage, push its outputs, and then the commit that names them.

    Raises StageError, CommandError, SupersededError.
    """
    if inputs := _inputs(workspace, stage):
        _pull(workspace, inputs, "dvc push on the machine that retrains", say)
    say(f"{stage}: attempt {attempt.number}; pulled {', '.join(inputs) or 'nothing'}")
    _take_checkpoint(workspace, say)
    with sending_checkpoints(workspace, stage, attempt, say):
        run_stage(workspace, stage, say)
    outlast(lambda: workspace.dvc("push", stage), say)
    return advance(workspace, stage, attempt, DONE, say)


def _pull(workspace: Workspace, names: list[str], remedy: str, say: Say) -> None:
    """Pull and verify data. Raises CommandError if they are not there, or are damaged."""
    damaged = CommandError(
        f"the DVC remote lacks data of {', '.join(names)}, or they are not what their hashes say: "
        "nothing of them was taken",
        remedy=remedy,
    )
    try:
        outlast(lambda: workspace.dvc("pull", *names), say)
    except CommandError as error:
        if MISSING not in str(error):
            raise
        raise damaged from None
    # DVC drops a damaged object from its cache, yet may have made the link to it by then and report no error.
    if broken := _broken_links(workspace.path):
        for path in broken:
            path.unlink()
        raise damaged


def _broken_links(home: Path) -> list[Path]:
    files = (path for name in OUTPUTS for path in (home / name).rglob("*"))
    return [path for path in files if path.is_symlink() and not path.exists()]


def _take_checkpoint(workspace: Workspace, say: Say) -> None:
    """Bring the checkpoint of an earlier attempt to where the training looks for it.

    One that cannot be had is only reported: the training then goes on from an older one, or begins anew.
    """
    pointer = f"{CHECKPOINT}.dvc"
    if not (workspace.path / pointer).exists():
        return
    try:
        workspace.dvc("pull", pointer)
    except CommandError as error:
        say(f"the checkpoint of an earlier attempt cannot be had: {' '.join(str(error).split())[-300:]}")
        return
    for path in restore(workspace.path / CHECKPOINT, workspace.root):
        say(f"took {path.name} of an earlier attempt")


@contextmanager
def sending_checkpoints(workspace: Workspace, stage: str, attempt: Attempt, say: Say) -> Iterator[None]:
    """Push each new checkpoint while the block runs. Raises SupersededError after ending the stage."""
    home = workspace.root / FOLDER
    known, stop = set(list_whole(home)), threading.Event()
    fault: list[SupersededError] = []

    def send_all() -> None:
        sent = None
        while not stop.wait(CHECK_SECONDS):
            new = [path for path in list_whole(home) if path not in known]
            if new and new[-1] != sent:
                try:
                    _send(workspace, stage, attempt, new[-1], say)
                    sent = new[-1]
                except SupersededError as error:
                    fault.append(error)
                    _end_children(workspace.path)
                    return
                except (RatchetError, OSError) as error:
                    say(f"{new[-1].name} was not pushed: {' '.join(str(error).split())[-200:]}")

    thread = threading.Thread(target=send_all, name="checkpoints", daemon=True)
    thread.start()
    try:
        yield
    except StageError:
        if fault:
            raise fault[0] from None
        raise
    finally:
        stop.set()
        thread.join()
    if fault:
        raise fault[0]


def _send(workspace: Workspace, stage: str, attempt: Attempt, checkpoint: Path, say: Say) -> None:
    """Push one checkpoint, from a clone of its own, because DVC holds the stage's while the stage runs."""
    with clone(workspace.root, "checkpoint", say, "--no-checkout", keep_failed=0) as path:
        carrier = workspace._replace(path=path)
        tip = read(carrier, attempt.branch)
        if tip is None or tip.number != attempt.number:
            raise SupersededError(_told(attempt, tip))
        carrier.git("checkout", "--quiet", "--detach", tip.commit)
        link(checkpoint, path / CHECKPOINT / checkpoint.parent.name / checkpoint.name)
        carrier.dvc("add", "--quiet", str(CHECKPOINT))
        carrier.dvc("push", f"{CHECKPOINT}.dvc")
        advance(carrier, stage, attempt, SAVED, say)
    say(f"{checkpoint.name} is pushed: another machine could go on from it")


def _end_children(folder: Path) -> None:
    """Kill the processes that this one has started in `folder`: their work counts for nothing."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):
            if Path(process.cwd()) == folder:
                process.kill()


def advance(workspace: Workspace, stage: str, attempt: Attempt, state: str, say: Say) -> Attempt:
    """Commit what travels, and push it on top of the attempt's newest commit. Raises SupersededError."""
    known = outlast(lambda: read(workspace, attempt.branch), say)
    if known is None or known.number != attempt.number:
        raise SupersededError(_told(attempt, known))
    commit = _commit_tree(workspace, _write_tree(workspace), known.commit, stage, attempt.number, state)
    if not outlast(lambda: push_branch(workspace, commit, attempt.branch, known.commit), say):
        raise SupersededError(_told(attempt, read(workspace, attempt.branch)))
    return Attempt(attempt.branch, commit, attempt.number, state)


def forget(workspace: Workspace, branches: list[str]) -> None:
    """Delete branches whose results have landed."""
    for branch in branches:
        delete_branch(workspace, branch)


def outlast(work: Callable[[], T], say: Say) -> T:
    """Run `work`, again and again for five minutes while it raises CommandError, and return its result.

    Raises the last CommandError.
    """
    until, pause = time.monotonic() + OUTAGE_SECONDS, 1.0
    while True:
        try:
            return work()
        except CommandError as error:
            if time.monotonic() + pause > until or MISSING in str(error):
                raise
            say(f"tried again in {pause:.0f} s: {' '.join(str(error).split())[-200:]}")
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def _told(attempt: Attempt, known: Attempt | None) -> str:
    now = f"is at attempt {known.number}" if known else "is gone"
    return f"attempt {attempt.number} is over, nothing of it is pushed: {attempt.branch} {now}"


def _inputs(workspace: Workspace, stage: str) -> list[str]:
    """List the stage's inputs whose data are in DVC: outputs of other stages, and those with a .dvc file."""
    stages = read_stages(workspace.path)
    made = {
        out if isinstance(out, str) else next(iter(out))
        for name, other in stages.items()
        if name != KEYS.name
        for out in other.get("outs", [])
    }
    return [
        dep
        for dep in stages[stage].get("deps", [])
        if dep in made or (workspace.path / f"{dep}.dvc").exists()
    ]


def _write_tree(workspace: Workspace) -> str:
    """Write what travels into git, and return the tree's id; index and branch stay as they are."""
    present = [path for path in (*TRAVELS, f"{CHECKPOINT}.dvc") if (workspace.path / path).exists()]
    workspace.git("add", "--", *present)
    tree = workspace.git("write-tree").strip()
    workspace.git("reset", "--quiet")
    return tree


def _commit_tree(workspace: Workspace, tree: str, parent: str, stage: str, number: int, state: str) -> str:
    message = f"Run {stage} on another machine: {state}\n\nAttempt: {number}\nState: {state}"
    commit = ("commit-tree", tree, "-p", parent, "-m", message)  # never signed: it is gone after the run
    return git(workspace.path, *commit_settings(workspace.root), *commit).strip()
