"""The flow `rollout`: one look. People's decisions in MLflow first, then the open rollout, then a challenger that waits.

What people call by hand (`look_once`, pause, resume, abort, status) are plain functions: pausing and aborting must not need a server.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.say import say as tell
from ratchet.champion import Champion, read_champion
from ratchet.config import Config, load_config
from ratchet.errors import CheckoutError, RatchetError, ServiceError, UserError
from ratchet.registry import CHALLENGER, CHAMPION, Version, drop_alias, get_alias, get_version, list_versions, set_alias, set_tag
from ratchet.report import rollout_card
from ratchet.request_log import open_log
from ratchet.rollout import Rollout, read_ended, read_rollout
from ratchet.serving import read_state
from ratchet.workspace import locked, open_workspace, who
from tasks import promote as promotion
from tasks import rollout as tasks

Say = Callable[[str], None]
UI = "MLflow UI"
NOTHING: dict[str, Any] = {"why": "no rollout is open"}


@flow(name="rollout", persist_result=False)
def rollout(root: str | None = None) -> dict[str, Any]:
    """Returns the rollout as it stands after the look. Raises what git and the request log raise; MLflow's absence is said."""
    home = Path(root or os.environ.get("RATCHET_ROOT") or Path.cwd()).resolve()
    found = look_once(home, load_config(home / "params.yaml"), tell)
    if found.get("version"):
        create_markdown_artifact(rollout_card(found), key="rollout", description=f"v{found['version']}: {found['state']}")
    return found


def look_once(root: Path, config: Config, say: Say) -> dict[str, Any]:
    with locked(root, "promote"):
        try:
            _hear_people(root, config, say)
        except ServiceError as error:
            say(f"decisions in MLflow wait: {error}")
        current = read_rollout(root)
        if current is None:
            current = _open_waiting(root, config, say)
        if current is None or current.state == "paused":
            return _plain(current)
        return _plain(_look(root, config, current, say))


def rollout_status(root: Path, config: Config) -> dict[str, Any]:
    """The open one, or the last that ended."""
    return _plain(read_rollout(root) or next(reversed(read_ended(root)), None))


def pause_rollout(root: Path, config: Config, say: Say) -> dict[str, Any]:
    return _set_state(root, "paused", say)


def resume_rollout(root: Path, config: Config, say: Say) -> dict[str, Any]:
    return _set_state(root, "open", say)


def abort_rollout(root: Path, config: Config, reason: str, say: Say) -> dict[str, Any]:
    with locked(root, "promote"):
        return _plain(_end(root, _require_open(root), "aborted", reason, who(root), say))


def _set_state(root: Path, state: Any, say: Say) -> dict[str, Any]:
    with locked(root, "promote"):
        changed = tasks.set_state(root, _require_open(root), state, by=who(root), now=time.time())
        tasks.tell_registry(changed, say)
        return _plain(changed)


def _require_open(root: Path) -> Rollout:
    current = read_rollout(root)
    if current is None:
        raise UserError("no rollout is open", remedy="a version that passes the gate opens one; `ratchet status` shows who is in charge")
    return current


def _plain(current: Rollout | None) -> dict[str, Any]:
    return msgspec.to_builtins(current) | {"share": current.share} if current else dict(NOTHING)


# --- the look ----------------------------------------------------------------------------------------------------------


def _look(root: Path, config: Config, current: Rollout, say: Say) -> Rollout:
    champion = read_champion(root)
    if champion is not None and champion.version == current.version:  # the look that put it there was cut off
        return _end(root, current, "promoted", champion.why, champion.by, say)
    if champion is None or champion.version != current.champion:
        return _end(
            root, current, "aborted", f"the champion is {'nobody' if champion is None else f'v{champion.version}'} now, the rollout was against v{current.champion}", "rollout", say
        )
    if refused := ((read_state(root) or {}).get("refused") or {}).get(f"v{current.version}"):
        return _end(root, current, "stopped", f"the gateway cannot load it: {refused}", "gateway", say)
    log = open_log(root, config)
    try:
        seen = tasks.look(log.rollout_units(current.id), current, config.rollout, time.time())
    finally:
        log.close()
    say(f"v{current.version} at {current.share:.0%}: {seen.action.replace('_', ' ')}: {seen.reason}")
    if seen.action == "promote":
        return _promote(root, current, seen, say)
    changed = tasks.apply(root, current, seen, time.time())
    tasks.tell_registry(changed, say)
    return changed


def _promote(root: Path, current: Rollout, seen: tasks.Look, say: Say) -> Rollout:
    """The registry is asked for the version once more: a person may have changed its tags, or taken it away."""
    try:
        version = get_version(current.name, current.version)
    except ServiceError as error:
        say(f"v{current.version} waits at {current.share:.0%} of the users until MLflow answers: {error}")
        return tasks.apply(root, current, seen._replace(action="hold", reason=f"{seen.reason}; waits for MLflow"), time.time())
    if version is None:
        return _end(root, current, "aborted", f"the registry does not know v{current.version} any more", "rollout", say)
    try:
        _put_in_charge(root, version, by=f"rollout ({who(root)})", why=seen.reason, force=False, say=say)
    except CheckoutError as error:
        say(f"v{current.version} waits at {current.share:.0%} of the users until the checkout is clean: {error}")
        return tasks.apply(root, current, seen._replace(action="hold", reason=f"{seen.reason}; waits for the checkout: {error}"), time.time())
    except UserError as error:
        return _end(root, current, "aborted", str(error), "rollout", say)
    return _end(root, msgspec.structs.replace(current, last=seen.figures), "promoted", seen.reason, "rollout", say)


def _put_in_charge(root: Path, version: Version, *, by: str, why: str, force: bool, say: Say) -> Champion:
    with open_workspace(root, "promote", say, keep_failed=0) as workspace:
        return promotion.promote(workspace, version, by=by, why=why, force=force, say=say)


def _end(root: Path, current: Rollout, state: str, why: str, by: str, say: Say) -> Rollout:
    ended = tasks.finish(root, current, state, why=why, by=by, now=time.time())
    say(f"the rollout of v{current.version} ended {state.replace('_', ' ')}: {why}")
    tasks.tell_registry(ended, say)
    return ended


def _open_waiting(root: Path, config: Config, say: Say) -> Rollout | None:
    """The version under the alias `challenger`, when it may be rolled out and was not before."""
    champion = read_champion(root)
    if config.promotion != "rollout" or champion is None:
        return None
    try:
        number = get_alias(config.project.name, CHALLENGER)
        version = get_version(config.project.name, number) if number is not None else None
    except ServiceError as error:
        say(f"no look at the registry this time: {error}")
        return None
    if version is None or version.number == champion.version:
        return None
    if fault := _unfit(version, champion) or _ended_before(root, version):
        say(f"v{version.number} is no challenger any more: {fault}")
        _forget_challenger(config, say)
        return None
    return _open(root, config, version, champion, say)


def _open(root: Path, config: Config, version: Version, champion: Champion, say: Say) -> Rollout:
    opened = tasks.open_rollout(root, config.rollout, version, champion, time.time())
    say(f"v{version.number} gets {opened.share:.0%} of the users, v{champion.version} the others")
    tasks.tell_registry(opened, say)
    return opened


def _unfit(version: Version, champion: Champion | None) -> str:
    """Why the gate's word does not let it answer users; empty when it does. Tags may hold anything: people write them."""
    if missing := [tag for tag in promotion.TAGS if tag not in version.tags]:
        return f"it has no tag {', '.join(missing)}: it was not registered by Ratchet"
    try:
        gate = json.loads(version.tags["gate"])
        verdict, rival = gate["verdict"], gate["rival"]
    except (ValueError, KeyError, TypeError):
        return "its tag `gate` is no verdict"
    if verdict != "promote":
        return f"the gate's verdict is {verdict}"
    if champion is not None and rival != champion.version:
        return f"the gate compared it with {'the base' if rival is None else f'v{rival}'}, in charge is v{champion.version}; `ratchet retrain --force` compares again"
    return ""


def _ended_before(root: Path, version: Version) -> str:
    past = [entry for entry in read_ended(root) if entry.version == version.number and entry.adapter_sha256 == version.tags["adapter_sha256"]]
    return f"its rollout ended {past[-1].state.replace('_', ' ')}: {past[-1].why}" if past else ""


def _forget_challenger(config: Config, say: Say) -> None:
    try:
        drop_alias(config.project.name, CHALLENGER)
    except ServiceError as error:
        say(f"MLflow hears of it later: {error}")


# --- decisions of people in MLflow's UI ----------------------------------------------------------------------------------


def _hear_people(root: Path, config: Config, say: Say) -> None:
    """Tags `decision` that have no outcome yet, and an alias `champion` that was moved by hand. Each is acted upon once."""
    champion = read_champion(root)
    versions = list_versions(config.project.name)
    for version in versions:
        decision = version.tags.get("decision", "")
        if decision and not version.tags.get("decision_outcome", "").startswith(f"{decision}:"):
            _conclude(version, decision, _act(root, config, version, decision, say), say)
    moved = get_alias(config.project.name, CHAMPION)
    if champion and moved != champion.version and not promotion.alias_is_pending(root) and read_champion(root) == champion:
        _hear_alias(root, config, champion, next((version for version in versions if version.number == moved), None), say)


def _hear_alias(root: Path, config: Config, champion: Champion, version: Version | None, say: Say) -> None:
    if version is not None:
        outcome = _act(root, config, version, "approve", say, at_once=True)
        _conclude(version, "alias", outcome, say)
        if outcome.startswith("done"):
            return
    set_alias(config.project.name, CHAMPION, champion.version)
    say(f"the alias {CHAMPION} is back on v{champion.version}")


def _act(root: Path, config: Config, version: Version, decision: str, say: Say, *, at_once: bool = False) -> str:
    """What came of it, in words that begin with `done` or `refused`."""
    champion, current = read_champion(root), read_rollout(root)
    by, why = version.tags.get("decision_by") or UI, version.tags.get("reason") or f"{decision} in MLflow"
    try:
        if decision == "reject":
            return _reject(root, config, version, current, by, why, say)
        if decision == "force":
            return _force(root, version, current, by, version.tags.get("reason", ""), say)
        if decision != "approve":
            return f"refused: {decision!r} is no decision; approve, reject or force"
        if champion and champion.version == version.number:
            return "done: it is in charge"
        if fault := _unfit(version, champion):
            return f"refused: {fault}; `force` with a tag `reason` overrules the gate"
        if config.promotion == "rollout" and champion and not at_once:
            return _approve_rollout(root, config, version, champion, current, say)
        _put_in_charge(root, version, by=by, why=why, force=False, say=say)
        return "done: it is in charge"
    except ServiceError:
        raise
    except RatchetError as error:
        return f"refused: {error}"


def _reject(root: Path, config: Config, version: Version, current: Rollout | None, by: str, why: str, say: Say) -> str:
    if current and current.version == version.number:
        _end(root, current, "aborted", why, by, say)
        return "done: its rollout ended"
    if get_alias(config.project.name, CHALLENGER) == version.number:
        drop_alias(config.project.name, CHALLENGER)
    return "done: it is no challenger"


def _force(root: Path, version: Version, current: Rollout | None, by: str, reason: str, say: Say) -> str:
    if not reason:
        return "refused: `force` needs a tag `reason`; the ledger keeps why the gate was overruled"
    _put_in_charge(root, version, by=by, why=f"forced: {reason}", force=True, say=say)
    if current:
        state = "promoted" if current.version == version.number else "aborted"
        _end(root, current, state, f"v{version.number} was forced by {by}: {reason}", by, say)
    return "done: it is in charge, against the gate"


def _approve_rollout(root: Path, config: Config, version: Version, champion: Champion, current: Rollout | None, say: Say) -> str:
    if current and current.version == version.number:
        if current.state == "paused":
            tasks.tell_registry(tasks.set_state(root, current, "open", by=UI, now=time.time()), say)
        return "done: its rollout goes on"
    if current:
        return f"refused: the rollout of v{current.version} is open; reject it first"
    _open(root, config, version, champion, say)
    return "done: its rollout is open"


def _conclude(version: Version, decision: str, outcome: str, say: Say) -> None:
    set_tag(version.name, version.number, "decision_outcome", f"{decision}: {outcome}"[:1000])
    say(f"v{version.number}, {decision} in MLflow: {outcome}")
