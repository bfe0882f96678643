"""Show rows as the model will see them: tokens, and which of them are learned.

Rows pass preparation's checks first, so that a preview shows what these change or refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import MEDIA_MARK, Example, RowError, count_reasoned, tool_names
from ratchet.data.validation import Origin, Validator
from ratchet.errors import RatchetError
from ratchet.media.names import is_sound, kind_of
from ratchet.media.pictures import size_of
from ratchet.media.sounds import length_of
from ratchet.models.chat_template import ChatFormat, Encoded

if TYPE_CHECKING:
    from rich.text import Text

ROWS = 5
SHOWN = 12  # digits of a picture's name
# Neighbouring tokens alternate between two styles, so that the end of each is visible.
LEARNED, GIVEN = ("black on green", "black on bright_green"), ("default on grey19", "default on grey30")
PICTURE = -1  # in place of the tokens of a picture
UNFINISHED = "\ufffd"  # what a tokenizer decodes from a part of a character


class Piece(NamedTuple):
    """A token, or as many as one character needs: its text, and whether it is learned."""

    text: str
    learned: bool


class Preview(NamedTuple):
    """A row with its tokens; `pieces` is empty where there is no base to tokenize with.

    `reasoning` tells what becomes of the row's reasoning, where it has some; `pictures` are shown in place of
    MEDIA_MARKs.
    """

    example: Example
    pieces: list[Piece]
    tokens: int = 0
    learned: int = 0
    reasoning: str = ""
    pictures: tuple[str, ...] = ()


def preview_rows(
    lines: Iterable[bytes],
    origin: Origin,
    config: PrepareConfig,
    chat: ChatFormat | None,
    media: Mapping[str, bytes] = MappingProxyType({}),
) -> list[Preview]:
    """Return the first ROWS rows that pass the checks."""
    validator, found = Validator(config), list[Preview]()
    for line in lines:
        try:
            example = validator.check(line, origin).example
            pictures = tuple(_tell_picture(name, media) for name in example.media)
            found.append(_preview(example, chat)._replace(pictures=pictures))
        except RowError:
            continue
        if len(found) == ROWS:
            break
    return found


def _tell_picture(name: str, media: Mapping[str, bytes]) -> str:
    if name not in media:
        size = "missing"
    elif is_sound(name):
        size = f"{length_of(media[name]):.1f} s"
    else:
        size = "{}×{}".format(*size_of(media[name]))
    return f"[{kind_of(name)} {name[:SHOWN]}… {size}]"


def _preview(example: Example, chat: ChatFormat | None) -> Preview:
    reasoning = tell_reasoning(chat) if count_reasoned([example]) else ""
    if chat is None:
        return Preview(example, [], reasoning=reasoning)
    try:
        encoded = chat.encode(example)
    except RatchetError:  # the template cannot write its tools or calls, which the check tells
        return Preview(example, [], reasoning=reasoning)
    learned = sum(encoded.learned) if example.desirable else 0
    ids, marked = _fold_pictures(encoded, chat)
    pieces = _pieces(ids, [example.desirable and each for each in marked], chat)
    return Preview(example, pieces, len(encoded.ids), learned, reasoning)


def _fold_pictures(row: Encoded, chat: ChatFormat) -> tuple[list[int], list[bool]]:
    """Return ids and loss mask of a row with one PICTURE in place of all tokens of a picture."""
    ids, learned, place = list(row.ids), list(row.learned), 0
    for name in row.media:
        assert chat.processor
        tokens = chat.processor.tokens_of(chat.media[name])
        place = next(at for at in range(place, len(ids)) if ids[at : at + len(tokens)] == tokens)
        ids[place : place + len(tokens)] = [PICTURE]
        learned[place : place + len(tokens)] = [False]
        place += 1
    return ids, learned


def tell_reasoning(chat: ChatFormat | None) -> str:
    """Say what becomes of rows' reasoning."""
    return chat.told_reasoning if chat else "learned or left out, as `base.reasoning` says"


def _pieces(ids: list[int], learned: list[bool], chat: ChatFormat) -> list[Piece]:
    """Decode token by token; tokens of one character are decoded together, since each alone is no text."""
    pieces: list[Piece] = []
    waiting: list[int] = []
    for place, (token, is_learned) in enumerate(zip(ids, learned, strict=True)):
        if token == PICTURE:
            pieces.append(Piece(MEDIA_MARK, is_learned))
            continue
        waiting.append(token)
        text = str(chat.tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        last = place + 1 == len(ids) or learned[place + 1] != is_learned or ids[place + 1] == PICTURE
        if last or not text.endswith(UNFINISHED):
            pieces.append(Piece(text, is_learned))
            waiting = []
    return pieces


# --- on the screen ------------------------------------------------------------------------------------------


def as_plain(rows: list[Preview]) -> list[dict[str, Any]]:
    """Return a preview as values for JSON."""
    return [
        {
            "messages": [
                {"role": message.role, "content": content}
                | ({"reasoning_content": message.reasoning} if message.reasoning else {})
                for message, content in zip(row.example.messages, _contents(row), strict=True)
            ],
            "tokens": [[piece.text, piece.learned] for piece in _shown_pieces(row)],
            "reasoning": row.reasoning,
            "worse": row.example.rejected and row.example.rejected.text,
            "desirable": row.example.desirable,
        }
        for row in rows
    ]


def print_preview(rows: list[Preview]) -> None:
    """Print rows; learned text is green, or in [[ ]] where there are no colours."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for number, row in enumerate(rows, start=1):
        tokens = f": {row.tokens} tokens, {row.learned} of them learned" if row.pieces else ""
        console.print(f"--- row {number}{tokens}{_tell_judgement(row.example)}", markup=False)
        if row.pieces:
            pieces = _shown_pieces(row)
            shown = _coloured(pieces) if console.color_system else _bracketed(pieces)
            console.print(shown, markup=False)
        if row.example.tools and not row.pieces:
            console.print(f"tools: {', '.join(sorted(tool_names(row.example.tools)))}", markup=False)
        left = iter(row.pictures)
        for message in () if row.pieces else row.example.messages:
            if message.reasoning:
                console.print(f"{message.role} reasons: {_printable(message.reasoning)}", markup=False)
            unlearned = "" if message.learned else " (not learned)"
            console.print(f"{message.role}{unlearned}: {_printable(_put(message.text, left))}", markup=False)
        if row.example.rejected:
            console.print(f"worse answer: {_printable(row.example.rejected.text)}", markup=False)
    if reasoned := [row.reasoning for row in rows if row.reasoning]:
        said = f"{len(reasoned)} of these {len(rows)} rows have reasoning: {reasoned[0]}"
        console.print(said, markup=False)


def _contents(row: Preview) -> list[str]:
    left = iter(row.pictures)
    return [_put(message.content, left) for message in row.example.messages]


def _shown_pieces(row: Preview) -> list[Piece]:
    left = iter(row.pictures)
    return [piece._replace(text=_put(piece.text, left)) for piece in row.pieces]


def _put(text: str, left: Iterator[str]) -> str:
    """Put the next pictures in place of the marks of a text."""
    first, *rest = text.split(MEDIA_MARK)
    return first + "".join(next(left, "") + part for part in rest)


def _tell_judgement(example: Example) -> str:
    if example.desirable and not example.rejected:
        return ""
    kind = "a pair" if example.rejected else "an answer not to give"
    return f"; {kind}, for `train.objective` dpo or kto"


def _coloured(pieces: list[Piece]) -> Text:
    from rich.text import Text

    text = Text()
    for place, piece in enumerate(pieces):
        text.append(_printable(piece.text), (LEARNED if piece.learned else GIVEN)[place % 2])
    return text


def _bracketed(pieces: list[Piece]) -> str:
    parts, inside = [], False
    for piece in pieces:
        if piece.learned != inside:
            parts.append("[[" if piece.learned else "]]")
            inside = piece.learned
        parts.append(_printable(piece.text))
    return "".join(parts) + ("]]" if inside else "")


def _printable(text: str) -> str:
    """Escape characters that could control the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
