"""`ratchet rollout`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from ratchet.cli.context import Json, Reason, find_root, note, read_config, ready_root, say, show

if TYPE_CHECKING:
    from ratchet.promotion.rollout import Rollout

app = typer.Typer(
    help="The open rollout: look, pause, resume, abort.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("look")
def rollout_look(as_json: Json = False) -> None:
    """Look at the open rollout now, and act: what happens each minute by itself where `ratchet up` runs.

    Example: ratchet rollout look
    """
    root = ready_root(clean=False)
    from flows.rollout import look_once

    _tell_rollout(look_once(root, read_config(root), note), as_json)


@app.command("status")
def rollout_show(as_json: Json = False) -> None:
    """The open rollout with its figures. Example: ratchet rollout status"""
    root = find_root()
    from flows.rollout import rollout_status

    _tell_rollout(rollout_status(root, read_config(root)), as_json)


@app.command("pause")
def rollout_pause(as_json: Json = False) -> None:
    """The champion answers everybody until it is resumed. Example: ratchet rollout pause"""
    root = ready_root(clean=False)
    from flows.rollout import pause_rollout

    _tell_rollout(pause_rollout(root, read_config(root), note), as_json)


@app.command("resume")
def rollout_resume(as_json: Json = False) -> None:
    """Go on with a paused rollout. Example: ratchet rollout resume"""
    root = ready_root(clean=False)
    from flows.rollout import resume_rollout

    _tell_rollout(resume_rollout(root, read_config(root), note), as_json)


@app.command("abort")
def rollout_abort(reason: Reason = "by hand", as_json: Json = False) -> None:
    """End the rollout; the champion stays. Example: ratchet rollout abort --reason "complaints" """
    root = ready_root(clean=False)
    from flows.rollout import abort_rollout

    _tell_rollout(abort_rollout(root, read_config(root), reason, note), as_json)


def _tell_rollout(found: Rollout | None, as_json: bool) -> None:
    import msgspec

    from ratchet.services.status import rollout_lines

    plain = {**msgspec.to_builtins(found), "share": found.share} if found else {"why": "no rollout is open"}
    show(plain, as_json, lambda: say("\n".join(rollout_lines(plain))))
