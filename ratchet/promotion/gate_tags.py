"""Read a version's verdict from its tags in the registry; a promotion and a rollout need the same tags."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints

import msgspec

from ratchet.errors import UserError
from ratchet.promotion.champion import Champion, Data, GateLine
from ratchet.promotion.verdict import Verdict
from ratchet.tracking.mlflow import KEY_TAG
from ratchet.tracking.registry import Version

# A version's entry in the ledger is made from these tags and from those of `Tags`.
TEXTS = (KEY_TAG, "git_commit", "adapter_sha256")


class Tags(NamedTuple):
    """The tags that hold JSON."""

    batches: list[str]
    data: Data
    gate: GateLine


KINDS = get_type_hints(Tags)


def read_tags(version: Version) -> Tags:
    """Read the tags that hold JSON.

    Raises UserError when a tag that a rollout or a promotion needs is missing, empty or malformed.
    """
    remedy = (
        "ratchet retrain registers candidates with all that a promotion needs; "
        "this one was registered by other means, or its tags were changed"
    )
    if missing := [tag for tag in (*TEXTS, *KINDS) if not version.tags.get(tag)]:
        raise UserError(f"v{version.number} has no tag {', '.join(missing)}", remedy=remedy)
    found = {}
    for tag, kind in KINDS.items():
        text = version.tags[tag]
        try:
            found[tag] = msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError as error:
            raise UserError(
                f"v{version.number}'s tag `{tag}` is {text[:60]!r}: {error}", remedy=remedy
            ) from None
    return Tags(**found)


def check_gate(version: Version, champion: Champion | None) -> None:
    """Check that the gate passed the version against today's champion.

    Raises UserError when it did not pass, when it passed against another champion, or when its tags cannot be
    read.
    """
    gate = read_tags(version).gate
    overrules = (
        f"`ratchet promote {version.number} --force --reason …`, or the tags `decision` = `force` and "
        "`reason` in MLflow, overrule it; the ledger keeps the reason"
    )
    if gate.verdict != "promote":
        raise UserError(f"the gate's verdict on v{version.number} is {gate.verdict}", remedy=overrules)
    now = champion.version if champion else None
    if gate.rival != now:
        raise UserError(
            f"v{version.number} was compared with {named(gate.rival)}, in charge is {named(now)}",
            remedy=f"ratchet retrain --force compares a candidate with today's champion; {overrules}",
        )


def is_gate_of(champion: Champion, verdict: Verdict) -> bool:
    """Return whether the champion took charge by this verdict."""
    return (champion.adapter_sha256, champion.gate.rival, champion.gate.verdict) == (
        verdict.candidate.adapter_sha256,
        verdict.rival.version,
        verdict.verdict,
    )


def named(version: int | None) -> str:
    """Name a version in messages; None is the base."""
    return "the base" if version is None else f"v{version}"
