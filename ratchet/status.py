"""What `ratchet status` and `ratchet history` know: git and the local files; MLflow and Prefect only as far as they answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.batches import read_manifest
from ratchet.champion import read_champion, read_ledger
from ratchet.config import Config
from ratchet.files import read_json
from ratchet.services import list_services
from ratchet.workspace import failed_workspaces


def see_status(root: Path, config: Config) -> dict[str, Any]:
    champion = read_champion(root)
    seen = set(champion.batches) if champion else set()
    batches = read_manifest(root / "data/raw")
    gate = root / "reports/gate.json"
    return {
        "project": config.project.name,
        "champion": {"version": champion.version, "since": champion.at, "by": champion.by, "why": champion.why, "gate": champion.gate} if champion else None,
        "gate": {key: value for key, value in read_json(gate).items() if key in ("verdict", "reasons", "rival")} if gate.exists() else None,
        "data": {
            "batches": len(batches),
            "rows": sum(batch.rows for batch in batches),
            "new": [{"name": batch.name, "rows": batch.rows} for batch in batches if batch.name not in seen],
        },
        "promotion": config.promotion,
        "services": {service.name: {"url": service.url, "answers": service.answers} for service in list_services(root, config)},
        "left": sorted(path.name for path in failed_workspaces(root)),
    }


def describe(found: dict[str, Any]) -> list[str]:
    champion, gate, data = found["champion"], found["gate"], found["data"]
    lines = [f"project    {found['project']} (promotion: {found['promotion']})"]
    lines.append(f"champion   v{champion['version']} since {champion['since']}, by {champion['by']}: {champion['why']}" if champion else "champion   none yet")
    if gate:
        lines.append(f"last gate  {gate['verdict']}, against {'the base' if gate['rival']['version'] is None else 'v' + str(gate['rival']['version'])}")
        lines += [f"           {reason}" for reason in gate["reasons"]]
    new = data["new"]
    lines.append(
        f"data       {data['rows']} rows in {data['batches']} batches; {f'{len(new)} new since the champion: ratchet retrain' if new else 'nothing new since the champion'}"
    )
    if not data["batches"]:
        lines[-1] = "data       no batch in this checkout yet: ratchet ingest"
    lines += [f"{name:10} {service['url'] if service['answers'] else 'not running: ratchet up'}" for name, service in found["services"].items()]
    return lines + [f"left over  .ratchet/workspaces/{name} (a run that failed)" for name in found["left"]]


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
        gain = f"{gate['metric']} {gate['mean']:+.3f} [{gate['low']:+.3f}, {gate['high']:+.3f}]" if gate.get("mean") is not None else "no figures"
        lines.append(f"{row['at']}  {row['move']:8} {'—' if row['from'] is None else 'v' + str(row['from'])} → v{row['to']}  by {row['by']}")
        lines.append(f"    why   {row['why']}")
        lines.append(f"    data  {row['data']['rows']} rows in {row['data']['batches']} batches, DVC {row['data']['dvc']}")
        lines.append(f"    gate  {gate['verdict']} against {'the base' if gate['rival'] is None else 'v' + str(gate['rival'])}: {gain}; commit {row['commit'][:8]}")
    return lines
