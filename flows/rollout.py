"""Take one look at the rollout: the flow `rollout`.

It handles people's decisions in MLflow first, then the waiting challenger, then the figures of live users.
Every step can be repeated. MLflow and the request log may be down: the document `.ratchet/rollout.json`
decides, and MLflow follows at the next look.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from prefect import flow

from flows.console import say
from flows.mlflow_decisions import apply_decisions, is_waiting, take_charge
from flows.outage import show_artifact
from ratchet.config.params import Config, load_config
from ratchet.errors import CheckoutError, RatchetError, ServiceError, UserError
from ratchet.monitoring.request_log import open_log
from ratchet.pipeline.checkout import who
from ratchet.pipeline.stage import project_root
from ratchet.promotion.champion import Champion, read_champion
from ratchet.promotion.rollout import (
    AGAIN,
    Rollout,
    RolloutState,
    advance,
    finish,
    note_look,
    open_rollout,
    pause,
    read_rollout,
    read_state,
    resume,
)
from ratchet.reporting.markdown import rollout_card
from ratchet.serving import bundle
from ratchet.storage.documents import remove_document, write_document
from ratchet.tracking.registry import CHALLENGER, drop_alias
from tasks.rollout import Look, Registry, follow, look, read_registry

Say = Callable[[str], None]
REFUSED_SECONDS = 150.0  # the gateway tries each minute, so it has failed three times by then
ENDS = {"roll_back": "rolled_back", "stop": "stopped", "no_evidence": "no_evidence"}


@flow(name="rollout", persist_result=False)
def rollout(root: str | None = None) -> Rollout | None:
    """Take one look, and publish an artifact if there was a rollout.

    Raises the errors of the checkout.
    """
    home = project_root(root)
    config = load_config(home / "params.yaml")
    seen = look_once(home, config, say)
    if seen:
        show_artifact(
            config, "rollout", rollout_card(seen), f"v{seen.version}: {seen.state.replace('_', ' ')}"
        )
    return seen


def look_once(root: Path, config: Config, say: Say) -> Rollout | None:
    """Return the rollout after this look; None when there was none.

    The files are read twice: before the decision, and after it was carried out, for MLflow and the caller.

    Raises CheckoutError for malformed files.
    """
    write_document(root, AGAIN, b"")
    registry = _ask_registry(config, say)
    if registry and apply_decisions(root, config, registry, say):
        registry = _ask_registry(config, say)
    seen = read_rollout(root)
    current = _settle(root, seen, say) if seen else None
    if seen is None and registry:
        current = seen = _open_challenger(root, config, registry, say)
    if current and current.state == "open":
        _act(root, config, current, registry, say)
    after = read_state(root)
    followed = registry is not None and _follow(after, config, registry, say)
    if registry and followed and not any(is_waiting(version) for version in registry.versions.values()):
        remove_document(root, AGAIN)
    return (after.find(seen) if seen else None) or after.current


def rollout_status(root: Path, config: Config) -> Rollout | None:
    """Return the open rollout, or the last one that ended, from the files alone."""
    state = read_state(root)
    return state.current or next(reversed(state.ended), None)


def pause_rollout(root: Path, config: Config, say: Say) -> Rollout:
    """Pause the rollout. Raises UserError when none is open."""
    return _done(root, config, pause(root, who(root)), say)


def resume_rollout(root: Path, config: Config, say: Say) -> Rollout:
    """Resume the rollout. Raises UserError when there is none."""
    return _done(root, config, resume(root, who(root)), say)


def abort_rollout(root: Path, config: Config, reason: str, say: Say) -> Rollout:
    """End the rollout and keep the champion. Raises UserError when none is open."""
    current = read_rollout(root)
    if current is None:
        raise UserError("no rollout is open", remedy="ratchet rollout status shows the last one")
    return _done(root, config, finish(root, current, "aborted", why=reason, by=who(root)), say)


def _done(root: Path, config: Config, changed: Rollout, say: Say) -> Rollout:
    say(f"v{changed.version}: {changed.state}; the gateway follows at once")
    after = read_state(root)
    if registry := _ask_registry(config, say):
        _follow(after, config, registry, say)
    return after.find(changed) or changed


def _ask_registry(config: Config, say: Say) -> Registry | None:
    try:
        return read_registry(config.project.name)
    except ServiceError as error:
        say(f"decisions wait, MLflow hears of it later: {error}")
        return None


class Ending(NamedTuple):
    state: str
    why: str
    by: str


def ending_of(current: Rollout, champion: Champion | None, refused: str | None) -> Ending | None:
    """Return how the rollout ends if it cannot continue, and None while it can.

    It cannot continue against another champion than the one it was started with, nor with a gateway that
    cannot load the challenger.
    """
    if champion and champion.version == current.version:
        # The look that promoted it was interrupted before it ended the rollout, or a person promoted it.
        return Ending("promoted", champion.why, champion.by)
    if champion is None or champion.version != current.champion:
        now = f"v{champion.version} now (by {champion.by}: {champion.why})" if champion else "nobody now"
        why = f"the champion is {now}, the rollout was against v{current.champion}"
        return Ending("aborted", why, "rollout")
    return Ending("stopped", f"the gateway cannot load it: {refused}", "gateway") if refused else None


def _settle(root: Path, current: Rollout, say: Say) -> Rollout | None:
    """End a rollout that cannot continue, and return None; otherwise return the rollout."""
    found = ending_of(current, read_champion(root), _refusal(root, current))
    if found is None:
        return current
    ended = finish(root, current, found.state, why=found.why, by=found.by)
    say(f"the rollout of v{ended.version} ended {ended.state.replace('_', ' ')}: {ended.why}")
    return None


def _refusal(root: Path, current: Rollout) -> str | None:
    """Return why a gateway cannot load the challenger, or None.

    The gateway must have refused it for REFUSED_SECONDS since the rollout was opened, because a temporary
    fault must not end a rollout.
    """
    name = f"v{current.version}"
    for state in bundle.read_states(root):
        since = state.refused_since.get(name, 0.0)
        if since >= current.opened and time.time() - since >= REFUSED_SECONDS:
            return state.refused.get(name)
    return None


def _open_challenger(root: Path, config: Config, registry: Registry, say: Say) -> Rollout | None:
    """Open a rollout of the version that the alias `challenger` names.

    A version that may not have one is refused with the reason, and loses the alias.
    """
    champion, number = read_champion(root), registry.challenger
    if config.promotion != "rollout" or number is None or champion is None or number == champion.version:
        return None
    version = registry.versions.get(number)
    if version is None:
        say(f"the alias `challenger` names v{number}, which the registry does not have")
        return None
    try:
        opened = open_rollout(root, config, version, champion, by=f"gate ({who(root)})")
        say(f"v{number} gets {opened.share:.0%} of the users")
        return opened
    except UserError as error:
        say(f"v{number} is no challenger any more: {error}")
        _drop_challenger(config, say)
        return None


def _drop_challenger(config: Config, say: Say) -> None:
    try:
        drop_alias(config.project.name, CHALLENGER)
    except ServiceError as error:
        say(f"MLflow hears of it later: {error}")


def _act(root: Path, config: Config, current: Rollout, registry: Registry | None, say: Say) -> None:
    """Look at the rollout's figures and carry out what they require."""
    try:
        seen = _look(root, config, current)
    except ServiceError as error:
        say(f"no look this time: {error}")
        return
    share = f"{current.share:.0%} of the users"
    say(f"v{current.version} at {share}: {seen.action.replace('_', ' ')}: {seen.reason}")
    if seen.action == "promote":
        _promote(root, current, seen, registry, say)
    elif seen.action in ENDS:
        finish(root, current, ENDS[seen.action], why=seen.reason, by="rollout", figures=seen.figures)
    else:
        change = advance if seen.action == "advance" else note_look
        change(root, current, seen.reason, seen.figures)


def _look(root: Path, config: Config, current: Rollout) -> Look:
    log = open_log(root, config)
    try:
        return look(log.rollout_units(current.id), current, config.rollout, time.time())
    finally:
        log.close()


def _promote(root: Path, current: Rollout, seen: Look, registry: Registry | None, say: Say) -> None:
    """Promote because of the figures of live users.

    An obstacle (MLflow, a dirty checkout) is reported, and the promotion is tried again at the next look.
    """
    try:
        if registry is None:
            raise ServiceError("it waits until MLflow answers")
        if (version := registry.versions.get(current.version)) is None:
            raise UserError(
                f"the registry does not know v{current.version} any more",
                remedy="ratchet rollout abort ends its rollout",
            )
        by = f"rollout ({who(root)})"
        taken = take_charge(root, version, by=by, why=seen.reason, force=False, say=say, only_while=current)
    except RatchetError as error:
        if isinstance(error, UserError) and not isinstance(error, CheckoutError):
            # The gate refuses it now, or the version is gone: a later look would not change that.
            why = f"it had earned its place ({seen.reason}), but {error}"
            finish(root, current, "aborted", why=why, by="rollout", figures=seen.figures)
            return
        waits = f"waits for the checkout: {error}" if isinstance(error, CheckoutError) else str(error)
        say(f"v{current.version} has earned its place and could not take it yet: {waits}")
        note_look(root, current, f"{seen.reason}; {waits}", seen.figures)
        return
    if taken:
        finish(root, current, "promoted", why=seen.reason, by=taken.by, figures=seen.figures)


def _follow(state: RolloutState, config: Config, registry: Registry, say: Say) -> bool:
    """Tell MLflow of the open rollout and of each version's newest one; return whether it knows all."""
    known = {
        entry.version: entry
        for entry in [*state.ended, *filter(None, [state.current])]
        if entry.name == config.project.name
    }
    try:
        for entry in known.values():
            follow(registry, entry)
    except ServiceError as error:
        say(f"MLflow hears of it later: {error}")
        return False
    return True
