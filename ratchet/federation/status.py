"""See a federation from this checkout: as its coordinator, or as one of its nodes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ratchet.federation.link import flower
from ratchet.federation.link.flower import read_names
from ratchet.federation.records import (
    ENDED,
    NODE,
    RECORD,
    SETTINGS,
    Delivery,
    Done,
    Node,
    OwnScores,
    Round,
    read_delivery,
    read_node,
    read_own_scores,
    read_rounds,
    read_trained_rounds,
)
from ratchet.files import read_json
from ratchet.services.specs import FEDERATION
from ratchet.services.supervisor import is_running


class Federation(msgspec.Struct, frozen=True):
    """`nodes`: name → whether it is connected. `rounds` are those of a run that goes on."""

    runs: bool
    nodes: dict[str, bool]
    rounds: list[Round]
    last: list[Round]  # of the newest version that was trained here together
    node: Node | None
    took_part: list[Done]
    delivered: Delivery | None  # the version that this node was given
    own_scores: OwnScores | None
    taken: bool  # whether what was delivered is this checkout's candidate
    ended: str  # why the link ended by itself
    run: str  # that goes on, or was interrupted


def see_federation(root: Path) -> Federation:
    folder = root / flower.FOLDER
    runs, names = is_running(root, FEDERATION), read_names(folder)
    connected = folder / "exchange/nodes.json"
    here = set(read_json(connected)) if runs and connected.exists() else set()
    rounds = sorted(
        (folder / "run/rounds").glob(f"round-*/{RECORD}"), key=lambda path: int(path.parent.name[6:])
    )
    joined, delivered = (root / NODE / SETTINGS).exists(), read_delivery(root)
    run, ended = folder / "run/run.json", root / ENDED
    return Federation(
        runs,
        {name: number in here for number, name in names.items()},
        [msgspec.convert(read_json(path), Round) for path in rounds],
        read_trained_rounds(root / "reports/train"),
        read_node(root) if joined else None,
        read_rounds(root),
        delivered,
        read_own_scores(root),
        delivered is not None and _candidates_run(root) == delivered.run,
        ended.read_text() if not runs and ended.exists() else "",
        read_json(run)["run"] if run.exists() else "",
    )


def _candidates_run(root: Path) -> str | None:
    """Return the run of a federation that the checkout's candidate came out of."""
    manifest = root / "models/candidate/manifest.json"
    found: str | None = read_json(manifest)["inputs"].get("federation") if manifest.exists() else None
    return found


def describe(found: Federation) -> list[str]:
    """Describe it, a line each."""
    link = "runs" if found.runs else "does not run: ratchet federate up, or join"
    lines = [f"link    {link}", *([f"ended   {found.ended}"] if found.ended else [])]
    if found.node:
        lines.append(f"node    {found.node.name}, of the coordinator at {found.node.url}")
        lines.append(f"limits  {found.node.limits}")
        lines += [_told(done) for done in found.took_part[-10:]]
        lines += [f"own     {found.own_scores.told}"] if found.own_scores else []
        held = found.delivered
        take = "taken" if found.taken else "ratchet federate take"
        lines.append(f"holds   {f'{held.told}; {take}' if held else 'no version yet'}")
        return lines
    if not found.nodes:
        lines.append("nodes   none yet: ratchet federate invite NAME")
    for name, connected in sorted(found.nodes.items()):
        lines.append(f"node    {name}: {'connected' if connected else 'away'}")
    if found.run:
        done = f"{len(found.rounds)} rounds are done"
        lines.append(f"run     {found.run}: {done}; if nobody runs it, ratchet federate run goes on")
    for title, rounds in (("round", found.rounds), ("last", found.last)):
        for each in rounds:
            lines += tell_round(each, title)
    return lines


def tell_round(found: Round, title: str) -> list[str]:
    """Tell who took part in a round, with how many rows, to which losses; then who did not, and why."""
    loss = f", validation loss {found.validation_loss:.4f}" if found.validation_loss is not None else ""
    took = ", ".join(
        part.name if part.epsilon is None else f"{part.name} (ε = {part.epsilon:.3g})" for part in found.nodes
    )
    return [
        f"{title:7} {found.number}: {took}; {found.rows} rows, training loss {found.train_loss:.4f}{loss}; "
        f"{found.seconds:.0f} s, {found.sent_mib:.1f} MiB",
        *(f"        without {name}: {why}" for name, why in found.left_out.items()),
    ]


def _told(done: Done) -> str:
    loss = f", validation loss {done.validation_loss:.4f}" if done.validation_loss is not None else ""
    if done.epsilon is not None:
        loss += f", ε = {done.epsilon:.3g} spent"
    return (
        f"round   {done.round} of {done.run} at {done.time}: {done.rows} rows, {done.steps} steps in "
        f"{done.seconds:.0f} s, training loss {done.train_loss:.4f}{loss}"
    )
