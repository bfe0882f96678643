"""Everyone who says which version is in charge says the same: ledger, tag, gateway, MLflow."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from ratchet.config.params import Config
from ratchet.errors import CommandError, ServiceError
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import FILE, Champion, alias_is_pending, read_champion, read_ledger
from ratchet.services.environment import HEALTH, HOST, fetch_from, given_address, mlflow_answers
from ratchet.serving.bundle import read_state
from ratchet.tracking.registry import CHAMPION, get_alias
from ratchet.verification.finding import Finding, judge

LOADING_SECONDS = 600.0  # in which a gateway may still be loading a new champion


def find_ledger(root: Path, config: Config) -> Finding:
    """Check that champion.json is the ledger's last entry."""
    champion, entries = read_champion(root), read_ledger(root)
    last = entries[0][1] if entries else None
    seen = f"v{champion.version}" if champion else "nobody"
    faults = [] if champion == last else [f"{FILE} says {seen}, as {champion and champion.at} put it there"]
    wanted = f"v{last.version} of {last.at}, the newest commit of {FILE}" if last else f"no {FILE}"
    return judge("ledger", f"{seen}, {len(entries)} entries", faults, wanted, f"git checkout HEAD -- {FILE}")


def find_tags(root: Path, config: Config) -> Finding:
    """Check that every version that was in charge has its tag, at the commit that first put it there."""
    first = {(entry.name, entry.version): commit for commit, entry in read_ledger(root)}  # the oldest last
    faults, remedies = [], []
    for (name, version), commit in first.items():
        tag = f"model/{name}/v{version}"
        try:
            at = git(root, "rev-parse", "--verify", "--quiet", f"refs/tags/{tag}^{{commit}}").strip()
        except CommandError:
            at = ""
        if at != commit:
            faults.append(f"{tag} is {'at ' + at[:8] if at else 'not there'}")
            remedies.append(f"git tag --force {tag} {commit[:8]}")
    return judge(
        "tags", f"{len(first)} versions", faults, "the commit of the promotion", "; ".join(remedies[:3])
    )


def find_gateway(root: Path, config: Config) -> Finding:
    """Check that the gateway answers with the champion; a new one is loaded first, which may take minutes."""
    address = given_address("gateway") or f"http://{HOST}:{config.gateway.port}"
    champion, body = read_champion(root), fetch_from(address, "/readyz")
    if body is None and fetch_from(address, HEALTH["gateway"]) is None:
        return Finding("gateway", "unknown", f"none answers at {address}")
    seen = f"v{json.loads(body).get('version')}" if body else "nobody"
    wanted = f"v{champion.version}" if champion else "nobody"
    state = read_state(root)
    refused = state.refused.get(wanted) if state else None
    if champion and seen != wanted and not refused and _age(champion) < LOADING_SECONDS:
        return Finding("gateway", "waits", f"{seen} answers, {wanted} is being loaded")
    faults = [f"{seen} answers at {address}{f': {refused}' if refused else ''}"] if seen != wanted else []
    remedy = "ratchet status says what it refuses and why; else ratchet down, then ratchet up"
    return judge("gateway", f"{seen} answers", faults, wanted, remedy)


def _age(champion: Champion) -> float:
    """Return for how many seconds it has been in charge."""
    return (datetime.now(UTC) - datetime.fromisoformat(champion.at)).total_seconds()


def find_alias(root: Path, config: Config) -> Finding:
    """Check that MLflow's alias is at the champion, or that a note says that it has to follow."""
    champion, noted, away = read_champion(root), alias_is_pending(root), not mlflow_answers()
    try:
        alias = None if away else get_alias(config.project.name, CHAMPION)
    except ServiceError:
        away = True
    if away:
        return Finding("alias", "waits" if noted else "unknown", "MLflow does not answer")
    seen, wanted = (f"v{number}" if number else "nobody" for number in (alias, champion and champion.version))
    if seen != wanted and noted:
        return Finding("alias", "waits", f"{seen} in MLflow, to follow {wanted}", "", "ratchet rollout look")
    faults = [f"{seen} in MLflow"] if seen != wanted else []
    return judge(
        "alias", f"{seen} in MLflow", faults, wanted, "ratchet rollout look, which also heeds people"
    )
