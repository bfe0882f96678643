"""`ratchet keys`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratchet.cli.context import find_root, say

app = typer.Typer(help="The gateway's API keys.", no_args_is_help=True, rich_markup_mode=None)


@app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    scopes: Annotated[str, typer.Option(help="infer, feedback, admin, with commas.")] = "infer,feedback",
) -> None:
    """Make a key and show it, once. Example: ratchet keys add website"""
    from ratchet.gateway.auth import add_key

    say(add_key(find_root(), name, scopes.split(",")))


@app.command("list")
def keys_list() -> None:
    """Names and scopes. Example: ratchet keys list"""
    from ratchet.gateway.auth import list_keys

    for key in list_keys(find_root()):
        say(f"{key.name:20} {','.join(key.scopes)}")


@app.command("revoke")
def keys_revoke(name: Annotated[str, typer.Argument(help="Whose key it is.")]) -> None:
    """Refuse a key from now on. Example: ratchet keys revoke website"""
    from ratchet.gateway.auth import revoke_key

    revoke_key(find_root(), name)
    say(f"the key of {name} is refused from now on")
