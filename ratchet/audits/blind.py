"""Ask rows with pictures again, blind: without their pictures, and with those of another row.

A model that looks at pictures answers worse then. One that does not look has learned from the text alone, and
what it says of a new picture is a guess.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import pandas as pd

from ratchet.data.examples import MEDIA_MARK, Example, Message, normalise

KINDS = ("without", "another")  # without pictures; with another row's


class Blind(NamedTuple):
    """A row as it is asked, the id of the row that it was made from, and how it was made."""

    row: Example
    of: str
    kind: str


def make_blind(rows: Sequence[Example], most: int) -> list[Blind]:
    """Make both kinds from the `most` rows with pictures that have the smallest ids.

    Another row's pictures are those of the next row with as many, all of them different; a row for which
    there is none gets only the first kind, and a question that is nothing but pictures only the second.
    """
    shown = sorted((row for row in rows if row.media), key=lambda row: row.id)
    alike: dict[int, list[Example]] = defaultdict(list)
    for row in shown:
        alike[len(row.media)].append(row)
    found = []
    for row in shown[:most]:
        if bare := _without(row):
            found.append(Blind(bare, row.id, "without"))
        others = alike[len(row.media)]
        place = next(index for index, other in enumerate(others) if other.id == row.id)
        turned = others[place + 1 :] + others[:place]
        if other := next((one for one in turned if set(one.media).isdisjoint(row.media)), None):
            found.append(Blind(_with(row, other.media), row.id, "another"))
    return found


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
    of, kinds = [one.of for one in blind], [one.kind for one in blind]
    return pd.concat([frame.assign(of=of, how=kinds) for frame in frames], ignore_index=True)
