"""`ratchet data`. What each command does stands in a module of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from ratchet.cli import rows
from ratchet.cli.context import Json

app = typer.Typer(help="Rows of data: check, look at, forget.", no_args_is_help=True, rich_markup_mode=None)
rows.add_to(app)


@app.command("forget")
def data_forget(
    match: Annotated[str, typer.Option("--match", metavar="REGEX", help="Rows in whose texts the pattern is found.")] = "",
    example_id: Annotated[str, typer.Option("--id", metavar="EXAMPLE_ID", help="The row with this id, 32 hex digits, and its copies.")] = "",
    user: Annotated[str, typer.Option("--user", metavar="NAME", help="Rows whose `meta` names this person, or the pseudonym that the gateway gave them.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in git, so write no names.")] = "by hand",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be forgotten, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Leave rows out of every training from now on, and mark the versions that learned from them.

    Example: ratchet data forget --match "Ana Meyer" --reason "ticket 12"
    """
    from ratchet.cli.forget import forget

    forget(match=match, example_id=example_id, user=user, reason=reason, yes=yes, dry_run=dry_run, as_json=as_json)
