"""Keep the open rollout in the document `.ratchet/rollout.json`: which users get which version, at which
step.

Ended rollouts are lines of `.ratchet/rollouts.jsonl`. Both are files, or rows of the shared database
(`ratchet/storage`). The flow `rollout` writes them, the gateways read them, and MLflow's tags follow, so a
rollout can be paused or aborted while MLflow is down. A look reads the state once and decides on it. Each
write first compares with the document again, under the lock `promote`, so repeating it changes nothing.
"""

from __future__ import annotations

import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import xxhash

from ratchet.config.params import Config
from ratchet.errors import BusyError, CheckoutError, UserError
from ratchet.files import to_json
from ratchet.pipeline.checkout import locked
from ratchet.promotion.champion import Champion
from ratchet.promotion.gate_tags import check_gate
from ratchet.storage.documents import read_document, remove_document, write_document
from ratchet.tracking.registry import Version

FILE, ENDED = Path(".ratchet/rollout.json"), Path(".ratchet/rollouts.jsonl")
AGAIN = Path(".ratchet/look-again")  # exists during a look, and afterwards if something still waits


class Bounds(msgspec.Struct, frozen=True):
    """Challenger minus champion; each bound holds at all looks together with probability 1 - alpha."""

    mean: float
    low: float
    high: float
    champion: int  # number of units, as for the challenger
    challenger: int


class Users(msgspec.Struct, frozen=True):
    """How many users each arm had in one step."""

    step: int
    champion: int
    challenger: int


class Measure(msgspec.Struct, frozen=True):
    """Bounds of one measure, at the alphas of a promotion, of a rollback, and of a guardrail that has to
    hold.
    """

    gain: Bounds | None = None
    harm: Bounds | None = None
    pass_: Bounds | None = msgspec.field(name="pass", default=None)


class Figures(msgspec.Struct, frozen=True):
    """What a look measured, for people and the page."""

    measures: dict[str, Measure] = {}
    steps: list[Users] = []


class Rollout(msgspec.Struct, frozen=True):
    """One rollout: `share` of the users get `version`, the others `champion`. Times are in seconds since
    1970.

    Each rollout has a `salt` of its own, so that it divides the users independently of earlier ones.
    """

    id: str
    name: str
    version: int
    champion: int
    commit: str  # its dvc.lock holds the challenger's adapter
    adapter_sha256: str
    salt: str
    step: int  # position in `shares`
    shares: list[float]
    state: str  # "open", "paused"; ended: "promoted", "rolled_back", "no_evidence", "stopped", "aborted"
    opened: float
    step_since: float
    why: str = ""  # the state's reason
    by: str = ""
    last: Figures = Figures()  # of the newest look
    ended: float | None = None
    paused_at: float | None = None
    paused_seconds: float = 0.0  # sum of earlier pauses, which do not count towards time limits

    @property
    def share(self) -> float:
        """Return the challenger's share of users; 0 while it is paused, when everybody gets the champion."""
        return self.shares[self.step] if self.state == "open" else 0.0

    def to_json(self) -> dict[str, object]:
        return {**msgspec.to_builtins(self), "share": self.share}

    @property
    def last_step(self) -> int:
        """Return the step before 100 %, which is the last with both arms."""
        return max(0, len(self.shares) - 2)


class RolloutState(NamedTuple):
    """Both files, read once."""

    current: Rollout | None  # open or paused
    ended: list[Rollout]  # the oldest first

    def find(self, rollout: Rollout) -> Rollout | None:
        """Return the same rollout as it stands now; None when the files do not know it."""
        known = [*self.ended, *([self.current] if self.current else [])]
        return next((entry for entry in reversed(known) if entry.id == rollout.id), None)


def read_state(root: Path) -> RolloutState:
    """Read both files. Raises CheckoutError for a malformed file."""
    return RolloutState(read_rollout(root), read_ended(root))


def read_rollout(root: Path) -> Rollout | None:
    """Read the open or paused rollout. Raises CheckoutError for a malformed file."""
    return decode_rollout(root, read_document(root, FILE))


def decode_rollout(root: Path, content: bytes | None) -> Rollout | None:
    """Decode the document; None: there is no rollout. Raises CheckoutError for a malformed one."""
    try:
        return None if content is None else msgspec.json.decode(content, type=Rollout)
    except msgspec.DecodeError as error:
        raise CheckoutError(
            f"{FILE} is no rollout: {error}",
            remedy=f"remove {root / FILE}: the champion answers everybody, and the challenger starts anew",
        ) from None


def write_rollout(root: Path, rollout: Rollout) -> None:
    write_document(root, FILE, to_json(msgspec.to_builtins(rollout)))


def end_rollout(root: Path, rollout: Rollout) -> None:
    """Move a rollout to the list of ended ones, then remove the file that the gateway reads.

    In this order a crash in between loses nothing, and repeating the call adds nothing.
    """
    past = [entry for entry in read_ended(root) if entry.id != rollout.id]
    write_document(root, ENDED, b"".join(msgspec.json.encode(entry) + b"\n" for entry in [*past, rollout]))
    remove_document(root, FILE)


def read_ended(root: Path) -> list[Rollout]:
    """Read the rollouts that ended, the oldest first."""
    content = read_document(root, ENDED) or b""
    return [msgspec.json.decode(line, type=Rollout) for line in content.split(b"\n") if line]


def position(salt: str, unit: str) -> float:
    """Place a user between 0 and 1; the challenger answers users whose place is under the share.

    A growing share moves no user back to the champion.
    """
    return xxhash.xxh3_64_intdigest(f"{salt}\0{unit}".encode()) / 2**64


# --- acts ---------------------------------------------------------------------------------------------------


def open_rollout(
    root: Path, config: Config, version: Version, champion: Champion, *, by: str, again: bool = False
) -> Rollout:
    """Open a rollout for `version`. `again`: a person wants another one after one that ended.

    Raises UserError when the gate did not pass the version against this champion or it already had its
    rollout, BusyError when another rollout is open.
    """
    with locked(root, "promote"):
        state = read_state(root)
        current = state.current
        if current and current.version == version.number:
            return current
        if current:
            raise BusyError(
                f"the rollout of v{current.version} is {current.state}",
                remedy="ratchet rollout abort ends it; one version at a time is tried on users",
            )
        check_gate(version, champion)
        _check_past(state.ended, version, champion, again)
        now = time.time()
        opened = Rollout(
            id=f"v{version.number}-{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%S.%f}",
            name=version.name,
            version=version.number,
            champion=champion.version,
            commit=version.tags["git_commit"],
            adapter_sha256=version.tags["adapter_sha256"],
            salt=secrets.token_hex(8),  # otherwise the same users would get every challenger first
            step=0,
            shares=config.rollout.steps,
            state="open",
            opened=now,
            step_since=now,
            why="it has just been opened",
            by=by,
        )
        write_rollout(root, opened)
        return opened


def _check_past(ended: list[Rollout], version: Version, champion: Champion, again: bool) -> None:
    """Refuse a second rollout against the same champion, and any rollout of a version that did harm or was
    promoted.
    """
    if not again and version.tags.get("decision", "").strip().lower() == "reject":
        raise UserError(
            "a person rejected it", remedy="the tag `decision` = `approve` on it opens its rollout"
        )
    past = [entry for entry in ended if entry.version == version.number]
    if entry := next((entry for entry in past if entry.state in ("rolled_back", "promoted")), None):
        raise UserError(
            f"its rollout ended {entry.state.replace('_', ' ')}: {entry.why}",
            remedy=(
                "the tags `decision` = `force` and `reason`, or `ratchet promote`, put it in charge anyway"
            ),
        )
    if not again and (
        entry := next(
            (entry for entry in past if entry.state == "stopped" or entry.champion == champion.version), None
        )
    ):
        raise UserError(
            f"its rollout ended {entry.state.replace('_', ' ')}: {entry.why}",
            remedy=(
                "the tag `decision` = `approve` on it opens another; where it stands "
                "already, remove the tag "
                "`decision_outcome`"
            ),
        )


def advance(root: Path, seen: Rollout, why: str, figures: Figures) -> Rollout | None:
    """Move to the next step from the one that was looked at.

    Return the rollout as it is now if somebody else changed it first, None if it has ended.
    """
    return _change(root, seen, step=seen.step + 1, step_since=time.time(), why=why, last=figures)


def note_look(root: Path, seen: Rollout, why: str, figures: Figures) -> Rollout | None:
    return _change(root, seen, why=why, last=figures)


def pause(root: Path, by: str) -> Rollout:
    """Pause the rollout: the champion answers everybody. Raises UserError when no rollout is open."""
    current = _expect(root)
    if current.state != "open":
        return current
    return _change(
        root, current, state="paused", paused_at=time.time(), why=f"paused by {by}", by=by
    ) or _expect(root)


def resume(root: Path, by: str) -> Rollout:
    """Resume the rollout where it was; the pause counts towards no limit. Raises UserError when there is
    none.
    """
    current = _expect(root)
    if current.state != "paused" or current.paused_at is None:
        return current
    seconds = time.time() - current.paused_at
    times = {
        "paused_at": None,
        "paused_seconds": current.paused_seconds + seconds,
        "step_since": current.step_since + seconds,
    }
    return _change(root, current, state="open", why=f"resumed by {by}", by=by, **times) or _expect(root)


def finish(
    root: Path, seen: Rollout, state: str, *, why: str, by: str, figures: Figures | None = None
) -> Rollout:
    """End the rollout, and return it as it ended, even if somebody else ended it first."""
    with locked(root, "promote"):
        before = read_state(root)
        current = before.current
        if current is None or current.id != seen.id:
            return before.find(seen) or seen
        ended = msgspec.structs.replace(
            current, state=state, why=why, by=by, last=figures or current.last, ended=time.time()
        )
        end_rollout(root, ended)
        return ended


def _expect(root: Path) -> Rollout:
    current = read_rollout(root)
    if current is None:
        raise UserError(
            "no rollout is open",
            remedy=(
                "with `promotion: rollout`, a version that passed the gate becomes `challenger`, and its "
                "rollout opens at the next look (`ratchet rollout look`)"
            ),
        )
    return current


def _change(root: Path, seen: Rollout, **values: Any) -> Rollout | None:
    """Change the rollout, but only if its state and step are still those that were seen.

    Otherwise return it as it is now, or None when it has ended.
    """
    with locked(root, "promote"):
        current = read_rollout(root)
        if current is None or (current.id, current.state, current.step) != (seen.id, seen.state, seen.step):
            return current if current and current.id == seen.id else None
        changed = msgspec.structs.replace(current, **values)
        write_rollout(root, changed)
        return changed
