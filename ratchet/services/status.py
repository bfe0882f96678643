"""What `ratchet status` and `ratchet history` know: git and the local files; MLflow and Prefect only as far as they answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.params import Config
from ratchet.data.batches import read_manifest
from ratchet.files import read_json
from ratchet.monitoring.verdicts import Recorded, last_verdict
from ratchet.pipeline.workspace import failed_workspaces
from ratchet.promotion.champion import read_champion, read_ledger
from ratchet.promotion.rollout import read_rollout
from ratchet.services.supervisor import list_services
from ratchet.serving.bundle import read_state


def see_status(root: Path, config: Config) -> dict[str, Any]:
    champion = read_champion(root)
    seen = set(champion.batches) if champion else set()
    batches = read_manifest(root / "data/raw")
    gate = root / "reports/gate.json"
    return {
        "project": config.project.name,
        "champion": {
            "version": champion.version,
            "since": champion.at,
            "by": champion.by,
            "why": champion.why,
            "gate": champion.gate,
        }
        if champion
        else None,
        "gate": {
            key: value for key, value in read_json(gate).items() if key in ("verdict", "reasons", "rival")
        }
        if gate.exists()
        else None,
        "data": {
            "batches": len(batches),
            "rows": sum(batch.rows for batch in batches),
            "new": [{"name": batch.name, "rows": batch.rows} for batch in batches if batch.name not in seen],
        },
        "promotion": config.promotion,
        "rollout": _rollout(root),
        "serving": read_state(root),
        "drift": msgspec.to_builtins(last_verdict(root)),
        "services": {
            service.name: {"url": service.url, "answers": service.answers}
            for service in list_services(root, config)
        },
        "left": sorted(path.name for path in failed_workspaces(root)),
    }


def _rollout(root: Path) -> dict[str, Any] | None:
    rollout = read_rollout(root)
    return msgspec.to_builtins(rollout) | {"share": rollout.share} if rollout else None


def describe(found: dict[str, Any]) -> list[str]:
    champion, gate, data = found["champion"], found["gate"], found["data"]
    lines = [f"project    {found['project']} (promotion: {found['promotion']})"]
    lines.append(
        f"champion   v{champion['version']} since {champion['since']}, by {champion['by']}: {champion['why']}"
        if champion
        else "champion   none yet"
    )
    if gate:
        lines.append(
            f"last gate  {gate['verdict']}, against {'the base' if gate['rival']['version'] is None else 'v' + str(gate['rival']['version'])}"
        )
        lines += [f"           {reason}" for reason in gate["reasons"]]
    new = data["new"]
    lines.append(
        f"data       {data['rows']} rows in {data['batches']} batches; {f'{len(new)} of them came since the champion: ratchet retrain' if new else 'nothing new since the champion'}"
    )
    if not data["batches"]:
        lines[-1] = "data       no batch in this checkout yet: ratchet ingest --path FILE"
    if found["rollout"]:
        lines += [
            f"{'rollout' if not number else '':10} {line}"
            for number, line in enumerate(rollout_lines(found["rollout"]))
        ]
    lines += [
        f"refused    {version} by the gateway: {why}"
        for version, why in ((found["serving"] or {}).get("refused") or {}).items()
    ]
    if found["drift"]:
        lines += [
            f"{'drift' if not number else '':10} {line}"
            for number, line in enumerate(verdict_lines(msgspec.convert(found["drift"], Recorded)))
        ]
    lines += [
        f"{name:10} {service['url'] if service['answers'] else 'not running: ratchet up'}"
        for name, service in found["services"].items()
    ]
    return lines + [f"left over  .ratchet/workspaces/{name} (a run that failed)" for name in found["left"]]


def rollout_lines(found: dict[str, Any]) -> list[str]:
    """Of an open or ended rollout; of a look that found none."""
    if not found.get("version"):
        return [found.get("why") or "no rollout is open"]
    step = f"step {found['step'] + 1} of {len(found['shares'])}"
    share = f": {found['shares'][found['step']]:.0%} of the users ({step}), the others v{found['champion']}"
    lines = [
        f"v{found['version']} {found['state'].replace('_', ' ')}{share if found['state'] in ('open', 'paused') else f', at {step}'}"
    ]
    return [*lines, *([found["why"]] if found.get("why") else [])]


def verdict_lines(found: Recorded) -> list[str]:
    """Say what the monitor saw, which topics grew, and why it does or does not retrain."""
    p = f", p = {found.p:.4f}" if found.p is not None else ""
    told = [column for column in found.columns if column.p is not None] if found.verdict == "drift" else []
    strongest = sorted(told, key=lambda column: column.p or 0.0)[:3]
    return [
        f"{found.verdict} on {found.rows} requests to v{found.version}{p} ({found.at})",
        *(f"  {column.name}: p = {column.p:.4f}" for column in strongest),
        *(
            f"  topic {topic.name}: {topic.share:.1%} of the requests, {topic.reference_share:.1%} of the reference"
            for topic in found.topics
        ),
        f"  retraining: {'yes' if found.decision.retrain else 'no'}",
        *(f"    for      {line}" for line in found.decision.for_),
        *(f"    against  {line}" for line in found.decision.against),
    ]


def ledger_rows(root: Path) -> list[dict[str, Any]]:
    """The newest first."""
    return [
        {
            "at": entry.at,
            "by": entry.by,
            "move": entry.move,
            "from": entry.replaced,
            "to": entry.version,
            "why": entry.why,
            "data": entry.data,
            "gate": entry.gate,
            "commit": commit,
            "model_commit": entry.commit,
        }
        for commit, entry in read_ledger(root)
    ]


def ledger_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["the ledger is empty: no model was promoted yet"]
    lines = []
    for row in rows:
        gate = row["gate"]
        gain = (
            f"{gate['metric']} {gate['mean']:+.3f} [{gate['low']:+.3f}, {gate['high']:+.3f}]"
            if gate.get("mean") is not None
            else "no figures"
        )
        lines.append(
            f"{row['at']}  {row['move']:8} {'—' if row['from'] is None else 'v' + str(row['from'])} → v{row['to']}  by {row['by']}"
        )
        lines.append(f"    why   {row['why']}")
        lines.append(
            f"    data  {row['data']['rows']} rows in {row['data']['batches']} batches, DVC {row['data']['dvc']}"
        )
        lines.append(
            f"    gate  {gate['verdict']} against {'the base' if gate['rival'] is None else 'v' + str(gate['rival'])}: {gain}; commit {row['commit'][:8]}"
        )
    return lines
