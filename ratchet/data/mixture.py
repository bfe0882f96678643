"""Choose the rows of a training: new ones, a replayed share of the old, and a limited share of feedback.

`train.replay` alone does not see to clean rows: with `replay: 0` a batch of feedback would be trained on by
itself. So the share of feedback (`train.max_feedback_share`) is decided last, and other rows are added before
feedback is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.training import TrainConfig
from ratchet.data.examples import Example, Meta, prompt_key, read_examples


def undesirable(split: str) -> str:
    """Name the file of answers not to give that stands beside a split, without its ending."""
    return f"undesirable_{split}"


class Mixture(NamedTuple):
    """The rows to train on, in the order in which they came; `left_out` counts feedback over its share."""

    rows: list[Example]
    feedback: int
    left_out: int


def mix_rows(rows: list[Example], seen: set[str], config: TrainConfig) -> Mixture:
    """Choose of the training split; `seen` names the batches that the champion has learned."""
    wanted = choose_rows(rows, seen, config)
    chosen = limit_feedback(rows, wanted, config.max_feedback_share)
    asked, taken = (sum(is_feedback(row.meta) for row in some) for some in (wanted, chosen))
    return Mixture(chosen, taken, asked - taken)


def feedback_room(train: Sequence[Example], share: float) -> int | None:
    """Count the feedback rows that a batch may bring beside the training split; None: `share` sets no limit.

    Ingest asks, so that no batch brings rows that every training would leave out.
    """
    clean = sum(not is_feedback(row.meta) for row in train)
    return max(0, room_for(clean, share) - (len(train) - clean)) if share < 1 else None


def is_feedback(meta: Meta) -> bool:
    """Tell by the row's own word too: a batch that was taken out and came back as a file is feedback."""
    return "feedback" in (meta.get("source"), meta.get("kind"))


def choose_rows(rows: list[Example], seen: set[str], config: TrainConfig) -> list[Example]:
    """Choose the rows of new batches and the replayed share of the old, by id, so that it is stable."""
    if config.rows == "all" or config.start_from == "base":
        return rows
    # Ids read from behind: their first digits decide the split, so those of one split are not spread evenly.
    old = sorted((row for row in rows if row.meta["batch"] in seen), key=lambda row: row.id[::-1])
    replayed = {row.id for row in old[: round(config.replay * len(old))]}
    return [row for row in rows if row.meta["batch"] not in seen or row.id in replayed]


def limit_feedback(rows: list[Example], chosen: list[Example], share: float) -> list[Example]:
    """Bring feedback in `chosen`, a part of `rows`, to at most `share`.

    Other rows are added first; then the newest feedback is kept, by hash within a batch.
    """
    taught = [row for row in chosen if is_feedback(row.meta)]
    if not taught or share >= 1:
        return chosen
    clean = {row.id for row in chosen if not is_feedback(row.meta)}
    if share > 0:
        spare = (row.id for row in rows if row.id not in clean and not is_feedback(row.meta))
        missing = max(0, _clean_for(len(taught), share) - len(clean))
        clean.update(sorted(spare, key=lambda id: id[::-1])[:missing])
    newest = sorted(taught, key=lambda row: (str(row.meta["batch"]), row.id[::-1]), reverse=True)
    kept = {row.id for row in newest[: room_for(len(clean), share)]}
    return [row for row in rows if row.id in clean or row.id in kept]


def room_for(clean: int, share: float) -> int:
    """Count the feedback rows that may stand beside `clean` others."""
    part = _exact(share)
    return math.floor(clean * part / (1 - part))


def _clean_for(taught: int, share: float) -> int:
    part = _exact(share)
    return math.ceil(taught * (1 - part) / part)


def _exact(share: float) -> Fraction:
    """Take 0.1 as it was written: (1 - 0.1) / 0.1 is a little over 9 in floating point."""
    return Fraction(str(share))


# --- preferences --------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """Rows whose `rejected` is a worse answer, or that have none; and answers without a better one."""

    rows: list[Example]
    unpaired: list[Example]


def read_undesirable(prepared: Path, split: str) -> list[Example]:
    """Read the answers not to give that stand beside a split; releases before this one wrote none."""
    path = prepared / f"{undesirable(split)}.jsonl"
    return list(read_examples(path)) if path.exists() else []


def pair_up(rows: Sequence[Example], bad: Sequence[Example]) -> Paired:
    """Join each answer not to give with a good answer to the same prompt, in turn where there are several.

    A row with a worse answer of its own stays as it is, and may make a second pair.
    """
    good: dict[int, list[int]] = {}
    if bad:
        for place, row in enumerate(rows):
            good.setdefault(prompt_key(row), []).append(place)
    paired, more, unpaired = list(rows), list[Example](), list[Example]()
    for row in bad:
        places = good.get(prompt_key(row), [])
        if not places:
            unpaired.append(row)
            continue
        places.append(place := places.pop(0))
        pair = msgspec.structs.replace(rows[place], rejected=row.messages[-1])
        if paired[place].rejected is None:
            paired[place] = pair
        else:
            more.append(pair)
    return Paired([*paired, *more], unpaired)
