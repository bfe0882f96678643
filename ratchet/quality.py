"""Is a batch good enough? Limits on what was rejected, and what is said aloud although it passes."""

from __future__ import annotations

from typing import Any

from ratchet.config.data import PrepareConfig
from ratchet.data.validation import REVIEW
from ratchet.errors import DataError

LEAK = ("near_golden", "straddles")
NO_FAULT = (*LEAK, "superseded", "forgotten", "too_many_of_user", "too_many_of_source")  # nothing is wrong with these rows
FEW, FEW_LEAKED = 2, 20  # rows that never fail a batch: ten people's corrections may all be near to rows of the test split
ALARMS = {"secret": "change it where it is valid: whoever has the batch has it", "canary": "data that must never come back did: find out from where"}
REMEDY = "mend the source and take the batch back (git revert its commit), or raise the limit; rejected.jsonl lists every row with its reason"
First = dict[tuple[str, str], tuple[int, str]]  # (batch, reason) → (line, message)


def check_limits(profile: dict[str, Any], first: First, config: PrepareConfig) -> list[str]:
    """What is to be said of batches that pass. Raises DataError for the first that does not."""
    said = alarms(profile)
    for name, counts in profile["batches"].items():
        _check_batch(name, counts, first, config, said)
    accepted = profile["total"]["accepted"].get("train", 0)
    if accepted < config.min_rows:
        raise DataError(f"{accepted} training rows are left of {profile['total']['rows']}; `prepare.min_rows` is {config.min_rows}", remedy="ingest more rows, or lower the limit")
    return said


def alarms(profile: dict[str, Any]) -> list[str]:
    """Told whatever the limits say."""
    return [
        f"ALARM: {counts['rejected'][reason]} rows of {name} hold a {reason}; {what}"
        for name, counts in profile["batches"].items()
        for reason, what in ALARMS.items()
        if counts["rejected"].get(reason)
    ]


def _check_batch(name: str, counts: dict[str, Any], first: First, config: PrepareConfig, said: list[str]) -> None:
    rows, rejected = counts["rows"], {reason: count for reason, count in counts["rejected"].items() if reason != "rows"}
    faults = {reason: count for reason, count in rejected.items() if reason not in NO_FAULT and reason not in REVIEW}

    def refuse(what: str, limit: str, reason: str | None = None) -> None:
        reasons = [reason] if reason else sorted(faults, key=lambda one: first[name, one])
        line, message = first[name, reasons[0]]
        more = "\n".join(said)
        raise DataError(f"{what} ({limit}). The first: {name}:{line}: {message}", remedy=f"{REMEDY}{more and chr(10)}{more}")

    if rejected.get("canary"):
        refuse(f"{rejected['canary']} of {rows} rows of {name} hold a canary", "`prepare.canaries`", "canary")
    if sum(faults.values()) > max(FEW, config.max_rejected_share * rows):
        refuse(f"{sum(faults.values())} of {rows} rows of {name} are rejected ({faults})", f"`prepare.max_rejected_share` is {config.max_rejected_share}")
    worst = max(faults, key=lambda one: faults[one], default="")
    if worst and faults[worst] > max(FEW, config.max_reason_share * rows):
        refuse(f"{faults[worst]} of {rows} rows of {name} are rejected as {worst}", f"`prepare.max_reason_share` is {config.max_reason_share}", worst)
    if config.trigger_rows and rejected.get("trigger"):
        refuse(f"{rejected['trigger']} of {rows} rows of {name} look like a planted trigger", f"`prepare.trigger_rows` is {config.trigger_rows}", "trigger")
    leaked = {reason: rejected[reason] for reason in LEAK if reason in rejected}
    if sum(leaked.values()) > max(FEW_LEAKED, config.max_leaked_share * rows):
        refuse(
            f"{sum(leaked.values())} of {rows} rows of {name} are near to rows of the yardsticks ({leaked})",
            f"`prepare.max_leaked_share` is {config.max_leaked_share}",
            max(leaked, key=lambda one: leaked[one]),
        )
    if (shift := counts.get("label_shift")) is not None and shift > config.max_label_shift:
        raise DataError(
            f"the answers of {name} are distributed otherwise than before: total variation {shift:.2f}, `prepare.max_label_shift` is {config.max_label_shift}",
            remedy="if the subject is new, raise the limit; otherwise take the batch back",
        )
    if sum(faults.values()) > max(1, config.warn_rejected_share * rows):
        said.append(f"warning: {sum(faults.values())} of {rows} rows of {name} are rejected: {faults}")
