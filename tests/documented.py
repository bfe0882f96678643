"""Find the commands that README.md and docs/ tell people to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md")])
FENCE = re.compile(r"^( *)```(\w*)\s*$")
SHELLS = ("console", "bash", "sh", "shell")
ENDS = {"&&", "||", ";", "|", "&"}
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


class Command(NamedTuple):
    """One simple command: its words, and where it stands."""

    words: tuple[str, ...]
    place: str


def find_commands() -> list[Command]:
    return [
        command
        for page in PAGES
        for number, line in _typed_lines(page.read_text(encoding="utf-8"))
        for command in _split(line, f"{page.relative_to(ROOT)}:{number}")
    ]


def _typed_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of each command line in a block; continued lines are joined.

    In a block `console` the lines after `$ ` are typed, and the rest is output. Indented blocks count where
    they stand after an empty line and not in a list.
    """
    lines = text.split("\n")
    shell, before = "", ""
    held: tuple[int, str] | None = None
    for number, line in enumerate(lines, start=1):
        if fence := FENCE.match(line):
            shell = "" if shell else fence[2] or "text"
        elif shell in SHELLS or (not shell and _is_indented(line, before)):
            typed = line.strip()
            if held:
                typed = held[1] + " " + typed
            elif shell == "console":
                if not typed.startswith("$ "):
                    continue
                typed = typed[2:]
            start = held[0] if held else number
            more = typed.endswith("\\") or _is_open(typed)
            held = (start, typed.removesuffix("\\")) if more else None
            if not held:
                yield start, typed
        before = line


def _is_open(typed: str) -> bool:
    """Return whether a quote begins that a later line closes."""
    try:
        shlex.split(typed, comments=True)
    except ValueError:
        return True
    return False


def _is_indented(line: str, before: str) -> bool:
    return line.startswith("    ") and (not before.strip() or before.startswith("    ")) and "`" not in line


def _split(line: str, place: str) -> Iterator[Command]:
    """Yield the simple commands of a line, without comments, assignments and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&")
    lexer.whitespace_split = True
    part: list[str] = []
    for word in [*lexer, ";"]:
        word = word.removeprefix("(")
        if word in ENDS:
            while part and (ASSIGNMENT.match(part[0]) or part[0] in ("export", "sudo", "do")):
                part = part[1:]
            if part and part[0] not in ("for", "done"):
                yield Command(tuple(part), place)
            part = []
        else:
            part.append(word)
