"""Put packed windows into batches: whole, or as single rows in groups of similar length."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ratchet.models.generation import Inputs, no_inputs
from ratchet.privacy.accountant import Mechanism
from ratchet.privacy.noise import draw_units
from ratchet.training.packing import (
    FOLLOWS,
    IGNORED,
    TOKEN_COLUMNS,
    Role,
    Window,
    by_length,
    group_rows,
    rows_of,
)
from ratchet.training.schedule import Schedule

# Ids and positions of packed windows, (batch, seq) each, and what the model takes of pictures → positions.
Place = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def as_they_are(
    ids: torch.Tensor, positions: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the positions that a model of text takes."""
    return positions


class WindowCollator:
    """Pad a batch to its longest window; each padding token is its own row (position 0), without loss.

    `place` gives the positions as the model takes them: see `ratchet.models.cache.place_rows`.
    """

    def __init__(self, pad_id: int, inputs: Inputs = no_inputs, place: Place = as_they_are) -> None:
        self._fill = ([pad_id], [IGNORED], [0])
        self._inputs, self._place = inputs, place

    def __call__(self, windows: Sequence[Window]) -> dict[str, torch.Tensor]:
        length = max(len(window.input_ids) for window in windows)
        columns = {}
        for name, fill in zip(TOKEN_COLUMNS, self._fill, strict=True):
            columns[name] = torch.tensor(
                [getattr(window, name) + fill * (length - len(window.input_ids)) for window in windows]
            )  # (batch, seq)
        ids = columns["input_ids"]
        more = self._inputs([window.media for window in windows], ids)
        return columns | more | {"position_ids": self._place(ids, columns["position_ids"], more)}


class RowCollator:
    """Pad one group of rows on the right, and add an attention mask, and the inputs for their pictures."""

    def __init__(self, pad_id: int, inputs: Inputs = no_inputs) -> None:
        self._pad_id, self._inputs = pad_id, inputs

    def __call__(self, groups: Sequence[list[Window]]) -> dict[str, torch.Tensor]:
        (rows,) = groups
        length = max(len(row.input_ids) for row in rows)
        missing = [length - len(row.input_ids) for row in rows]
        columns = {
            "input_ids": [
                row.input_ids + [self._pad_id] * short for row, short in zip(rows, missing, strict=True)
            ],
            "labels": [row.labels + [IGNORED] * short for row, short in zip(rows, missing, strict=True)],
            "attention_mask": [[1] * (length - short) + [0] * short for short in missing],
        }
        found = {name: torch.tensor(column) for name, column in columns.items()}  # (batch, seq)
        found |= self._inputs([row.media for row in rows], found["input_ids"])
        return found | preference_columns(rows) if rows[0].roles else found


def preference_columns(rows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Return the columns that a loss on preferences reads in addition to the tokens, (batch,) each.

    The Trainer counts the entries of `shift_labels` that are not IGNORED: one for each unit with something to
    learn, so that a step's loss is a mean over units instead of tokens.
    """
    roles = torch.tensor([row.roles[0] for row in rows])
    counts = [
        row.roles[0] not in FOLLOWS and any(label != IGNORED for label in row.labels[1:]) for row in rows
    ]
    return {
        "roles": roles,
        "references": torch.tensor([row.references[0] if row.references else 0.0 for row in rows]),
        "shift_labels": torch.where(torch.tensor(counts), roles, IGNORED),
    }


class Batches(NamedTuple):
    """What the Trainer iterates over. An item is a window, or a group of rows of similar length."""

    train: list[Any]
    validation: list[Any]
    items: int  # windows or groups in one forward pass
    longest: int  # the most tokens that attention sees at once
    density: float  # learned tokens (units, for preferences) per item of the validation set
    collate: Callable[[Any], dict[str, torch.Tensor]]


def make_batches(
    windows: Sequence[Window],
    validation: Sequence[Window],
    batch_windows: int,
    *,
    accumulate: int,
    pad_id: int,
    apart: bool | None,
    inputs: Inputs = no_inputs,
    place: Place = as_they_are,
) -> Batches:
    """Make batches; every optimizer step gets equally many forward passes, for processes to share."""
    judged = holds_judged(windows)
    learned = sum(
        sum(role not in FOLLOWS for role in window.roles)
        if judged
        else sum(label != IGNORED for label in window.labels)
        for window in validation
    )
    fill: Any = Window([pad_id], [IGNORED], [0], [Role.PLAIN] if judged else ())
    train: list[Any] = list(windows)
    held_out: list[Any] = list(validation)
    items, longest = batch_windows, max(len(window.input_ids) for window in windows)
    collate: Callable[[Any], dict[str, torch.Tensor]] = WindowCollator(pad_id, inputs, place)
    if goes_apart([*windows, *validation], apart):
        train = group_rows(windows, batch_windows)
        held_out = group_rows(validation, batch_windows) if validation else []
        items, longest = 1, max(window.position_ids[-1] + 1 for window in windows)
        fill, collate = [fill], RowCollator(pad_id, inputs)
    if accumulate > 1:  # the last forward passes may hold only padding
        train += [fill] * (-len(train) % (items * accumulate))
    return Batches(train, held_out, items, longest, learned / (len(held_out) or 1), collate)


class Private(NamedTuple):
    """What a training with differential privacy adds: its mechanism, the clipping norm, and the secret key.

    `units` are what is drawn and clipped as one: single rows, or all rows of a user.
    """

    mechanism: Mechanism
    max_grad_norm: float
    key: bytes
    units: Sequence[list[Window]]

    @property
    def units_a_step(self) -> float:
        """The mean number of units of a step; the true number would tell whether one was there."""
        return self.mechanism.sampling_rate * len(self.units)


def draw_batches(
    batches: Batches, windows: Sequence[Window], private: Private, schedule: Schedule
) -> Batches:
    """Replace the training items by the numbers of the steps, whose rows are drawn as they are collated.

    A step's batch is its number, and forward passes of rows of similar length, each with the numbers of the
    units of its rows; a unit is in one pass.
    """
    units = private.units
    room = schedule.batch_windows * max(len(window.input_ids) for window in windows)  # tokens

    def collate(items: Sequence[Any]) -> dict[str, Any]:
        if not isinstance(items[0], int):
            return batches.collate(items)  # validation
        drawn = draw_units(private.key, items[0], len(units), private.mechanism.sampling_rate)
        unit_of = {id(row): unit for unit in drawn for row in units[unit]}
        passes = []
        for group in by_length([units[unit] for unit in drawn], room):
            owners = [unit_of[id(row)] for row in group]
            numbers = {unit: number for number, unit in enumerate(dict.fromkeys(owners))}
            members = torch.tensor([numbers[unit] for unit in owners])  # (rows,)
            passes.append((batches.collate([group]), members))
        return {"number": items[0], "passes": passes}

    return batches._replace(train=list(range(schedule.steps)), items=1, collate=collate)


def rows_apart(windows: Sequence[Window]) -> list[Window]:
    """Return the rows of all windows, one by one."""
    return [row for window in windows for row in rows_of(window)]


def by_user(rows: Sequence[Window], most: int) -> list[list[Window]]:
    """Return the rows of each user, `most` of them at most.

    Which ones depends on these rows alone: other users' must not change what is computed of a user.
    """
    users: dict[int, list[Window]] = {}
    for row in rows:
        (owner,) = row.owners
        users.setdefault(owner, []).append(row)
    return [sorted(owned, key=_digest)[:most] for owned in users.values()]


def _digest(row: Window) -> bytes:
    return hashlib.sha256(repr(row.input_ids).encode()).digest()


def count_batches(windows: Sequence[Window], batch_windows: int, *, apart: bool | None = None) -> int:
    """Count the forward passes of an epoch."""
    if goes_apart(windows, apart):
        return len(group_rows(windows, batch_windows))
    return math.ceil(len(windows) / batch_windows)


def holds_judged(windows: Sequence[Window]) -> bool:
    """Tell whether preferences are learned from these windows."""
    return any(window.roles for window in windows)


def goes_apart(windows: Sequence[Window], apart: bool | None) -> bool:
    """Tell whether rows are batched singly: compared rows always are; None: if it is faster."""
    return holds_judged(windows) or (is_faster_apart() if apart is None else apart)


def holds_pictures(windows: Sequence[Window]) -> bool:
    """Tell whether any row of these windows shows a picture."""
    return any(window.media for window in windows)


def is_faster_apart() -> bool:
    """Tell whether single rows are faster than windows, as they are on a CPU (docs/lab-notes.md)."""
    return not torch.cuda.is_available()
