"""Define the report of serve parity, reports/parity.json; this module loads no model."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from ratchet.promotion.verdict import Speed


class Token(msgspec.Struct, frozen=True):
    """A token's id and its text."""

    id: int
    text: str


class Mismatch(msgspec.Struct, frozen=True):
    """The place where a row differs; `wanted` or `seen` is None where that side has no more tokens."""

    row: str
    position: int  # in tokens from the beginning of the prompt
    wanted: Token | None
    seen: Token | None
    what: str


class Part(msgspec.Struct, frozen=True):
    """One comparison; `first` is the first mismatch, `result` is "pass" or "fail"."""

    name: str
    rows: int
    mismatches: int
    reason: str
    first: Mismatch | None = None
    ties: int = 0
    tolerance: float | None = None
    largest: float | None = None  # difference of logits, as a share of the largest one
    result: str = ""

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "result", "fail" if self.mismatches else "pass")


class Report(msgspec.Struct, frozen=True):
    """The whole report; `fitting` counts the test rows that are no longer than the trained length."""

    candidate: str  # sha256 of its weights
    rows: int
    training_rows: int
    parts: list[Part]
    fitting: int | UnsetType = UNSET
    speed: Speed | UnsetType = UNSET

    @property
    def passed(self) -> bool:
        return all(part.result == "pass" for part in self.parts)
