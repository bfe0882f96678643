"""Write the reference of the command `ratchet` from its code: every command with its arguments and options.

.venv/bin/python docs/reference.py .ratchet/docs/cli.md        # `make docs` runs it
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from ratchet.cli.main import app


def main(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(describe()) + "\n", encoding="utf-8")


def describe() -> Iterator[str]:
    yield "# The command\n"
    yield "Written from the code by `make docs`. Before any command, `-C PATH` works in the checkout at PATH,"
    yield "as git does, and `--debug` shows tracebacks. What an exit code means: "
    yield "[operations.md](operations.md#exit-codes).\n"
    for words, command in commands(get_command(app), ["ratchet"]):
        yield f"## {' '.join(words)}\n"
        yield f"{tidy(command.help or '')}\n"
        known = [one for one in command.params if not one.hidden and one.name != "help"]
        if known:
            yield "| option | what it does | default |\n|---|---|---|"
            yield from (row_of(one) for one in known)
            yield ""


def commands(command: Any, words: list[str]) -> Iterator[tuple[list[str], Any]]:
    """Yield every command that has no commands of its own; hidden ones are old names."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name in command.commands:
        if not command.commands[name].hidden:
            yield from commands(command.commands[name], [*words, name])


def row_of(parameter: Any) -> str:
    metavar = parameter.metavar or ""
    if parameter.param_type_name == "argument":
        name = metavar or parameter.name.upper()
    else:
        name = ", ".join(parameter.opts) + (f" {metavar}" if metavar else "")
    default = parameter.default
    shown = "" if default in (None, "", False, ()) or callable(default) else f"`{default}`"
    return (
        f"| `{name.replace('|', chr(92) + '|')}` | {tidy(getattr(parameter, 'help', '') or '')} | {shown} |"
    )


def tidy(text: str) -> str:
    """Return the text in one line, with the example as code and no open markup."""
    before, example, command = " ".join(text.split()).replace("|", "\\|").partition("Example: ")
    told = before.strip().replace("<", "&lt;").replace("*", "\\*")
    return f"{told}<br>Example: `{command}`" if example else told


if __name__ == "__main__":
    main(Path(sys.argv[1]))
