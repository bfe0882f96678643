"""What the commands share: options, the checkout they work in, how they print, and old names of commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ratchet.errors import ConfigError

if TYPE_CHECKING:
    from ratchet.config.params import Config

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
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
Draft = Annotated[
    str | None, typer.Option(metavar="NAME", help="The reviewed draft; without it, all that are ready.")
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="BATCH",
        help="The held-out rows count among the test rows of this batch (the beginning of its name).",
    ),
]
Preview = Annotated[
    bool,
    typer.Option("--preview", help="Show five rows as the model will see them: tokens, and what is learned."),
]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger.")]


LANDING = ".ratchet/landing"  # as in pipeline/workspace.py, whose import takes longer than many commands


class Here:
    """The global options: the checkout of -C, and whether errors show tracebacks."""

    path: Path | None = None
    debug = False


def find_root(*, mend: bool = True) -> Path:
    """Return the checkout: -C, or the nearest folder upwards with a params.yaml. Raises ConfigError.

    Where a killed run left the checkout's data older than its commit, they are brought first, if `mend`.
    """
    root = _find_root()
    if mend and (root / LANDING).exists():
        from ratchet.pipeline.workspace import finish_landing

        finish_landing(root, note)
    return root


def _find_root() -> Path:
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
    """Return the root, after setting the flows' environment and, if `clean`, checking that it is committable.

    Prefect reads its environment when it is imported, so a command that starts a flow calls this first.
    """
    from ratchet.pipeline.checkout import check_checkout
    from ratchet.services.environment import enter

    root = find_root()
    config = read_config(root)
    if clean:
        check_checkout(root)
    enter(root, config)
    _reconcile(root)
    return root


def _reconcile(root: Path) -> None:
    """Let MLflow's alias follow a promotion or rollback that was killed, if MLflow answers."""
    from ratchet.promotion.champion import alias_is_pending
    from ratchet.services.environment import mlflow_answers

    if alias_is_pending(root) and mlflow_answers():
        from tasks.promote import reconcile

        reconcile(root, note)


def read_mapping(columns: str | None) -> dict[str, str] | None:
    """Parse `--columns`; None if it was not given. Raises UserError."""
    from ratchet.sources.columns import parse_columns

    return None if columns is None else parse_columns(columns)


def with_columns(config: Config, columns: str | None) -> Config:
    """Return the config with `--columns`, if given, in place of `ingest.columns`. Raises UserError."""
    if (mapping := read_mapping(columns)) is None:
        return config
    ingest = config.ingest.model_copy(update={"columns": mapping})
    return config.model_copy(update={"ingest": ingest})


def show(found: Any, as_json: bool, tell: Callable[[], object]) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=_encode))
    else:
        tell()


def _encode(value: object) -> object:
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else str(value)


def say(line: str) -> None:
    typer.echo(line)


def note(line: str) -> None:
    """Print progress to stderr, since stdout is for results."""
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)


def note_renamed(old: str, new: str) -> None:
    note(f"`{old}` is now `{new}`; the old name works for one more release (docs/renamed.md)")


def add_old_name(app: typer.Typer, old: str, new: str, command: Callable[..., None]) -> None:
    """Keep the command `old` as a hidden alias of `new`, which names the new command when used."""

    @wraps(command)
    def run(*arguments: object, **options: object) -> None:
        note_renamed(f"ratchet {old}", f"ratchet {new}")
        command(*arguments, **options)

    app.command(old.split()[-1], hidden=True)(run)


def name_version(number: int | None) -> str:
    return f"v{number}" if number is not None else "nobody"
