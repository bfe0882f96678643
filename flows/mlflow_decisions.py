"""Carry out what people decide in MLflow's UI: by the tag `decision` on a version, or by moving the alias
`champion`.

Each decision is carried out once. MLflow without accounts does not know who decided; the tag `decision_by`
may name the person. The result is written to the tag `decision_outcome`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ratchet.config.params import Config
from ratchet.errors import CheckoutError, RatchetError, ServiceError, UserError
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.workspace import open_workspace
from ratchet.promotion.champion import Champion, alias_is_pending, last_entry, read_champion
from ratchet.promotion.gate_tags import check_gate, read_tags
from ratchet.promotion.rollout import Rollout, finish, open_rollout, read_rollout, resume
from ratchet.tracking.registry import CHALLENGER, CHAMPION, Version, drop_alias, get_alias, set_alias, set_tag
from tasks.promote import follow_alias, promote
from tasks.rollout import MAX_TAG, Registry

Say = Callable[[str], None]
DECISION, BY, REASON, OUTCOME = "decision", "decision_by", "reason", "decision_outcome"
ALIAS_OUTCOME = "alias_outcome"
ALIAS = "alias"  # the decision that a person made by moving the alias `champion`
NOBODY = "MLflow UI"
NEEDS_REASON = "force needs a tag `reason`: the ledger keeps why the gate was overruled"


def apply_decisions(root: Path, config: Config, registry: Registry, say: Say) -> bool:
    """Carry out the waiting decisions, the oldest version first, and return whether anything was done."""
    done = False
    for _, version in sorted(registry.versions.items()):
        if is_waiting(version):
            done |= _conclude(root, config, registry, version, version.tags[DECISION].strip().lower(), say)
    return _apply_alias(root, config, registry, say) or done


def is_waiting(version: Version) -> bool:
    """Return whether the version's tags hold a decision that was not carried out yet.

    It waits if the last outcome is of another decision, or if the missing reason has been added since.
    """
    decision, outcome = version.tags.get(DECISION, "").strip().lower(), version.tags.get(OUTCOME, "")
    if not decision:
        return False
    return not outcome.startswith(f"{decision}: ") or (
        NEEDS_REASON in outcome and bool(version.tags.get(REASON))
    )


def take_charge(
    root: Path,
    version: Version,
    *,
    by: str,
    why: str,
    force: bool,
    say: Say,
    only_while: Rollout | None = None,
) -> Champion | None:
    """Promote the version and return the new champion; None when the rollout `only_while` is no longer open.

    Raises the errors of the gate, the checkout and MLflow.
    """
    read_tags(version)
    with locked(root, "promote"):
        current = read_rollout(root)
        if only_while and (current is None or (current.id, current.state) != (only_while.id, "open")):
            return None
        with open_workspace(root, "promote", say, keep_failed=0) as workspace:
            return promote(workspace, version, by=by, why=why, force=force, say=say)


def _conclude(
    root: Path, config: Config, registry: Registry, version: Version, decision: str, say: Say
) -> bool:
    """Carry out a decision, write its outcome to MLflow, and return whether it is finished.

    If it was the person's mistake, the refusal is the outcome. A temporary fault of the checkout or of a
    service gives no outcome, and the decision is tried again at the next look.
    """
    try:
        outcome = f"done: {_decide(root, config, registry, version, decision, say)}"
    except RatchetError as error:
        if not isinstance(error, UserError) or isinstance(
            error, CheckoutError
        ):  # BusyError, of another open rollout, is no UserError: it waits too
            say(f"v{version.number}, {decision} in MLflow, waits: {error}")
            return False
        outcome = f"refused: {error}"
    say(f"v{version.number}, {decision} in MLflow: {outcome}")
    try:
        set_tag(
            version.name,
            version.number,
            ALIAS_OUTCOME if decision == ALIAS else OUTCOME,
            f"{decision}: {outcome}"[:MAX_TAG],
        )
    except ServiceError as error:
        say(f"MLflow hears of it later: {error}")
    return True


def _decide(root: Path, config: Config, registry: Registry, version: Version, decision: str, say: Say) -> str:
    """Carry out the decision and return its outcome. Raises UserError when it is refused."""
    by, reason = version.tags.get(BY) or NOBODY, version.tags.get(REASON, "")
    champion = read_champion(root)
    in_charge = champion is not None and champion.version == version.number
    if decision == "reject":
        return _reject(root, registry, version, in_charge, by, reason or "rejected in MLflow")
    if decision == "force":
        if not reason:
            raise UserError(NEEDS_REASON)
        return _promote(root, version, by, f"forced: {reason}", say, force=True)
    if decision not in ("approve", ALIAS):
        raise UserError(f"{decision[:40]!r} is no decision", remedy="approve, reject or force")
    if in_charge:
        return "it is in charge"
    check_gate(version, champion)
    if decision == "approve" and config.promotion == "rollout" and champion and config.rollout.steps[0] < 1:
        return _roll_out(root, config, version, champion, by)
    return _promote(root, version, by, reason or f"{decision} in MLflow", say, force=False)


def _roll_out(root: Path, config: Config, version: Version, champion: Champion, by: str) -> str:
    """Open or resume the rollout because a person requested it; then its users decide."""
    opened = open_rollout(root, config, version, champion, by=by, again=True)
    if opened.state == "paused":
        resume(root, by)
        return "its rollout goes on"
    set_alias(version.name, CHALLENGER, version.number)
    return "its rollout is open"


def _promote(root: Path, version: Version, by: str, why: str, say: Say, *, force: bool) -> str:
    take_charge(root, version, by=by, why=why, force=force, say=say)
    return "it is in charge" + (", against the gate" if force else "")


def _reject(root: Path, registry: Registry, version: Version, in_charge: bool, by: str, why: str) -> str:
    if in_charge:
        raise UserError(
            f"v{version.number} is in charge", remedy="ratchet rollback returns to the version before"
        )
    current = read_rollout(root)
    if current and current.version == version.number:
        finish(root, current, "aborted", why=why, by=by)
    if registry.challenger == version.number:
        drop_alias(version.name, CHALLENGER)
    return "its rollout ended" if current and current.version == version.number else "it is no challenger"


def _apply_alias(root: Path, config: Config, registry: Registry, say: Say) -> bool:
    """Handle an alias that names another version than champion.json.

    A person has put that version in charge, unless MLflow has not been told of our champion yet.
    """
    champion, number = read_champion(root), registry.champion
    if number == (champion.version if champion else None):
        return _set_back(root, registry, say) if alias_is_pending(root) else False
    if champion and (number is None or alias_is_pending(root)):
        return _set_back(root, registry, say)
    version = registry.versions.get(number) if number is not None else None
    if version is None:
        say(f"the alias `champion` names v{number}, which the registry does not have")
    elif last_entry(root, version.number):
        # This may also be an alias that has not followed a rollback yet, so the ledger decides.
        say(
            f"the alias `champion` names v{number}, which was in charge before: `ratchet rollback` or "
            f"`ratchet promote {number}` returns to it"
        )
    elif not _conclude(root, config, registry, version, ALIAS, say):
        return False  # leave the alias as it is, for the next look
    return _set_back(root, registry, say)


def _set_back(root: Path, registry: Registry, say: Say) -> bool:
    """Point the alias at the champion of champion.json, unless somebody has moved it again."""
    with locked(root, "promote"):
        champion = read_champion(root)
        try:
            if champion and get_alias(champion.name, CHAMPION) in (registry.champion, None):
                follow_alias(root, champion, say)
        except ServiceError as error:
            say(f"the alias in MLflow follows later: {error}")
    return True
