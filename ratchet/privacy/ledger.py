"""Keep what each training has spent of its rows' privacy: `reports/privacy.json`, which is in git.

An entry holds the mechanism of a training and the batches whose rows it used, replayed rows included, so that
any set of trainings can be accounted for together, by composition. Every training that wrote a candidate
counts, whether or not the gate let it pass: a refused candidate is in DVC's cache and in MLflow all the same.
A batch counts as a whole, even if only a share of its rows was replayed.

The file is no dependency of the stage `train`: it decides whether a training may start, never what comes of
it, and would make each training stale by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.training import PrivacyConfig
from ratchet.errors import DataError, RatchetError
from ratchet.files import read_json, write_json
from ratchet.privacy.accountant import Mechanism, epsilon_of

FILE = Path("reports/privacy.json")
SLACK = 1e-6  # relative: the sum of what was allowed is no overspending


class Spending(msgspec.Struct, frozen=True):
    """One training: what was released, how it was noised, and whose rows it used."""

    run_key: str
    adapter_sha256: str
    mechanism: Mechanism
    epsilon: float  # of this training alone
    delta: float
    unit: str  # "row" or "user"
    units: int  # rows or users
    batches: list[str]


class Promise(Spending, frozen=True, kw_only=True):
    """What a version's manifest says of its training's privacy.

    `epsilon_together` is what the rows that have spent most have spent with this training. `moved` is the
    length of what the training changed in the weights that were written.
    """

    max_grad_norm: float
    epsilon_together: float
    moved: float

    @property
    def told(self) -> str:
        earlier = self.epsilon_together > self.epsilon * (1 + SLACK)
        together = f", ε = {self.epsilon_together:.3g} with earlier trainings" if earlier else ""
        return (
            f"ε = {self.epsilon:g}, δ = {self.delta:g} for each of {self.units:,} {self.unit}s{together} "
            f"({self.mechanism.told})"
        )


class Spent(NamedTuple):
    """What the trainings on a batch have spent of its rows' privacy, together."""

    batch: str
    trainings: int
    epsilon: float


def read_spendings(path: Path) -> list[Spending]:
    """Return the trainings in the ledger, the oldest first; none without a file. Raises RatchetError."""
    if not path.exists():
        return []
    try:
        return msgspec.convert(read_json(path)["trainings"], list[Spending])
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise RatchetError(
            f"{path} is no ledger of ε: {error}", remedy=f"git checkout HEAD -- {FILE}; trainings write it"
        ) from None


def add_spending(path: Path, spending: Spending) -> bool:
    """Add a training to the ledger unless these very weights are in it; return whether it was added."""
    known = read_spendings(path)
    if any(entry.adapter_sha256 == spending.adapter_sha256 for entry in known):
        return False
    write_json(path, {"trainings": msgspec.to_builtins([*known, spending])})
    return True


def spent_by_batch(
    spendings: Sequence[Spending], delta: float, names: Iterable[str] = (), *, unit: str = "row"
) -> list[Spent]:
    """Return what was spent of each batch in the ledger and of those in `names`, by name.

    A user may have rows in any batch, so with `unit` "user" all trainings count for each.
    """
    composed: dict[tuple[Mechanism, ...], float] = {}
    found = []
    for batch in sorted({*names, *(batch for entry in spendings for batch in entry.batches)}):
        mechanisms = _mechanisms(spendings, batch, unit)
        if mechanisms not in composed:
            composed[mechanisms] = epsilon_of(mechanisms, delta)
        found.append(Spent(batch, len(mechanisms), composed[mechanisms]))
    return found


def _mechanisms(spendings: Sequence[Spending], batch: str, unit: str) -> tuple[Mechanism, ...]:
    return tuple(entry.mechanism for entry in spendings if unit == "user" or batch in entry.batches)


def check_budget(
    spendings: Sequence[Spending], planned: Mechanism, batches: Sequence[str], privacy: PrivacyConfig
) -> float:
    """Return the most ε that a batch's rows have spent after the planned training.

    Raises DataError, with the arithmetic, if that is over the budget of any batch; or if users are to be
    protected and an earlier training protected rows only, whose ε bounds nothing for users.
    """
    assert privacy.epsilon
    rows_only = sum(entry.unit != "user" for entry in spendings)
    if privacy.unit == "user" and rows_only:
        raise DataError(
            f"`train.privacy.unit` is user, and {rows_only} earlier trainings protected single rows: what "
            "they have spent of a user is not bounded",
            remedy="set `train.privacy.unit: row`, or begin a project with rows that were never trained on",
        )
    before = {
        entry.batch: entry for entry in spent_by_batch(spendings, privacy.delta, batches, unit=privacy.unit)
    }
    composed: dict[tuple[Mechanism, ...], float] = {}
    for batch in batches:
        past = _mechanisms(spendings, batch, privacy.unit)
        if past not in composed:
            composed[past] = epsilon_of([*past, planned], privacy.delta)
        if (after := composed[past]) > privacy.most * (1 + SLACK):
            alone, key = epsilon_of([planned], privacy.delta), "budget" if privacy.budget else "epsilon"
            raise DataError(
                f"this training would overspend the privacy of {batch}: {before[batch].trainings} trainings "
                f"have spent ε = {before[batch].epsilon:.3f}, this one ({planned.told}) spends "
                f"{alone:.3f}, together {after:.3f} with δ = {privacy.delta:g}; "
                f"`train.privacy.{key}` is {privacy.most:g}",
                remedy="leave those rows out (`train.rows: new_and_replay`, `train.replay: 0`), lower "
                "`train.privacy.epsilon`, or raise `train.privacy.budget`: see `ratchet privacy`",
            )
    return max(composed.values(), default=0.0)
