"""The gate's verdict as types, and as the JSON of `reports/gate.json`, which promotions and pages read."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

Result = Literal["pass", "fail", "unclear"]
# A check that has no such figure leaves the field out (UNSET); one that could not be measured writes null.
Figure = float | None | UnsetType


class Check(Struct, frozen=True):
    """One rule's result.

    `mean`, `low` and `high` are an interval, `wanted` is the bound that it has to clear.
    """

    name: str
    metric: str
    rows: int
    result: Result
    reason: str
    mean: Figure = UNSET
    low: Figure = UNSET
    high: Figure = UNSET
    wanted: Figure = UNSET


class Rival(Struct, frozen=True):
    """What the candidate was compared with: the `champion` of that version, or the `base` (None)."""

    model: str
    version: int | None


class Look(Struct, frozen=True):
    """The candidate's number among those judged against this rival, and the error it may have."""

    number: int
    alpha: float


class Candidate(Struct, frozen=True):
    run_key: str
    adapter_sha256: str


class Verdict(Struct, frozen=True):
    """The gate's decision.

    `regions`, `slices` and `speed` are shown and decide nothing. Files of older versions lack some fields.
    """

    verdict: Literal["promote", "reject", "uncertain"]
    reasons: list[str]
    rival: Rival
    checks: list[Check]
    candidate: Candidate
    regions: list[Check] = []
    slices: list[Check] = []
    worth: Check | None = None
    speed: dict[str, Any] | None = None
    look: Look | None = None
    params: dict[str, Any] = {}

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found
