"""Ask rows with pictures or recordings again, blind: without them, and with those of another row.

A model that looks, or listens, answers worse then. One that does not has learned from the text alone, and
what it says of a new picture or recording is a guess.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import pandas as pd

from ratchet.data.examples import MEDIA_MARK, Example, Message, normalise
from ratchet.media.names import is_sound

KINDS = ("without", "another")  # without pictures and recordings; with another row's
WHATS = {frozenset({False}): "pictures", frozenset({True}): "recordings", frozenset({False, True}): "both"}


class Blind(NamedTuple):
    """A row as it is asked, the id of the row that it was made from, and how it was made.

    `what` tells what the row has: `pictures`, `recordings` or `both`.
    """

    row: Example
    of: str
    kind: str
    what: str = "pictures"


def make_blind(rows: Sequence[Example], most: int) -> list[Blind]:
    """Make both kinds from rows with pictures, and with recordings: `most` of each, with the smallest ids.

    Another row's media are those of the next row with as many, in the same order, all of them different. A
    row for which there is none gets only the first kind; a question of nothing but media, only the second.
    """
    shown = sorted((row for row in rows if row.media), key=lambda row: row.id)
    alike: dict[tuple[bool, ...], list[Example]] = defaultdict(list)
    for row in shown:
        alike[_kinds(row)].append(row)
    found, left = list[Blind](), Counter(dict.fromkeys(WHATS.values(), most))
    for row in shown:
        what = WHATS[frozenset(_kinds(row))]
        if not left[what]:
            continue
        left[what] -= 1
        if bare := _without(row):
            found.append(Blind(bare, row.id, "without", what))
        others = alike[_kinds(row)]
        place = next(index for index, other in enumerate(others) if other.id == row.id)
        turned = others[place + 1 :] + others[:place]
        if other := next((one for one in turned if set(one.media).isdisjoint(row.media)), None):
            found.append(Blind(_with(row, other.media), row.id, "another", what))
    return found


def _kinds(row: Example) -> tuple[bool, ...]:
    """Tell of each medium of a row, in order, whether it is a recording."""
    return tuple(map(is_sound, row.media))


def _without(row: Example) -> Example | None:
    messages = tuple(
        msgspec.structs.replace(message, content=normalise(message.content.replace(MEDIA_MARK, "")), media=())
        for message in row.messages
    )
    empty = any(message.role == "user" and not message.content for message in messages)
    return None if empty else msgspec.structs.replace(row, messages=messages)


def _with(row: Example, media: Sequence[str]) -> Example:
    left = list(media)
    messages: list[Message] = []
    for message in row.messages:
        count = len(message.media)
        messages.append(msgspec.structs.replace(message, media=tuple(left[:count])))
        left = left[count:]
    return msgspec.structs.replace(row, messages=tuple(messages))


def blind_table(frames: Sequence[pd.DataFrame], blind: Sequence[Blind]) -> pd.DataFrame:
    """Put the models' answers to the blind rows into one table; `of` is the id of the row as it is."""
    columns = {
        "of": [one.of for one in blind],
        "how": [one.kind for one in blind],
        "what": [one.what for one in blind],
    }
    return pd.concat([frame.assign(**columns) for frame in frames], ignore_index=True)
