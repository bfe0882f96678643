"""The page to look at: one HTML file without scripts or anything from outside.

`ratchet report` writes it, the gateway serves it at `/`.

It reads files, git and the request log only, so it is there with MLflow and Prefect down. What cannot be read
says why in its place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.params import Config
from ratchet.errors import CommandError, RatchetError
from ratchet.files import write_text
from ratchet.monitoring.request_log import open_log
from ratchet.monitoring.verdicts import number, read_verdicts
from ratchet.pipeline.checkout import git
from ratchet.promotion.champion import read_champion
from ratchet.promotion.rollout import Rollout, read_ended, read_rollout
from ratchet.reporting.forgetting import OLD_SAVED, SAVED
from ratchet.services.status import ledger_rows
from ratchet.serving.bundle import read_state

DAYS = 14  # of traffic and feedback
MOST_VERDICTS, MOST_PROMOTIONS, MOST_ROLLOUTS, MOST_MOVES = 200, 8, 8, 20
REMEMBERED = ("past", "golden", "region")  # checks of a gate that say what was kept and what was cured


def write_page(root: Path, config: Config, path: Path) -> Path:
    write_text(path, render_page(root, config))
    return path


def render_page(root: Path, config: Config) -> str:
    """Texts of users are escaped; halves of surrogate pairs become question marks."""
    from ratchet.reporting.dashboard_view import render

    return render(gather(root, config)).encode("utf-8", "replace").decode()


def gather(root: Path, config: Config) -> dict[str, Any]:
    """Each part is {"found": …, "fault": ""}, or {"found": None, "fault": why it cannot be read}."""
    now = time.time()
    ledger = _part(lambda: ledger_rows(root))
    return {
        "project": config.project.name,
        "at": now,
        "false_alarm_rate": config.monitor.false_alarm_rate,
        "min_prompts": config.monitor.min_prompts,
        "margins": {
            "feedback": config.rollout.min_gain,
            "errors": config.rollout.error_margin,
            "empty": config.rollout.empty_margin,
            "latency": config.rollout.latency_margin,
        },
        "days": DAYS,
        "champion": _part(lambda: _champion(root)),
        "serving": _part(lambda: read_state(root)),
        "rollout": _part(lambda: _rollout(read_rollout(root))),
        "past": _part(lambda: [_rollout(entry) for entry in reversed(read_ended(root)[-MOST_ROLLOUTS:])]),
        "traffic": _part(lambda: _traffic(root, config, now - DAYS * 86_400)),
        "verdicts": _part(lambda: read_verdicts(root, MOST_VERDICTS)),
        "ledger": {
            "found": (ledger["found"] or [])[:MOST_MOVES],
            "fault": ledger["fault"],
            "all": len(ledger["found"] or []),
        },
        "table": _part(lambda: _table(root)),
        "forgetting": _part(lambda: _forgetting(root, ledger["found"] or [])),
    }


def _part(read: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"found": read(), "fault": ""}
    except (
        RatchetError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        msgspec.MsgspecError,
    ) as error:  # a file of another shape is no reason to show nothing
        return {"found": None, "fault": str(error) or type(error).__name__}


def _champion(root: Path) -> dict[str, Any] | None:
    champion = read_champion(root)
    return msgspec.to_builtins(champion) if champion else None


def _rollout(rollout: Rollout | None) -> dict[str, Any] | None:
    return msgspec.to_builtins(rollout) | {"share": rollout.share} if rollout else None


def _traffic(root: Path, config: Config, since: float) -> list[dict[str, Any]]:
    """By hour, version and arm."""
    log = open_log(root, config)
    try:
        return [row._asdict() for row in log.traffic(since=since)]
    finally:
        log.close()


def _table(root: Path) -> dict[str, Any] | None:
    """Read the retention table as it was saved last: building it takes seconds a version."""
    path = root / SAVED if (root / SAVED).exists() else root / OLD_SAVED
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found if found and found["versions"] else None


# --- what each promotion kept -------------------------------------------------------------------------------


def _forgetting(root: Path, ledger: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the newest promotions, what their gates said of the past, the golden rows and the topics that had
    drifted.
    """
    promotions = {
        row["to"]: row for row in reversed(ledger) if row["move"] == "promote"
    }  # one that came back has the same gate
    newest = sorted(promotions.values(), key=lambda row: -row["to"])[:MOST_PROMOTIONS]
    return [
        {"version": row["to"], "rival": row["gate"].get("rival"), "at": row["at"]}
        | _gate(root, row["model_commit"])
        for row in newest
    ]


def _gate(root: Path, commit: str) -> dict[str, Any]:
    try:
        gate = json.loads(git(root, "show", f"{commit}:reports/gate.json"))
        checks = [
            check
            for check in [*gate["checks"], *gate.get("regions", [])]
            if check["name"].partition(":")[0] in REMEMBERED
        ]
        return {"checks": [_check(check) for check in checks], "fault": ""}
    except (CommandError, ValueError, KeyError, TypeError, AttributeError):
        return {
            "checks": [],
            "fault": (
                f"reports/gate.json cannot be read at {commit[:8]} (git fetch --unshallow, if the history is"
                " cut off)"
            ),
        }


def _check(raw: dict[str, Any]) -> dict[str, Any]:
    figures = {name: number(raw.get(name)) for name in ("mean", "low", "high", "wanted")}
    return {
        "name": str(raw["name"]),
        "metric": str(raw.get("metric", "")),
        "rows": raw.get("rows") or 0,
        "result": str(raw.get("result", "")),
        **figures,
    }
