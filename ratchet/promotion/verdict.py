"""Define the gate's verdict as types, and as the JSON of `reports/gate.json`, which promotions and pages
read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from ratchet.errors import RatchetError
from ratchet.files import read_json

Result = Literal["pass", "fail", "unclear"]
# A check without such a figure leaves the field out (UNSET); one that could not be measured writes null.
Figure = float | None | UnsetType
Needed = int | None | UnsetType


class Check(Struct, frozen=True):
    """The result of one rule.

    `mean`, `low` and `high` are an interval, and `wanted` is the bound that it is compared with. `score` is
    the candidate's own mean, of which `mean` is the gain. `needed` tells how many more rows would settle an
    unclear check at this gain; None: no number would.
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
    score: Figure = UNSET
    needed: Needed = UNSET

    @property
    def gain(self) -> tuple[float, float, float] | None:
        """Return mean, low and high; None where nothing was measured."""
        if isinstance(self.mean, float) and isinstance(self.low, float) and isinstance(self.high, float):
            return self.mean, self.low, self.high
        return None

    @property
    def gain_text(self) -> str:
        """Format the gain as `mean [low, high]`; empty where nothing was measured."""
        return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self.gain) if self.gain else ""


class Rival(Struct, frozen=True):
    """What the candidate was compared with: the `champion` with its version, or the `base` (None)."""

    model: str
    version: int | None

    @property
    def told(self) -> str:
        return "the untouched base" if self.version is None else f"v{self.version}"


class Look(Struct, frozen=True):
    """The number of this candidate among those judged against this rival, and its allowed error.

    `rows` is a key of the rows that it was judged on, `before` how often it was judged on other ones.
    """

    number: int
    alpha: float
    rows: str = ""
    before: int = 0


class Candidate(Struct, frozen=True, omit_defaults=True):
    """`trained_by` names the nodes of a federation; it is empty for a training on this checkout's rows."""

    run_key: str
    adapter_sha256: str
    trained_by: str = ""


class Speed(Struct, frozen=True):
    """How long an answer takes in the gateway's engine, with one question at a time.

    `milliseconds` holds mean, low and high: the 95 % interval of the mean. `tokens` is the mean per answer.
    """

    answers: int
    milliseconds: dict[str, float]
    tokens: float
    tokens_per_second: float

    @property
    def text(self) -> str:
        time = self.milliseconds
        each = (
            f"{time['mean']:.0f} ms [{time['low']:.0f}, {time['high']:.0f}] an answer,"
            f" {self.tokens_per_second:.0f} tokens a second"
        )
        return f"in the gateway's engine, one question at a time: {each} ({self.answers} answers)"


class Verdict(Struct, frozen=True):
    """The gate's decision.

    `regions`, `slices` and `speed` are shown but decide nothing. Files of older versions lack some fields.
    """

    verdict: Literal["promote", "reject", "uncertain"]
    reasons: list[str]
    rival: Rival
    checks: list[Check]
    candidate: Candidate
    regions: list[Check] = []
    slices: list[Check] = []
    worth: Check | None = None
    speed: Speed | None = None
    look: Look | None = None
    params: dict[str, Any] = {}  # the section `gate` of params.yaml, with the guardrails' error at this look

    @property
    def success(self) -> Check:
        """Return the check of the success metric."""
        return self.checks[0]

    @property
    def shown_worth(self) -> list[Check]:
        """Return the line on the training's worth where it is shown but is not one of the checks."""
        return [self.worth] if self.worth and all(check.name != "worth" for check in self.checks) else []


def tell_rows(needed: int) -> str:
    """Round up an estimate of rows: two digits are more than it is worth."""
    digits = 10 ** max(0, len(str(needed)) - 2)
    return f"{-(-needed // digits) * digits:,}"


def read_verdict(path: Path) -> Verdict:
    """Return the verdict that the gate wrote. Raises RatchetError."""
    return decode_verdict(read_json(path), str(path))


def decode_verdict(raw: Any, where: str = "reports/gate.json") -> Verdict:
    try:
        return msgspec.convert(raw, Verdict)
    except msgspec.ValidationError as error:
        raise RatchetError(f"{where} holds no verdict: {error}", remedy="dvc repro --force gate") from None
