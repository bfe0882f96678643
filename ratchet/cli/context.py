"""What every command shares: which checkout it works in, and how it prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.errors import ConfigError

if TYPE_CHECKING:
    from ratchet.config.params import Config

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger.")]


class Here:
    """Where the command works, and how it fails."""

    path: Path | None = None
    debug = False


def find_root() -> Path:
    """The checkout: -C, or the nearest folder upwards with a params.yaml. Raises ConfigError."""
    start = (Here.path or Path.cwd()).resolve()
    if not start.is_dir():
        raise ConfigError(f"{start} is no folder", remedy="name a checkout with -C PATH")
    for folder in [start] if Here.path else [start, *start.parents]:
        if (folder / "params.yaml").exists():
            return folder
    raise ConfigError(
        f"no params.yaml in {start}{'' if Here.path else ' or above'}",
        remedy="run the command in a clone of the project, or name one with -C PATH",
    )


def read_config(root: Path) -> Config:
    from ratchet.config.params import load_config

    return load_config(root / "params.yaml")


def ready_root(*, clean: bool = True) -> Path:
    """The root, checked (`clean`: for what commits to it), and the environment that flows need: it has to stand before Prefect is imported."""
    from ratchet.pipeline.checkout import check_checkout
    from ratchet.services.environment import enter

    root = find_root()
    config = read_config(root)
    if clean:
        check_checkout(root)
    enter(root, config)
    return root


def show(found: Any, as_json: bool, tell: Callable[[], object]) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
    else:
        tell()


def say(line: str) -> None:
    typer.echo(line)


def note(line: str) -> None:
    """Progress, apart from results."""
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)


def name_version(number: int | None) -> str:
    return f"v{number}" if number is not None else "nobody"
