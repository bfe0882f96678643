"""What an invariant found."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """The result of one invariant.

    `waits` is a difference that is noted and will be settled; `unknown` could not be looked at. For `wrong`,
    `wanted` and `remedy` say what to do.
    """

    name: str
    result: Literal["ok", "waits", "unknown", "wrong"]
    seen: str
    wanted: str = ""
    remedy: str = ""

    @property
    def told(self) -> str:
        wanted = f", wanted {self.wanted}" if self.wanted else ""
        return f"{self.result:7} {self.name}: {self.seen}{wanted}" + (
            f"\n          → {self.remedy}" if self.remedy else ""
        )


def judge(name: str, seen: str, faults: list[str], wanted: str, remedy: str) -> Finding:
    """Return `ok` with what was seen, or `wrong` with the first faults."""
    if not faults:
        return Finding(name, "ok", seen)
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return Finding(name, "wrong", "; ".join(faults[:3]) + more, wanted, remedy)
