"""The guardrail `parity`: a candidate that the gateway would answer with otherwise than the trainer takes nobody's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.errors import RatchetError
from ratchet.files import read_json

AGAIN = "dvc repro --force parity"


def judge_parity(path: Path, adapter: str) -> dict[str, Any]:
    """Raises RatchetError: no report, one of another candidate, or one that lacks parts."""
    report = read_json(path)
    try:
        parts, seen = {part["name"]: part for part in report["parts"]}, report["candidate"]
        failed = [part for part in parts.values() if part["result"] != "pass" or part["mismatches"]]
        rows = int(report["rows"])
    except (KeyError, TypeError, ValueError) as error:
        raise RatchetError(f"{path} is no report of serve parity: {error!r}", remedy=AGAIN) from None
    if seen != adapter:
        raise RatchetError(f"serve parity was checked for the adapter {str(seen)[:12]}, the candidate's is {adapter[:12]}", remedy=AGAIN)
    lacking = [name for name in ("files", "training", "prompts", "gateway") if not parts.get(name, {}).get("rows")]
    if lacking and not failed:
        raise RatchetError(f"the report of serve parity has no rows for {', '.join(lacking)}", remedy=AGAIN)
    # The first differing token says more than a file's name.
    told = sorted(failed, key=lambda part: part.get("first") is None)
    reason = "; ".join(part["reason"] for part in told) if failed else f"{parts['prompts']['reason']}; {parts['gateway']['reason']}"
    return {"name": "parity", "metric": "tokens", "rows": rows, "result": "fail" if failed else "pass", "reason": f"guardrail parity: {reason}"}
