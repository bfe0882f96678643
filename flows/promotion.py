"""Carry out a person's decision to promote a version or to roll back.

This needs no Prefect run, because a rollback must not depend on a server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.pipeline.checkout import locked, who
from ratchet.pipeline.workspace import open_workspace
from ratchet.promotion.champion import Champion
from ratchet.promotion.rollout import finish, read_rollout
from ratchet.tracking.registry import get_version, list_versions
from tasks import promote as tasks

Say = Callable[[str], None]


def promote_version(
    root: Path, config: Config, number: int, *, reason: str, force: bool, say: Say
) -> Champion:
    """Promote a version.

    Raises UserError when there is no such version or the gate did not pass it, ServiceError when MLflow does
    not answer.
    """
    version = get_version(config.project.name, number)
    if version is None:
        known = ", ".join(f"v{entry.number}" for entry in list_versions(config.project.name)) or "none"
        raise UserError(
            f"{config.project.name} has no version {number}; registered: {known}",
            remedy="ratchet retrain registers candidates",
        )
    with locked(root, "promote"), open_workspace(root, "promote", say, keep_failed=0) as workspace:
        chosen = tasks.promote(workspace, version, by=who(root), why=reason, force=force, say=say)
    _end_rollout(root, chosen, reason, say)
    return chosen


def roll_back(root: Path, config: Config, *, reason: str, say: Say) -> Champion:
    """Put the previous version in charge. Raises UserError when there is none."""
    with locked(root, "promote"), open_workspace(root, "rollback", say, keep_failed=0) as workspace:
        chosen = tasks.rollback(workspace, by=who(root), why=reason, say=say)
    _end_rollout(root, chosen, reason, say)
    return chosen


def _end_rollout(root: Path, champion: Champion, reason: str, say: Say) -> None:
    """End the open rollout after a person moved the champion.

    It was against another champion, or its version has been promoted. MLflow is told at the next look.
    """
    if (current := read_rollout(root)) is None:
        return
    ended = finish(
        root,
        current,
        "promoted" if current.version == champion.version else "aborted",
        why=f"v{champion.version} is in charge: {reason}",
        by=who(root),
    )
    say(f"the rollout of v{ended.version} ended {ended.state}")
