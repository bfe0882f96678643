"""Read what `ratchet status` and `ratchet history` show, from git and the local files.

MLflow and Prefect are only asked whether they answer, so that both commands work at once with the services
down.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ratchet.config.params import Config
from ratchet.data.batches import Reverted, read_manifest
from ratchet.errors import ServiceError
from ratchet.files import read_json
from ratchet.monitoring.verdicts import Recorded, last_verdict
from ratchet.pipeline.workspace import failed_workspaces
from ratchet.promotion.champion import Data, GateLine, read_champion, read_ledger
from ratchet.promotion.gate_tags import named
from ratchet.promotion.lineage import reverted_since
from ratchet.promotion.rollout import Rollout, read_rollout
from ratchet.promotion.verdict import Rival
from ratchet.services.environment import ADDRESSES
from ratchet.services.supervisor import Service, list_services
from ratchet.serving.bundle import ServingState, read_state


class InCharge(msgspec.Struct, frozen=True):
    version: int
    since: str
    by: str
    why: str
    gate: GateLine


class LastGate(msgspec.Struct, frozen=True):
    verdict: str
    reasons: list[str]
    rival: Rival


class Batch(msgspec.Struct, frozen=True):
    name: str
    rows: int


class Batches(msgspec.Struct, frozen=True):
    batches: int
    rows: int
    new: list[Batch]  # those that the champion has not seen


class Answering(msgspec.Struct, frozen=True):
    url: str | None
    answers: bool
    started_here: bool  # by `ratchet up`, on this machine or in this container
    variable: str | None = None  # that names its address


class Status(msgspec.Struct, frozen=True):
    """What `ratchet status --json` prints, key by key; `to_json` adds the rollout's `share`."""

    project: str
    champion: InCharge | None
    gate: LastGate | None
    data: Batches
    promotion: str
    rollout: Rollout | None
    serving: ServingState | None
    drift: Recorded | None  # the monitor's last verdict
    services: dict[str, Answering]
    left: list[str]  # workspaces of runs that failed
    fault: str = ""  # why the shared storage, and so the rollout, cannot be read

    def to_json(self) -> dict[str, object]:
        rollout = self.rollout.to_json() if self.rollout else None
        return {**msgspec.to_builtins(self), "rollout": rollout}


def see_status(root: Path, config: Config) -> Status:
    """Read the status. Raises CheckoutError for a broken champion.json."""
    champion = read_champion(root)
    rollout, fault = _read_rollout(root)
    seen = set(champion.batches) if champion else set()
    batches = read_manifest(root / "data/raw")
    new = [Batch(batch.name, batch.rows) for batch in batches if batch.name not in seen]
    gate = root / "reports/gate.json"
    return Status(
        project=config.project.name,
        champion=(
            InCharge(champion.version, champion.at, champion.by, champion.why, champion.gate)
            if champion
            else None
        ),
        gate=msgspec.convert(read_json(gate), LastGate) if gate.exists() else None,
        data=Batches(len(batches), sum(batch.rows for batch in batches), new),
        promotion=config.promotion,
        rollout=rollout,
        serving=read_state(root),
        drift=last_verdict(root),
        services={one.name: _answering(one) for one in list_services(root, config)},
        left=sorted(path.name for path in failed_workspaces(root)),
        fault=fault,
    )


def _read_rollout(root: Path) -> tuple[Rollout | None, str]:
    """Return the open rollout, or why it cannot be read: the rest of the status needs no database."""
    try:
        return read_rollout(root), ""
    except ServiceError as error:
        return None, str(error).splitlines()[0]


def describe(found: Status, sentence: str = "") -> list[str]:
    """Describe the status, one or a few lines per part of the loop; `sentence` says the last verdict."""
    champion, gate, data = found.champion, found.gate, found.data
    lines = [f"project    {found.project} (promotion: {found.promotion})"]
    lines.append(
        f"champion   v{champion.version} since {champion.since}, by {champion.by}: {champion.why}"
        if champion
        else "champion   none yet"
    )
    if gate:
        lines.append(f"last gate  {gate.verdict}, against {named(gate.rival.version)}")
        lines += [f"           {reason}" for reason in [*([sentence] if sentence else []), *gate.reasons]]
    if data.batches:
        since = f"{len(data.new)} of them came since the champion: ratchet retrain"
        since = since if data.new else "nothing new since the champion"
        lines.append(f"data       {data.rows} rows in {data.batches} batches; {since}")
    else:
        lines.append("data       no batch in this checkout yet: ratchet ingest --path FILE")
    if found.fault:
        lines.append(f"rollout    unknown: {found.fault}")
    if found.rollout:
        lines += headed("rollout", rollout_lines(found.rollout))
    refused = found.serving.refused if found.serving else {}
    lines += [f"refused    {version} by the gateway: {why}" for version, why in refused.items()]
    if found.drift:
        lines += headed("drift", verdict_lines(found.drift))
    lines += [f"{name:10} {_service_line(service)}" for name, service in found.services.items()]
    return lines + [f"left over  .ratchet/workspaces/{name} (a run that failed)" for name in found.left]


def _answering(service: Service) -> Answering:
    variable = ADDRESSES[service.name] if service.given else None
    return Answering(service.url, service.answers, service.alive, variable)


def _service_line(service: Answering) -> str:
    if service.answers:
        known = service.started_here or service.variable
        return f"{service.url}" if known else f"{service.url} (not started by `ratchet up` here)"
    if service.started_here:
        return f"runs, and does not answer: {service.url}"
    if service.variable:
        return f"does not answer: {service.url} ({service.variable})"
    return "not running: ratchet up"


def headed(head: str, lines: list[str]) -> list[str]:
    return [f"{head if not number else '':10} {line}" for number, line in enumerate(lines)]


def rollout_lines(found: Rollout | None) -> list[str]:
    """Describe an open or ended rollout, or a look that found none."""
    if found is None:
        return ["no rollout is open"]
    step = f"step {found.step + 1} of {len(found.shares)}"
    where = f", at {step}"
    if found.state in ("open", "paused"):
        where = f": {found.shares[found.step]:.0%} of the users ({step}), the others v{found.champion}"
    line = f"v{found.version} {found.state.replace('_', ' ')}{where}"
    return [line, found.why] if found.why else [line]


def verdict_lines(found: Recorded) -> list[str]:
    """Describe what the monitor saw, which topics grew, and why it does or does not retrain."""
    p = f", p = {found.p:.4f}" if found.p is not None else ""
    told = [column for column in found.columns if column.p is not None] if found.verdict == "drift" else []
    strongest = sorted(told, key=lambda column: column.p or 0.0)[:3]
    return [
        f"{found.verdict} on {found.rows} requests to v{found.version}{p} ({found.at})",
        *(f"  {column.name}: p = {column.p:.4f}" for column in strongest),
        *([f"  {found.quality.describe()}"] if found.quality else []),
        *(
            f"  topic {topic.name}: {topic.share:.1%} of the requests, {topic.reference_share:.1%} of the"
            " reference"
            for topic in found.topics
        ),
        f"  so {'a retraining is worth it' if found.decision.retrain else 'no retraining'}:",
        *(f"    for      {line}" for line in found.decision.for_),
        *(f"    against  {line}" for line in found.decision.against),
    ]


class Move(msgspec.Struct, frozen=True):
    """One move of the champion, as `ratchet history --json` prints it."""

    at: str
    by: str
    move: str
    from_: int | None = msgspec.field(name="from")
    to: int
    why: str
    data: Data
    gate: GateLine
    commit: str  # the commit that moved the champion
    model_commit: str  # the commit whose dvc.lock holds the adapter
    reverted: list[Reverted] = []  # batches in its data that were taken back later


def read_moves(root: Path) -> list[Move]:
    """Read the ledger, the newest move first."""
    return [
        Move(
            entry.at,
            entry.by,
            entry.move,
            entry.replaced,
            entry.version,
            entry.why,
            entry.data,
            entry.gate,
            commit,
            entry.commit,
            reverted_since(root, entry.commit),
        )
        for commit, entry in read_ledger(root)
    ]


def ledger_lines(moves: list[Move]) -> list[str]:
    if not moves:
        return ["the ledger is empty: no model was promoted yet"]
    lines = []
    for move in moves:
        gate, data = move.gate, move.data
        before = "—" if move.from_ is None else f"v{move.from_}"
        lines += [
            f"{move.at}  {move.move:8} {before} → v{move.to}  by {move.by}",
            f"    why   {move.why}",
            f"    data  {data.told}",
            f"    gate  {gate.verdict} against {named(gate.rival)}: {gate.gain or 'no figures'}; "
            f"commit {move.commit[:8]}",
            *(f"    {line}" for line in reverted_lines(move.reverted)),
        ]
    return lines


def reverted_lines(reverted: list[Reverted]) -> list[str]:
    """List the batches that a version learned and that were taken back later."""
    return [
        f"taken back later: {entry.batch}, {entry.rows} rows, on {entry.at} by {entry.by}: {entry.reason}"
        for entry in reverted
    ]
