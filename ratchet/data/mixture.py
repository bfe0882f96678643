"""Choose the rows of a training: new ones, a replayed share of the old, and a limited share of feedback.

`train.replay` does not guarantee rows other than feedback: with `replay: 0`, a training could see nothing but
a batch of feedback. So the share of feedback (`train.max_feedback_share`) is limited last: other rows are
added first, and feedback is left out only where they do not suffice.
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
    """Return the name, without extension, of the file of answers not to give that belongs to a split."""
    return f"undesirable_{split}"


class Mixture(NamedTuple):
    """The rows to train on, in the order in which they came; `left_out` counts feedback above its share."""

    rows: list[Example]
    feedback: int
    left_out: int


def mix_rows(rows: list[Example], seen: set[str], config: TrainConfig) -> Mixture:
    """Choose from the training split; `seen` names the batches that the champion has learned."""
    wanted = choose_rows(rows, seen, config)
    chosen = limit_feedback(rows, wanted, config.max_feedback_share)
    asked, taken = (sum(is_feedback(row.meta) for row in some) for some in (wanted, chosen))
    return Mixture(chosen, taken, asked - taken)


def feedback_room(train: Sequence[Example], share: float) -> int | None:
    """Return how many feedback rows a batch may add to the training split; None: `share` sets no limit.

    Ingest uses it, so that no batch brings rows that every training would leave out.
    """
    clean = sum(not is_feedback(row.meta) for row in train)
    return max(0, room_for(clean, share) - (len(train) - clean)) if share < 1 else None


def is_feedback(meta: Meta) -> bool:
    """Tell by the row's own `kind` too: feedback that was exported and ingested as a file is feedback."""
    return "feedback" in (meta.get("source"), meta.get("kind"))


def choose_rows(rows: list[Example], seen: set[str], config: TrainConfig) -> list[Example]:
    """Choose all new rows and the replayed share of the old, by id, so that the choice is stable."""
    if config.rows == "all" or config.start_from == "base":
        return rows
    # Ids are reversed: their first digits decide the split, so they are not evenly spread within a split.
    old = sorted((row for row in rows if row.meta["batch"] in seen), key=lambda row: row.id[::-1])
    replayed = {row.id for row in old[: round(config.replay * len(old))]}
    return [row for row in rows if row.meta["batch"] not in seen or row.id in replayed]


def limit_feedback(rows: list[Example], chosen: list[Example], share: float) -> list[Example]:
    """Return `chosen`, a part of `rows`, with feedback limited to the share `share`.

    Other rows are added first; then the newest feedback is kept, chosen by id within a batch.
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
    """Return how many feedback rows may accompany `clean` other rows."""
    part = _exact(share)
    return math.floor(clean * part / (1 - part))


def _clean_for(taught: int, share: float) -> int:
    part = _exact(share)
    return math.ceil(taught * (1 - part) / part)


def _exact(share: float) -> Fraction:
    """Return the decimal as it was written: 3 * (1 - 0.2) / 0.2 is a little over 12 in floating point."""
    return Fraction(str(share))


# --- preferences --------------------------------------------------------------------------------------------


class Paired(NamedTuple):
    """`rows` have a worse answer in `rejected` if there is one; `unpaired` have no better answer."""

    rows: list[Example]
    unpaired: list[Example]


def read_undesirable(prepared: Path, split: str) -> list[Example]:
    """Read the answers not to give that belong to a split; older releases wrote no such file."""
    path = prepared / f"{undesirable(split)}.jsonl"
    return list(read_examples(path)) if path.exists() else []


def pair_up(rows: Sequence[Example], bad: Sequence[Example]) -> Paired:
    """Pair each answer not to give with a good answer to the same prompt; several good ones take turns.

    A row that already has a worse answer keeps it; the new pair is added as a further row.
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
