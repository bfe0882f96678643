"""Say of an `uncertain` verdict which checks are open, and how many more rows of which kind settle them."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET

from ratchet.promotion.verdict import Check, Verdict

# What has to be added: test rows of any batch, those of one batch, golden rows; or what is no matter of rows.
Kind = Literal["test", "batch", "golden", "none"]


class Open(msgspec.Struct, frozen=True):
    """An unclear check.

    `more`: how many rows of `kind` would settle it at this gain; None: it is not known, or no number would.
    `batch` is named where rows of one batch are needed.
    """

    check: str
    rows: int
    more: int | None
    kind: Kind
    batch: str = ""


def open_checks(verdict: Verdict) -> list[Open]:
    """Return the unclear checks in the verdict's order."""
    return [_open(check) for check in verdict.checks if check.result == "unclear"]


def _open(check: Check) -> Open:
    kind, _, part = check.name.partition(":")
    more = None if check.needed is UNSET else check.needed
    if kind == "past" and part:
        return Open(check.name, check.rows, more, "batch", part)
    if kind == "golden":
        return Open(check.name, check.rows, more, "golden")
    if kind in ("success", "base", "answer_nll", "past", "slices") or (kind == "metric" and check.gain):
        return Open(check.name, check.rows, more, "test")
    return Open(check.name, check.rows, None, "none")
