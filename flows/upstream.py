"""Exchange commits with the checkout's git remote, for runs that a workflow elsewhere asks for.

A merge and no rebase: the ledger and the registry name the commits of this checkout by their ids.
"""

from __future__ import annotations

from pathlib import Path

from ratchet.errors import CheckoutError, CommandError
from ratchet.pipeline.checkout import Say, check_checkout, commit_settings, git, locked
from ratchet.pipeline.workspace import bringing_data

REMOTE, TRIES = "origin", 3


def take_in(root: Path, say: Say) -> None:
    """Merge the remote's commits on this branch into the checkout.

    Raises CheckoutError: uncommitted changes, no remote, or both sides changed the same lines.
    """
    branch = check_checkout(root)
    if REMOTE not in git(root, "remote").split():
        raise CheckoutError(
            f"{root} has no git remote {REMOTE!r} to take commits from",
            remedy=f"git remote add {REMOTE} URL, with credentials that may push",
        )
    with locked(root, "land"):
        before = git(root, "rev-parse", "HEAD").strip()
        with bringing_data(root):
            _merge(root, branch)
        if git(root, "rev-parse", "HEAD").strip() == before:
            say(f"{REMOTE}/{branch} has no new commit")
            return
        say(f"took in the commits of {REMOTE}/{branch}")


def give_back(root: Path, say: Say) -> None:
    """Push the branch and the versions' tags; if others pushed meanwhile, merge and push again.

    Raises CheckoutError, CommandError.
    """
    branch = git(root, "symbolic-ref", "--short", "HEAD").strip()
    refs = (f"HEAD:refs/heads/{branch}", "refs/tags/model/*:refs/tags/model/*")
    for left in reversed(range(TRIES)):
        try:
            git(root, "push", "--quiet", "--atomic", REMOTE, *refs)
        except CommandError:
            if not left:
                raise
            with locked(root, "land"):
                _merge(root, branch)
        else:
            say(f"pushed to {REMOTE}/{branch}")
            return


def _merge(root: Path, branch: str) -> None:
    git(root, "fetch", "--quiet", REMOTE, branch)
    try:
        git(root, *commit_settings(root), "merge", "--quiet", "--no-edit", "FETCH_HEAD")
    except CommandError as error:
        files = ", ".join(git(root, "diff", "--name-only", "--diff-filter=U").split())
        if not files:
            raise
        git(root, "merge", "--abort")
        raise CheckoutError(
            f"this checkout and {REMOTE}/{branch} both changed {files}",
            remedy="git pull there and settle it by hand, then run again",
        ) from error
