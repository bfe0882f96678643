"""The options of commands that read files of rows, and the preview of such rows on the screen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from ratchet.config.params import Config
    from ratchet.sources.preview import Piece
    from ratchet.sources.preview import Preview as Row

Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="KEY=COLUMN,…",
        help="Which column is which key of a form, such as prompt=text,completion=category; '' for none.",
    ),
]
Query = Annotated[
    str | None, typer.Option("--query", metavar="SQL", help="The SELECT, where the rows are a database's.")
]
Preview = Annotated[
    bool,
    typer.Option("--preview", help="Show five rows as the model will see them: tokens, and what is learned."),
]
# Neighbouring tokens take turns, so that one sees where each ends.
LEARNED, GIVEN = ("black on green", "black on bright_green"), ("default on grey19", "default on grey30")


def read_mapping(columns: str | None) -> dict[str, str] | None:
    """Read `--columns`; None where it was not given. Raises UserError."""
    from ratchet.sources.columns import parse_columns

    return None if columns is None else parse_columns(columns)


def with_columns(config: Config, columns: str | None) -> Config:
    """Put `--columns` in the place of `ingest.columns`. Raises UserError."""
    if (mapping := read_mapping(columns)) is None:
        return config
    ingest = config.ingest.model_copy(update={"columns": mapping})
    return config.model_copy(update={"ingest": ingest})


def as_plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Make JSON of a preview."""
    return [
        {
            "messages": [
                {"role": message.role, "content": message.content} for message in row.example.messages
            ],
            "tokens": [[piece.text, piece.learned] for piece in row.pieces],
        }
        for row in rows
    ]


def print_preview(rows: list[Row]) -> None:
    """Print rows; learned text is green, or in [[ ]] where there are no colours."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    for number, row in enumerate(rows, start=1):
        if not row.pieces:
            console.print(f"--- row {number}", markup=False)
            for message in row.example.messages:
                console.print(f"{message.role}: {_printable(message.content)}", markup=False)
            continue
        console.print(f"--- row {number}: {row.tokens} tokens, {row.learned} of them learned", markup=False)
        console.print(_coloured(row.pieces) if console.color_system else _bracketed(row.pieces), markup=False)


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
    """Escape what could steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
