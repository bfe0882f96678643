"""Read the monitor's verdicts, whatever version of it wrote them."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

VERDICTS = Path(".ratchet/monitor/verdicts.jsonl")


def _verdict(line: str) -> dict[str, Any] | None:
    try:
        return _whole(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _whole(raw: dict[str, Any]) -> dict[str, Any]:
    """With all keys, whatever version of the monitor wrote it."""
    decision = raw.get("decision") or {}
    return {
        "at": seconds_of(raw["at"]),
        "version": raw.get("version"),
        "verdict": str(raw.get("verdict", "")),
        "p": number(raw.get("p")),
        "rows": raw.get("rows") or 0,
        "needed": raw.get("needed"),
        "columns": [_column(column) for column in raw.get("columns") or []],
        "topics": [_topic(topic) for topic in raw.get("topics") or []],
        "missing": [str(line) for line in raw.get("missing") or []],
        "report": str(raw.get("report") or ""),
        "decision": {
            "retrain": bool(decision.get("retrain")),
            "for": list(decision.get("for") or []),
            "against": list(decision.get("against") or []),
        },
    }


def _column(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": str(raw.get("name", "")),
        "p": number(raw.get("p")),
        "value": number(raw.get("value")),
        "reference": number(raw.get("reference")),
    }


def _topic(raw: dict[str, Any]) -> dict[str, Any]:
    texts = {name: [str(text) for text in raw.get(name) or []] for name in ("terms", "examples")}
    return {
        "name": str(raw.get("name", "")),
        "share": number(raw.get("share")) or 0.0,
        "reference_share": number(raw.get("reference_share")) or 0.0,
        **texts,
    }


def number(value: Any) -> float | None:
    """None for what is no finite number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def seconds_of(at: Any) -> float:
    """Since 1970, of seconds or an ISO 8601 text, which is UTC where it names no zone. Raises ValueError."""
    try:
        found = (
            datetime.fromtimestamp(at, UTC)
            if isinstance(at, int | float)
            else datetime.fromisoformat(str(at))
        )
    except (OverflowError, OSError):
        raise ValueError(f"{at} is no moment") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def last_verdict(root: Path) -> dict[str, Any] | None:
    """What the monitor said last."""
    path = root / VERDICTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else None
