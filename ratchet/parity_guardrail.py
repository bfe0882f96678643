"""The guardrail `parity`: a candidate that the gateway would answer with otherwise than the trainer takes nobody's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ratchet.config.evaluation import ParityConfig
from ratchet.errors import RatchetError
from ratchet.files import read_json

CHECK_AGAIN = "dvc repro --force parity"


def judge_parity(path: Path, adapter: str, asked: ParityConfig | None = None, *, merges: bool = True) -> dict[str, Any]:
    """Raises RatchetError: no report, one of another candidate, or one that lacks parts, or rows that were `asked` for and there. `merges`: whether the method does."""
    report = read_json(path)
    try:
        parts, seen = {part["name"]: part for part in report["parts"]}, report["candidate"]
        failed = [part for part in parts.values() if part["result"] != "pass" or part["mismatches"]]
        rows, there = int(report["rows"]), int(report.get("fitting", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise RatchetError(f"{path} is no report of serve parity: {error!r}", remedy=CHECK_AGAIN) from None
    if seen != adapter:
        raise RatchetError(f"serve parity was checked for the adapter {str(seen)[:12]}, the candidate's is {adapter[:12]}", remedy=CHECK_AGAIN)
    wanted = ["files", "training", "prompts", "gateway", *(["merged"] if asked and asked.merged and merges else [])]
    lacking = [name for name in wanted if not parts.get(name, {}).get("rows")]
    if lacking and not failed:
        raise RatchetError(f"the report of serve parity has no rows for {', '.join(lacking)}", remedy=CHECK_AGAIN)
    if asked and not failed and rows < (min(asked.rows, there) or asked.rows):
        raise RatchetError(f"serve parity was checked on {rows} of {there} test rows; `parity.rows` is {asked.rows}", remedy=CHECK_AGAIN)
    # The first differing token says more than a file's name.
    told = sorted(failed, key=lambda part: part.get("first") is None)
    reason = "; ".join(part["reason"] for part in told) if failed else f"{parts['prompts']['reason']}; {parts['gateway']['reason']}"
    return {"name": "parity", "metric": "tokens", "rows": rows, "result": "fail" if failed else "pass", "reason": f"guardrail parity: {reason}"}


def speed_line(found: dict[str, Any]) -> str:
    """What `ratchet.parity.latency` measured, in words."""
    time = found["milliseconds"]
    each = f"{time['mean']:.0f} ms [{time['low']:.0f}, {time['high']:.0f}] an answer, {found['tokens_per_second']:.0f} tokens a second"
    return f"in the gateway's engine, one question at a time: {each} ({found['answers']} answers)"
