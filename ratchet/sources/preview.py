"""Show rows as the model will see them: tokens, and which of them are learned.

Rows pass preparation's checks first, so that a preview shows what these change or refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import Example, RowError, count_reasoned, tool_names
from ratchet.data.validation import Origin, Validator
from ratchet.errors import RatchetError
from ratchet.models.chat_template import ChatFormat

if TYPE_CHECKING:
    from rich.text import Text

ROWS = 5
# Neighbouring tokens alternate between two styles, so that the end of each is visible.
LEARNED, GIVEN = ("black on green", "black on bright_green"), ("default on grey19", "default on grey30")
UNFINISHED = "\ufffd"  # what a tokenizer decodes from a part of a character


class Piece(NamedTuple):
    """A token, or as many as one character needs: its text, and whether it is learned."""

    text: str
    learned: bool


class Preview(NamedTuple):
    """A row with its tokens; `pieces` is empty where there is no base to tokenize with.

    `reasoning` tells what becomes of the row's reasoning, where it has some.
    """

    example: Example
    pieces: list[Piece]
    tokens: int = 0
    learned: int = 0
    reasoning: str = ""


def preview_rows(
    lines: Iterable[bytes], origin: Origin, config: PrepareConfig, chat: ChatFormat | None
) -> list[Preview]:
    """Return the first ROWS rows that pass the checks."""
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
    reasoning = tell_reasoning(chat) if count_reasoned([example]) else ""
    if chat is None:
        return Preview(example, [], reasoning=reasoning)
    try:
        encoded = chat.encode(example)
    except RatchetError:  # the template cannot write its tools or calls, which the check tells
        return Preview(example, [], reasoning=reasoning)
    learned = [example.desirable and each for each in encoded.learned]
    return Preview(example, _pieces(encoded.ids, learned, chat), len(encoded.ids), sum(learned), reasoning)


def tell_reasoning(chat: ChatFormat | None) -> str:
    """Say what becomes of rows' reasoning."""
    return chat.told_reasoning if chat else "learned or left out, as `base.reasoning` says"


def _pieces(ids: list[int], learned: list[bool], chat: ChatFormat) -> list[Piece]:
    """Decode token by token; tokens of one character are decoded together, since each alone is no text."""
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


# --- on the screen ------------------------------------------------------------------------------------------


def as_plain(rows: list[Preview]) -> list[dict[str, Any]]:
    """Return a preview as values for JSON."""
    return [
        {
            "messages": [
                {"role": message.role, "content": message.content}
                | ({"reasoning_content": message.reasoning} if message.reasoning else {})
                for message in row.example.messages
            ],
            "tokens": [[piece.text, piece.learned] for piece in row.pieces],
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
            shown = _coloured(row.pieces) if console.color_system else _bracketed(row.pieces)
            console.print(shown, markup=False)
        if row.example.tools and not row.pieces:
            console.print(f"tools: {', '.join(sorted(tool_names(row.example.tools)))}", markup=False)
        for message in () if row.pieces else row.example.messages:
            if message.reasoning:
                console.print(f"{message.role} reasons: {_printable(message.reasoning)}", markup=False)
            unlearned = "" if message.learned else " (not learned)"
            console.print(f"{message.role}{unlearned}: {_printable(message.text)}", markup=False)
        if row.example.rejected:
            console.print(f"worse answer: {_printable(row.example.rejected.text)}", markup=False)
    if reasoned := [row.reasoning for row in rows if row.reasoning]:
        said = f"{len(reasoned)} of these {len(rows)} rows have reasoning: {reasoned[0]}"
        console.print(said, markup=False)


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
