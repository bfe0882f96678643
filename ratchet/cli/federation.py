"""`ratchet federate`: train together with nodes that keep their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratchet.cli.context import Json, Reason, find_root, note, read_config, ready_root, say, show

if TYPE_CHECKING:
    from ratchet.config.params import Config

app = typer.Typer(
    help="Train together with nodes that keep their rows.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("up")
def up() -> None:
    """Start the coordinator's link to its nodes. Example: ratchet federate up"""
    from ratchet.federation.link.flower import FOLDER
    from ratchet.federation.link.party import READY

    root = find_root()
    config = read_config(root)
    settings = config.federate
    shown = {"host": settings.host, "port": settings.port, "names": settings.names}
    _start(root, "coordinator", json.dumps(shown), root / FOLDER / READY, config)
    say(f"nodes reach it on {settings.names[0]}:{settings.port}; ratchet federate invite NAME")


@app.command("down")
def down() -> None:
    """Stop the link, of a coordinator or of a node. Example: ratchet federate down"""
    from ratchet.federation.link.party import end_left
    from ratchet.services.specs import FEDERATION
    from ratchet.services.supervisor import stop_service

    root = find_root().resolve()
    stopped = stop_service(root, FEDERATION)
    say("stopped" if end_left(root) or stopped else "it does not run")


@app.command("invite")
def invite(
    name: Annotated[str, typer.Argument(help="What the node is called.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The invitation's file; otherwise NAME.invitation.")
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", help="The node's own key (`ratchet federate key`); otherwise one is made for it."
        ),
    ] = None,
) -> None:
    """Take a node in, and write an invitation: whoever holds the file can join in its name.

    Example: ratchet federate invite hospital-a
    """
    from ratchet.federation.link.invitations import invite as take_in

    root = find_root()
    path = take_in(root, read_config(root), name, out or Path(f"{name}.invitation"), public_key)
    how = "" if public_key else " over a safe channel, since it holds a key, and delete it here"
    say(f"{path}: give it to {name}{how}; there: ratchet federate join {path.name}")


@app.command("remove")
def remove(name: Annotated[str, typer.Argument(help="The node.")]) -> None:
    """Put a node out: it cannot connect any more. What it taught stays in the versions that exist.

    Example: ratchet federate remove hospital-a
    """
    from ratchet.federation.link.invitations import remove as put_out

    root = find_root()
    put_out(root, read_config(root), name)
    say(f"{name} is out. What it taught stays in the versions; ratchet federate forget {name} trains without")


@app.command("forget")
def forget(
    name: Annotated[str, typer.Argument(help="The node.")], reason: Reason = "by hand", as_json: Json = False
) -> None:
    """Put a node out, and train anew from the base without it.

    What this does not undo: versions that it taught stay in the registry and in git, answers that they gave
    were given, and other nodes may keep adapters of that time.

    Example: ratchet federate forget hospital-a --reason "it has left the group"
    """
    root = ready_root()
    from flows.federate import federate
    from flows.federate import forget as put_out
    from ratchet.cli.loop import tell_retrained

    versions = put_out(root, read_config(root), name, reason)
    told = ", ".join(f"v{version}" for version in versions) or "no version"
    note(f"{name} is forgotten; its share is in {told}; now the others train from the base")
    found = federate(root=str(root), reason=f"without {name}: {reason}")
    show(found._asdict(), as_json, lambda: tell_retrained(found))
    if found.champion in versions:
        note(
            f"v{found.champion}, which {name} taught, is still in charge, since the gate did not put "
            f"v{found.version} in its place: `ratchet promote {found.version} --force --reason '…'` would"
        )


@app.command("key")
def key() -> None:
    """Print this node's public key, for an invitation without a key. Example: ratchet federate key"""
    from ratchet.federation.link.certificates import node_key
    from ratchet.federation.link.party import NODE_KEY
    from ratchet.federation.records import NODE

    say(node_key(find_root() / NODE / NODE_KEY))


@app.command("join")
def join(
    invitation: Annotated[Path | None, typer.Argument(help="The coordinator's file; once.")] = None,
    rounds_a_day: Annotated[
        int | None,
        typer.Option(
            "--rounds-a-day", min=0, help="Rounds that this node takes part in a day; 0: any number."
        ),
    ] = None,
    hours: Annotated[str, typer.Option("--hours", help="When it trains, such as 20-6.")] = "",
    epsilon: Annotated[
        float | None,
        typer.Option("--epsilon", min=0.01, help="ε that it spends of its rows' privacy, at most, in all."),
    ] = None,
) -> None:
    """Connect this checkout as a node, and train when asked, until `ratchet federate down`.

    Limits stay until others are given, also without an invitation and while the link runs. It waits for the
    coordinator's first word, and fails where that is a refusal.

    Example: ratchet federate join hospital-a.invitation --hours 20-6
    """
    from ratchet.federation.link.invitations import Limits, accept
    from ratchet.federation.link.party import READY, wait_for_word
    from ratchet.federation.records import NODE

    root = find_root()
    node = accept(root, invitation, Limits(rounds_a_day, hours, epsilon))
    config = read_config(root)
    _start(root, "node", node.url, root / NODE / READY, config)
    if wait_for_word(root.resolve(), node.url, config.services.start_timeout, note):
        say(f"{node.name} is connected to {node.url}, and trains when asked; limits: {node.limits}")
    else:
        say(f"{node.url} does not answer yet; {node.name} goes on trying; limits: {node.limits}")


@app.command("leave")
def leave() -> None:
    """Disconnect, and remove the key: to join again takes another invitation. Rows and rounds' records stay.

    Example: ratchet federate leave
    """
    from ratchet.federation.link.invitations import leave as go

    down()
    go(find_root())
    say("the key is removed; the records of rounds and the version that it holds stay")


@app.command("run")
def run(reason: Reason = "by hand", as_json: Json = False) -> None:
    """Train with the nodes that are connected, and judge the candidate as `ratchet retrain` does.

    Example: ratchet federate run --reason "a month of new rows"
    """
    root = ready_root()
    from flows.federate import federate
    from ratchet.cli.loop import tell_retrained

    found = federate(root=str(root), reason=reason)
    show(found._asdict(), as_json, lambda: tell_retrained(found))


@app.command("take")
def take(
    personal: Annotated[
        bool,
        typer.Option("--personal", help="Mix it with an adapter that is trained on this node's own rows."),
    ] = False,
    reason: Reason = "by hand",
    as_json: Json = False,
) -> None:
    """Make the version that the coordinator delivered a candidate of this node, and judge it on its own rows.

    Example: ratchet federate take --personal --reason "a month of new rows"
    """
    from ratchet.federation.records import require_delivery

    require_delivery(find_root())
    root = ready_root()
    from flows.outage import run_flow
    from flows.take import take as flow
    from ratchet.cli.loop import tell_retrained

    found = run_flow(flow, root=str(root), reason=reason, personal=personal)
    show(found._asdict(), as_json, lambda: tell_retrained(found))


@app.command("status")
def status(as_json: Json = False) -> None:
    """Show the nodes and rounds: at a coordinator all, at a node its own. Example: ratchet federate status"""
    from ratchet.federation.status import describe, see_federation

    found = see_federation(find_root())
    show(found, as_json, lambda: say("\n".join(describe(found))))


def _start(root: Path, side: str, settings: str, ready: Path, config: Config) -> None:
    from ratchet.federation.link.flower import flower
    from ratchet.federation.link.party import end_left
    from ratchet.services.specs import plan_federation
    from ratchet.services.supervisor import start_service

    flower("flower-superlink")  # said before anything starts
    plan = plan_federation(root.resolve(), side, settings, config)
    timeout = config.services.start_timeout
    start_service(root, plan, ready.exists, timeout, note, before=lambda: end_left(root))
