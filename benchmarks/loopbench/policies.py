"""The policies that are compared, as what each does and leaves undone."""

from __future__ import annotations

from dataclasses import dataclass, replace

REPLAY = 0.2  # share of the old rows that a training repeats, for all policies alike


@dataclass(frozen=True)
class Policy:
    """A way to run the loop; `told` is its line in the table."""

    name: str
    told: str
    weekly: bool = True  # retrain each week, if there are new rows
    drift: bool = False  # retrain when the monitor's decision is to
    admit: str = "all"  # which candidates: "all", "mean" (the better mean wins), "gate"
    rollout: bool = False  # the users' feedback decides step by step, in place of a swap
    checks: bool = False  # of rows and batches, before they are learned
    replay: float = REPLAY
    erasure: bool = False  # an erasure retrains from the base


OURS = Policy(
    "ours",
    "ours: all parts",
    drift=True,
    admit="gate",
    rollout=True,
    checks=True,
    erasure=True,
)
NEVER = Policy("never", "never retrain", weekly=False)
POLICIES = {
    policy.name: policy
    for policy in (
        NEVER,
        Policy("weekly", "weekly, no gate"),
        Policy("mean", "weekly, the better mean wins", admit="mean"),
        Policy("drift", "on drift alone, no gate", weekly=False, drift=True),
        OURS,
        replace(OURS, name="no-gate", told="ours without the gate", admit="all"),
        replace(OURS, name="no-rollout", told="ours without the rollout", rollout=False),
        replace(OURS, name="no-replay", told="ours without replay", replay=0.0),
        replace(OURS, name="no-checks", told="ours without checks of rows", checks=False),
        replace(OURS, name="no-monitor", told="ours without the monitor", drift=False),
        replace(OURS, name="no-erasure", told="ours without erasure from the base", erasure=False),
    )
}
