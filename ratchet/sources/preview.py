"""Show rows as the model will see them: tokens, and which of them are learned.

Rows come after preparation's checks, so that what these change or refuse is seen as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import Example, RowError
from ratchet.data.validation import Origin, Validator
from ratchet.models.chat_template import ChatFormat

ROWS = 5
UNFINISHED = "\ufffd"  # what a decoder gives for a part of a character


class Piece(NamedTuple):
    """A token, or as many as one character needs: its text, and whether it is learned."""

    text: str
    learned: bool


class Preview(NamedTuple):
    """A row; `pieces` are empty where no base is there to make tokens."""

    example: Example
    pieces: list[Piece]
    tokens: int = 0
    learned: int = 0


def preview_rows(
    lines: Iterable[bytes], origin: Origin, config: PrepareConfig, chat: ChatFormat | None
) -> list[Preview]:
    """Return the first rows that are fit."""
    validator, found = Validator(config), list[Preview]()
    for line in lines:
        try:
            found.append(_preview(validator.check(line, origin).example, chat))
        except RowError:
            continue
        if len(found) == ROWS:
            break
    return found


def _preview(example: Example, chat: ChatFormat | None) -> Preview:
    if chat is None:
        return Preview(example, [])
    encoded = chat.encode(example)
    return Preview(
        example, _pieces(encoded.ids, encoded.learned, chat), len(encoded.ids), sum(encoded.learned)
    )


def _pieces(ids: list[int], learned: list[bool], chat: ChatFormat) -> list[Piece]:
    """Decode token by token; those of one character together, since each alone is no text."""
    pieces: list[Piece] = []
    waiting: list[int] = []
    for place, (token, is_learned) in enumerate(zip(ids, learned, strict=True)):
        waiting.append(token)
        text = str(chat.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        last = place + 1 == len(ids) or learned[place + 1] != is_learned
        if last or not text.endswith(UNFINISHED):
            pieces.append(Piece(text, is_learned))
            waiting = []
    return pieces
