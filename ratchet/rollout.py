"""The open rollout as a file, `.ratchet/rollout.json`: who gets which version, and how far it is. Ended ones are lines of `.ratchet/rollouts.jsonl`.

The gateway reads it, the flow `rollout` writes it (one at a time, under the lock `promote`), MLflow's tags follow: a rollout can be
paused or aborted with MLflow down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import xxhash

from ratchet.errors import CheckoutError
from ratchet.files import write_bytes, write_json

FILE, ENDED = Path(".ratchet/rollout.json"), Path(".ratchet/rollouts.jsonl")


class Rollout(msgspec.Struct, frozen=True):
    """`share` of the users get `version`, the others `champion`. Times are in seconds since 1970; `salt` makes the split of users its own."""

    id: str
    name: str
    version: int
    champion: int
    commit: str  # whose dvc.lock holds the challenger's adapter
    adapter_sha256: str
    salt: str
    step: int  # position in `shares`
    shares: list[float]
    state: str  # "open", "paused"; ended: "promoted", "rolled_back", "no_evidence", "stopped", "aborted"
    opened: float
    step_since: float
    why: str = ""  # the state's reason
    by: str = ""
    last: dict[str, Any] = {}  # the newest look's figures
    ended: float | None = None

    @property
    def share(self) -> float:
        """0 while it is paused: everybody gets the champion."""
        return self.shares[self.step] if self.state == "open" else 0.0


def read_rollout(root: Path) -> Rollout | None:
    """The open or paused one. Raises CheckoutError for a file that is none."""
    try:
        return msgspec.json.decode((root / FILE).read_bytes(), type=Rollout)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise CheckoutError(f"{FILE} is no rollout: {error}", remedy=f"remove it: the champion answers everybody, and the challenger starts anew ({root / FILE})") from None


def write_rollout(root: Path, rollout: Rollout) -> None:
    write_json(root / FILE, msgspec.to_builtins(rollout))


def end_rollout(root: Path, rollout: Rollout) -> None:
    """Into the list of ended ones, then out of the gateway's sight. Doing it twice adds nothing."""
    past = [entry for entry in read_ended(root) if entry.id != rollout.id]
    write_bytes(root / ENDED, (msgspec.json.encode(entry) + b"\n" for entry in [*past, rollout]))
    (root / FILE).unlink(missing_ok=True)


def read_ended(root: Path) -> list[Rollout]:
    """The oldest first."""
    path = root / ENDED
    return [msgspec.json.decode(line, type=Rollout) for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def position(salt: str, unit: str) -> float:
    """Where a user stands between 0 and 1: under the share, the challenger answers. A growing share takes nobody back."""
    return xxhash.xxh3_64_intdigest(f"{salt}\0{unit}".encode()) / 2**64
