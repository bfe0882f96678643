"""How much of a training may be people's feedback, and that clean rows are always with it.

`replay` alone does not see to that: with `train.replay: 0` a batch of feedback would be trained on by itself.
"""

from __future__ import annotations

import math
from fractions import Fraction

from ratchet.data.examples import Example, Meta


def is_feedback(meta: Meta) -> bool:
    """By its own word as well: a batch that was taken out and came back as a file is still feedback."""
    return "feedback" in (meta.get("source"), meta.get("kind"))


def room_for(clean: int, share: float) -> int:
    """Feedback rows that may stand beside `clean` others."""
    part = _exact(share)
    return math.floor(clean * part / (1 - part))


def limit_feedback(rows: list[Example], chosen: list[Example], share: float) -> list[Example]:
    """`chosen` of `rows`, with feedback at most `share` of it. Other rows are added first; then the newest feedback is kept, by hash within a batch."""
    taught = [row for row in chosen if is_feedback(row.meta)]
    if not taught or share >= 1:
        return chosen
    clean = {row.id for row in chosen if not is_feedback(row.meta)}
    if share > 0:
        spare = sorted(
            (row.id for row in rows if row.id not in clean and not is_feedback(row.meta)),
            key=lambda id: id[::-1],
        )
        clean.update(spare[: max(0, _clean_for(len(taught), share) - len(clean))])
    newest = sorted(taught, key=lambda row: (str(row.meta["batch"]), row.id[::-1]), reverse=True)
    kept = {row.id for row in newest[: room_for(len(clean), share)]}
    return [row for row in rows if row.id in clean or row.id in kept]


def _clean_for(taught: int, share: float) -> int:
    part = _exact(share)
    return math.ceil(taught * (1 - part) / part)


def _exact(share: float) -> Fraction:
    """0.1 as it was written: (1 - 0.1) / 0.1 is a little over 9 in floating point."""
    return Fraction(str(share))
