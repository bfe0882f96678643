"""What the registry's tags say of a version's gate: a promotion and a rollout ask the same of them."""

from __future__ import annotations

import json
from typing import Any

from ratchet.errors import UserError
from ratchet.promotion.champion import Champion
from ratchet.tracking.mlflow import KEY_TAG
from ratchet.tracking.registry import Version

# A version's entry in the ledger is made of these tags: texts, and values as JSON.
TEXTS = (KEY_TAG, "git_commit", "adapter_sha256")
VALUES = {"batches": list, "data": dict, "gate": dict}


def read_tags(version: Version) -> dict[str, Any]:
    """`batches`, `data` and `gate` as values.

    Raises UserError when a tag that a rollout or a promotion needs is missing or says nothing.
    """
    remedy = (
        "ratchet retrain registers candidates with all that a promotion needs; "
        "this one was registered by other means, or its tags were changed"
    )
    if missing := [tag for tag in (*TEXTS, *VALUES) if not version.tags.get(tag)]:
        raise UserError(f"v{version.number} has no tag {', '.join(missing)}", remedy=remedy)
    found: dict[str, Any] = {}
    for tag, kind in VALUES.items():
        try:
            found[tag] = json.loads(version.tags[tag])
        except ValueError:
            raise UserError(
                f"v{version.number}'s tag `{tag}` is {version.tags[tag][:60]!r}, wanted JSON", remedy=remedy
            ) from None
        if not isinstance(found[tag], kind):
            raise UserError(
                f"v{version.number}'s tag `{tag}` is a {type(found[tag]).__name__}, wanted a {kind.__name__}",
                remedy=remedy,
            )
    if missing := sorted({"verdict", "rival"} - found["gate"].keys()):
        raise UserError(f"v{version.number}'s tag `gate` has no {', '.join(missing)}", remedy=remedy)
    return found


def check_gate(version: Version, champion: Champion | None) -> None:
    """Check that the gate passed the version.

    Raises UserError when it did not pass, passed against another champion, or its tags say nothing.
    """
    gate = read_tags(version)["gate"]
    overrules = (
        f"`ratchet promote {version.number} --force --reason …`, or the tags `decision` = `force` and "
        "`reason` in MLflow, overrule it; the ledger keeps the reason"
    )
    if gate["verdict"] != "promote":
        raise UserError(f"the gate's verdict on v{version.number} is {gate['verdict']}", remedy=overrules)
    now = champion.version if champion else None
    if gate["rival"] != now:
        raise UserError(
            f"v{version.number} was compared with {named(gate['rival'])}, in charge is {named(now)}",
            remedy=f"ratchet retrain --force compares a candidate with today's champion; {overrules}",
        )


def named(version: int | None) -> str:
    """For messages."""
    return "the base" if version is None else f"v{version}"
