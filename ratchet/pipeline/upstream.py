"""Exchange commits with the git remote of a checkout, from a workspace.

They travel through the checkout, because its configuration knows the remote's address and credentials, which
a clone does not inherit. A push names the commit that the remote's branch must still have, so nothing that
others pushed is ever overwritten.
"""

from __future__ import annotations

import re
from contextlib import suppress

from ratchet.errors import CheckoutError, CommandError
from ratchet.pipeline.checkout import commit_settings, git
from ratchet.pipeline.dvc import Workspace

BETWEEN = "refs/ratchet"  # the checkout's refs for commits on their way
ABSENT = "couldn't find remote ref"
# Git's words when another push came first, also in the moment of this one.
MOVED = re.compile(
    r"stale info|fetch first|non-fast-forward|cannot lock ref|incorrect old value|failed to update"
)
# Words of servers whose rules forbid the push.
FORBIDDEN = re.compile(r"protected branch|hook declined|GH0\d\d|not allowed to push", re.IGNORECASE)
PUSH_TRIES = 5


def remote_of(workspace: Workspace) -> str:
    """Return the name of the checkout's git remote. Raises CheckoutError if there is none."""
    known = git(workspace.root, "remote").split()
    chosen = ""
    with suppress(CommandError):  # exit code 1: the branch follows none
        chosen = git(workspace.root, "config", f"branch.{workspace.branch}.remote").strip()
    if chosen not in known:
        chosen = "origin" if "origin" in known else next(iter(known), "")
    if not chosen:
        raise CheckoutError(
            f"{workspace.root} has no git remote, through which commits reach other machines",
            remedy=f"git remote add origin URL; git push --set-upstream origin {workspace.branch or 'main'}",
        )
    return chosen


def fetch_branch(workspace: Workspace, branch: str) -> str | None:
    """Fetch a branch of the remote into the workspace; return its commit, or None if there is no such branch.

    Raises CheckoutError, CommandError.
    """
    between = f"{BETWEEN}/from/{branch}"
    try:
        git(
            workspace.root,
            *("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", remote_of(workspace)),
            f"+refs/heads/{branch}:{between}",
        )
    except CommandError as error:
        if ABSENT in str(error):
            return None
        raise
    workspace.git("fetch", "--quiet", "--no-tags", "origin", f"+{between}:{between}")
    return workspace.git("rev-parse", between).strip()


def push_branch(
    workspace: Workspace, commit: str, branch: str, expected: str | None, *, tag: str | None = None
) -> bool:
    """Push a commit to a branch of the remote that still stands at `expected` (None: that is not there).

    Return False, with nothing changed, if it stands elsewhere. A tag is pushed with it or not at all. Raises
    CheckoutError for a push that the remote's rules forbid, and CommandError.
    """
    between = f"{BETWEEN}/to/{branch}"
    workspace.git("push", "--quiet", "--force", "origin", f"{commit}:{between}")
    refs = [f"{between}:refs/heads/{branch}", *([f"+{between}:refs/tags/{tag}"] if tag else [])]
    lease = f"--force-with-lease=refs/heads/{branch}:{expected or ''}"
    try:
        git(workspace.root, "push", "--quiet", "--atomic", lease, remote_of(workspace), *refs)
    except CommandError as error:
        if MOVED.search(str(error)):
            return False
        if FORBIDDEN.search(str(error)):
            raise CheckoutError(
                f"the remote refuses a push to {branch}: {' '.join(str(error).split())[-300:]}",
                remedy="`landing: pull_request` in params.yaml pushes to a branch of its own",
            ) from None
        raise
    return True


def delete_branch(workspace: Workspace, branch: str) -> None:
    """Delete a branch of the remote; one that is not there is no fault."""
    with suppress(CommandError):
        git(workspace.root, "push", "--quiet", remote_of(workspace), f":refs/heads/{branch}")


def follow(workspace: Workspace) -> str | None:
    """Put the workspace's commits on top of the remote's branch; return the branch's commit, if there is one.

    Raises CheckoutError if the checkout has commits that are not there while others are: these cannot be
    moved, because versions name them.
    """
    theirs = fetch_branch(workspace, workspace.branch)
    if theirs is None or not workspace.git("rev-list", "--max-count=1", f"HEAD..{theirs}").strip():
        return theirs
    if workspace.git("rev-list", "--max-count=1", f"{theirs}..origin/{workspace.branch}").strip():
        raise CheckoutError(
            f"{workspace.root} and {remote_of(workspace)}/{workspace.branch} both have commits that the "
            "other lacks",
            remedy=f"git pull --rebase {remote_of(workspace)} {workspace.branch} there, then run again: "
            "finished stages are kept in the cache",
        )
    put_on_top(workspace, theirs, f"{remote_of(workspace)}/{workspace.branch}")
    return theirs


def put_on_top(workspace: Workspace, onto: str, name: str) -> None:
    """Rebase the workspace's commits onto `onto`, which messages call `name`.

    Raises CommandError, with nothing changed, if both changed the same lines.
    """
    try:
        rebase = ("rebase", "--quiet", "--autostash", onto)
        git(workspace.path, *commit_settings(workspace.root), *rebase)
    except CommandError as error:
        files = workspace.git("diff", "--name-only", "--diff-filter=U").split()
        with suppress(CommandError):
            workspace.git("rebase", "--abort")  # otherwise a second try would commit the conflict markers
        if not files:
            raise
        raise CommandError(
            f"another commit on {name} changed {', '.join(files)} as well",
            remedy="run it again: finished stages are kept in the cache",
        ) from error


def publish(workspace: Workspace, tag: str | None) -> None:
    """Push HEAD to the remote's branch, on top of what others pushed. Raises CheckoutError, CommandError."""
    for _ in range(PUSH_TRIES):
        theirs = follow(workspace)
        if push_branch(workspace, "HEAD", workspace.branch, theirs, tag=tag):
            return
    raise CommandError(
        f"{remote_of(workspace)}/{workspace.branch} moved at each of {PUSH_TRIES} tries to push",
        remedy="run it again: finished stages are kept in the cache",
    )


def offer(workspace: Workspace) -> str:
    """Push what the remote's branch lacks to `ratchet/BRANCH`; return what a person does then, or "".

    Raises CheckoutError, CommandError.
    """
    remote, branch = remote_of(workspace), f"ratchet/{workspace.branch}"
    workspace.git("fetch", "--quiet", "origin", workspace.branch)
    newest = workspace.git("rev-parse", f"origin/{workspace.branch}").strip()
    theirs, offered = fetch_branch(workspace, workspace.branch), fetch_branch(workspace, branch)
    if newest == offered or (theirs and not workspace.git("rev-list", f"{theirs}..{newest}").strip()):
        return ""
    if not push_branch(workspace, newest, branch, offered):
        raise CommandError(f"{remote}/{branch} moved in the moment of the push", remedy="run it again")
    url = re.sub(r"//[^/@]*@", "//", git(workspace.root, "remote", "get-url", remote).strip())
    web = re.sub(r"^(?:ssh://)?(?:git@)?([\w.-]+)[:/]", r"https://\1/", url.removesuffix(".git"))
    page = f"{web}/compare/{workspace.branch}...{branch}" if "github.com" in url else url
    return (
        f"pushed to {branch}, for a pull request into {workspace.branch}: gh pr create --head {branch} "
        f"--base {workspace.branch} --fill, or {page}. Merge it without squashing: versions name its commits"
    )
