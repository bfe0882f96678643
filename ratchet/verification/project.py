"""Verify a project: every invariant once, whatever the others find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ratchet.config.params import Config
from ratchet.errors import RatchetError
from ratchet.pipeline.workspace import LANDING
from ratchet.verification.finding import Finding
from ratchet.verification.in_charge import find_alias, find_gateway, find_ledger, find_tags
from ratchet.verification.leftovers import (
    find_checkout,
    find_half_written,
    find_processes,
    find_runs,
    find_workspaces,
)
from ratchet.verification.rows import find_batches, find_rows
from ratchet.verification.secrets import find_secrets
from ratchet.verification.stored import find_data, find_versions

Invariant = Callable[[Path, Config], Finding]
INVARIANTS: tuple[Invariant, ...] = (
    *(find_ledger, find_tags, find_gateway, find_alias),
    *(find_batches, find_rows, find_data, find_versions, find_secrets),
    *(find_processes, find_workspaces, find_runs, find_half_written, find_checkout),
)


LANDS = ("batches", "rows", "data", "checkout")  # what a landing moves in two steps


def verify(root: Path, config: Config) -> Iterator[Finding]:
    """Yield what each invariant finds. One that cannot be looked at is wrong."""
    for invariant in INVARIANTS:
        try:
            yield _heed_landing(root, invariant(root, config))
        except (RatchetError, OSError, ValueError, KeyError) as error:
            name = invariant.__name__.removeprefix("find_")
            yield Finding(name, "wrong", f"cannot be read: {' '.join(str(error).split())[:300]}")


def _heed_landing(root: Path, found: Finding) -> Finding:
    """Say what mends the checkout's data after a run that was killed as it landed."""
    if found.result != "wrong" or found.name not in LANDS or not (root / LANDING).exists():
        return found
    remedy = "a run lands, or was killed as it did: any other command then brings its data"
    return msgspec.structs.replace(found, remedy=remedy)
