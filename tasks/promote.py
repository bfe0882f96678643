"""Move the champion by promotion or rollback: a commit to champion.json decides, MLflow's alias follows.

This is a task of a flow, not a stage. Callers hold the lock `promote`. Promoting the champion again changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ratchet.errors import CheckoutError, CommandError, RatchetError, ServiceError, UserError
from ratchet.files import write_bytes, write_text
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.dvc import Workspace
from ratchet.pipeline.workspace import land
from ratchet.promotion.champion import (
    FILE,
    PENDING,
    Champion,
    alias_is_pending,
    last_entry,
    publish_champion,
    read_champion,
    write_champion,
)
from ratchet.promotion.gate_tags import check_gate, named, read_tags
from ratchet.tracking.mlflow import KEY_TAG
from ratchet.tracking.registry import (
    CHALLENGER,
    CHAMPION,
    Version,
    drop_alias,
    get_alias,
    get_version,
    set_alias,
)

Say = Callable[[str], None]


def promote(workspace: Workspace, version: Version, *, by: str, why: str, force: bool, say: Say) -> Champion:
    """Put `version` in charge.

    Raises UserError when the gate did not pass it, or compared it with another champion than today's, unless
    `force`.
    """
    current = read_champion(workspace.path)
    if current:
        check_registry(current)
    if current and current.version == version.number:
        say(f"v{version.number} is in charge already")
        follow_alias(workspace.root, current, say)
        return current
    tags = read_tags(version)
    check_known(workspace, version)
    if not force:
        check_gate(version, current)
    chosen = Champion(
        name=version.name,
        version=version.number,
        previous=current.version if current else None,
        commit=version.tags["git_commit"],
        run_key=version.tags[KEY_TAG],
        run_id=version.run_id,
        adapter_sha256=version.tags["adapter_sha256"],
        batches=tags.batches,
        data=tags.data,
        gate=tags.gate,
        at=_now(),
        by=by,
        why=why,
        move="promote",
        replaced=current.version if current else None,
    )
    return _put_in_charge(workspace, chosen, say)


def check_known(workspace: Workspace, version: Version) -> None:
    """Check that the version's commit is in this checkout.

    Raises CheckoutError when another checkout of the team made the version and its commit is not here yet:
    the version could not be served here.
    """
    commit = version.tags["git_commit"]
    try:
        workspace.git("cat-file", "-e", f"{commit}^{{commit}}")
    except CommandError:
        raise CheckoutError(
            f"v{version.number} was made by commit {commit[:8]}, which is not in this repository",
            remedy="push it where it was made and git pull here; only then is it promoted",
        ) from None


def rollback(workspace: Workspace, *, by: str, why: str, say: Say) -> Champion:
    """Return to the champion before this one. Only the ledger is needed, so this works with MLflow down.

    Raises UserError when there is no champion before.
    """
    current = read_champion(workspace.path)
    if current is None:
        raise UserError(
            "there is no champion to roll back from", remedy="ratchet retrain makes the first one"
        )
    if current.previous is None:
        raise UserError(
            f"v{current.version} took over from no version: there is nothing to return to",
            remedy="ratchet history shows the ledger; `ratchet promote VERSION` puts any version in charge",
        )
    earlier = last_entry(workspace.path, current.previous)
    if earlier is None:
        raise UserError(
            f"the ledger has no entry of v{current.previous}",
            remedy="the repository's history is cut off; fetch it whole (git fetch --unshallow)",
        )
    chosen = msgspec.structs.replace(
        earlier, at=_now(), by=by, why=why, move="rollback", replaced=current.version
    )
    return _put_in_charge(workspace, chosen, say)


def reconcile(root: Path, say: Say) -> None:
    """Point MLflow's alias at the champion, where a killed promotion or rollback has not told it.

    It does nothing while the champion is being moved, and leaves the note while MLflow does not answer.
    """
    if not alias_is_pending(root):
        return
    with suppress(CheckoutError), locked(root, "promote", wait=False):
        champion = read_champion(root)
        if champion and alias_is_pending(root) and follow_alias(root, champion, say):
            say(f"MLflow's alias follows {FILE}: v{champion.version} is in charge")


def follow_alias(root: Path, champion: Champion, say: Say) -> bool:
    """Set MLflow's aliases to what champion.json says, and return whether that worked.

    The file PENDING makes a later run try again when MLflow does not answer or this process is killed.
    """
    pending = root / PENDING
    write_text(pending, f"v{champion.version}\n")
    try:
        if get_alias(champion.name, CHAMPION) != champion.version:
            set_alias(champion.name, CHAMPION, champion.version)
        if get_alias(champion.name, CHALLENGER) == champion.version:
            drop_alias(champion.name, CHALLENGER)
        pending.unlink(missing_ok=True)
        return True
    except ServiceError as error:
        say(f"the alias in MLflow follows later: {error}")
        return False


def check_registry(champion: Champion) -> None:
    """Check that the registry knows the champion. Raises UserError.

    The registry numbers the versions, so a registry that does not know the champion would give its number to
    another model.
    """
    known = get_version(champion.name, champion.version)
    if known is None or known.tags.get(KEY_TAG) != champion.run_key:
        raise UserError(
            f"{FILE} says v{champion.version} of {champion.name} is in charge; the registry "
            f"{'does not know it' if known is None else 'has another model under that number'}",
            remedy="MLFLOW_TRACKING_URI names another registry than the one of the ledger: set it to that "
            "one, or bring its database back",
        )


def _put_in_charge(workspace: Workspace, chosen: Champion, say: Say) -> Champion:
    before = workspace.git("rev-parse", "HEAD").strip()
    write_champion(workspace.path, chosen)
    verb = "Promote" if chosen.move == "promote" else "Roll back to"
    # A tag stays where the version first took charge; its later returns are in the ledger.
    tag = f"model/{chosen.name}/v{chosen.version}"
    is_tagged = bool(workspace.git("tag", "--list", tag).strip())
    pending = workspace.root / PENDING
    noted = pending.read_bytes() if pending.exists() else None
    write_text(pending, f"v{chosen.version}\n")  # before it lands: a kill right after that must not hide it
    try:
        land(
            workspace,
            f"{verb} {chosen.name} v{chosen.version}\n\nBy {chosen.by}: {chosen.why}",
            [FILE],
            tag=None if is_tagged else tag,
        )
    except RatchetError:
        pending.unlink() if noted is None else write_bytes(pending, [noted])
        workspace.git(
            "reset", "--quiet", "--hard", before
        )  # otherwise a second try would take this clone's entry for the champion
        raise
    say(f"{FILE}: v{chosen.version} is in charge (before: {named(chosen.replaced)})")
    try:
        publish_champion(workspace.root, chosen)
    except ServiceError as error:
        say(f"gateways with the shared storage follow later: {error}")
    follow_alias(workspace.root, chosen, say)
    return chosen


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
