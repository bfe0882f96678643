"""`ratchet promote`, `rollback`, `history` and `rollout`: which version is in charge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.cli.context import (
    Json,
    Reason,
    find_root,
    name_version,
    note,
    read_config,
    ready_root,
    say,
    show,
)
from ratchet.errors import UserError

if TYPE_CHECKING:
    from ratchet.promotion.rollout import Rollout

rollout = typer.Typer(
    help="The open rollout: look, pause, resume, abort.", no_args_is_help=True, rich_markup_mode=None
)


@rollout.command("look")
def rollout_look(as_json: Json = False) -> None:
    """Take one look at the open rollout and act on it; `ratchet up` does this each minute.

    Example: ratchet rollout look
    """
    root = ready_root(clean=False)
    from flows.rollout import look_once

    _tell_rollout(look_once(root, read_config(root), note), as_json)


@rollout.command("status")
def rollout_show(as_json: Json = False) -> None:
    """Show the open rollout with its figures. Example: ratchet rollout status"""
    root = find_root()
    from flows.rollout import rollout_status

    _tell_rollout(rollout_status(root, read_config(root)), as_json)


@rollout.command("pause")
def rollout_pause(as_json: Json = False) -> None:
    """Let the champion answer everybody until `resume`. Example: ratchet rollout pause"""
    root = ready_root(clean=False)
    from flows.rollout import pause_rollout

    _tell_rollout(pause_rollout(root, read_config(root), note), as_json)


@rollout.command("resume")
def rollout_resume(as_json: Json = False) -> None:
    """Continue a paused rollout. Example: ratchet rollout resume"""
    root = ready_root(clean=False)
    from flows.rollout import resume_rollout

    _tell_rollout(resume_rollout(root, read_config(root), note), as_json)


@rollout.command("abort")
def rollout_abort(reason: Reason = "by hand", as_json: Json = False) -> None:
    """End the rollout; the champion stays. Example: ratchet rollout abort --reason "complaints" """
    root = ready_root(clean=False)
    from flows.rollout import abort_rollout

    _tell_rollout(abort_rollout(root, read_config(root), reason, note), as_json)


def _tell_rollout(found: Rollout | None, as_json: bool) -> None:
    from ratchet.services.status import rollout_lines

    plain = found.to_json() if found else {"why": "no rollout is open"}
    show(plain, as_json, lambda: say("\n".join(rollout_lines(found))))


def promote(
    version: Annotated[int, typer.Argument(min=1, help="Number of the version in MLflow's registry.")],
    reason: Reason = "by hand",
    force: Annotated[bool, typer.Option("--force", help="Overrule the gate; needs --reason.")] = False,
    as_json: Json = False,
) -> None:
    """Put a gated version in charge: commit, tag, alias.

    Example: ratchet promote 3 --reason "read the table with Ana"
    """
    if force and reason == "by hand":
        raise UserError(
            "--force without --reason", remedy="the ledger keeps why the gate was overruled: add --reason '…'"
        )
    root = ready_root()
    from flows.promotion import promote_version

    _tell_champion(
        promote_version(root, read_config(root), version, reason=reason, force=force, say=note), as_json
    )


def rollback(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Return to the version before, in one step; works with MLflow down.

    Example: ratchet rollback --reason "wrong answers about refunds"
    """
    root = ready_root()
    from flows.promotion import roll_back

    _tell_champion(roll_back(root, read_config(root), reason=reason, say=note), as_json)


def _tell_champion(champion: Any, as_json: bool) -> None:
    show(
        champion,
        as_json,
        lambda: say(f"in charge: v{champion.version} (before: {name_version(champion.replaced)})"),
    )


def history(as_json: Json = False) -> None:
    """Show the ledger of promotions: when, who, from, to, why, data, gate.

    Example: ratchet history
    """
    root = find_root()
    from ratchet.services.status import ledger_lines, read_moves

    moves = read_moves(root)
    show(moves, as_json, lambda: say("\n".join(ledger_lines(moves))))
