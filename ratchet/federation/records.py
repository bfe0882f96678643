"""What is remembered of a federation: a node's settings and rounds, and those of the coordinator.

Nothing here loads torch, so commands and services start fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ratchet.errors import RatchetError, UserError
from ratchet.files import read_json
from ratchet.models.manifests import Together
from ratchet.pipeline.integrity import check_files
from ratchet.privacy.ledger import FILE as LEDGER

NODE = Path(".ratchet/federation/node")  # a node's files, in its checkout
ENDED = NODE.parent / "ended.txt"  # why the link of this checkout ended by itself
SETTINGS, TOOK_PART = "node.json", "rounds.jsonl"
RECORD = "round.json"  # of one round, at the coordinator
OWN_SCORES = "own-scores.json"
FORGOTTEN = "forgotten-nodes.json"
ROUNDS = "rounds.json"  # of all rounds of a version, beside the figures of its training
DELIVERED, DELIVERY = "delivered", "delivery.json"  # a node's folder of the version that it was given


def ledgers(root: Path) -> list[Path]:
    """Return both ledgers of ε of a checkout's rows: of its own trainings, and of those in rounds.

    `root` is the checkout, or the folder of its node, in which rounds train.
    """
    home = root.parents[len(NODE.parts) - 1] if root.parts[-len(NODE.parts) :] == NODE.parts else root
    return [home / LEDGER, home / NODE / "trainings" / LEDGER.name]


class Node(msgspec.Struct, frozen=True):
    """A node's own settings: where its coordinator is, and what it is ready to do."""

    name: str
    url: str  # host:port
    rounds_a_day: int | None = None
    hours: str = ""  # such as 20-6: when it trains
    epsilon: float | None = None  # of its rows' privacy that it spends at most, in all trainings

    @property
    def limits(self) -> str:
        found = [
            f"{self.rounds_a_day} rounds a day" if self.rounds_a_day else "",
            f"between {self.hours} o'clock" if self.hours else "",
            f"ε = {self.epsilon:g} in all" if self.epsilon is not None else "",
        ]
        return ", ".join(filter(None, found)) or "none: ratchet federate join --help"


class Done(msgspec.Struct, frozen=True):
    """A round that this node took part in, as a line of rounds.jsonl."""

    time: str
    run: str
    round: int
    rows: int
    steps: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    epsilon: float | None = None  # spent of the rows' privacy, with earlier trainings
    batches: list[str] = []  # of the rows that were trained on


class Delivery(msgspec.Struct, frozen=True):
    """A version that the coordinator gave this node; its adapter is beside it (`messages.Deliver`)."""

    time: str
    run: str
    version: int | None
    base: dict[str, Any]
    record: dict[str, Any]
    max_length: int
    start: str
    federation: Together
    files: dict[str, str] = {}  # name → hash, as `integrity.check_files` takes them

    @property
    def told(self) -> str:
        name = f"v{self.version} of the coordinator" if self.version else "a version of the coordinator"
        return f"{name}, run {self.run}, delivered at {self.time}: {self.federation.told}"


def read_node(root: Path) -> Node:
    """Read the node's settings. Raises UserError: it has not joined."""
    try:
        return msgspec.convert(read_json(root / NODE / SETTINGS), Node)
    except RatchetError:
        raise UserError(
            "this checkout has joined no federation", remedy="ratchet federate join INVITATION"
        ) from None


class OwnScores(msgspec.Struct, frozen=True):
    """What a node measured on its own held-out rows: the version that came out against the one before."""

    run: str
    metric: str
    rival: str  # "champion" or "base"
    rows: int
    before: float
    after: float

    @property
    def told(self) -> str:
        return (
            f"{self.metric} {self.before:.3f} → {self.after:.3f} from the {self.rival} to the candidate of "
            f"run {self.run}, on this node's {self.rows} held-out rows"
        )


def read_own_scores(root: Path) -> OwnScores | None:
    path = root / NODE / OWN_SCORES
    return msgspec.convert(read_json(path), OwnScores) if path.exists() else None


def read_rounds(root: Path) -> list[Done]:
    path = root / NODE / TOOK_PART
    return (
        [msgspec.json.decode(line, type=Done) for line in path.read_bytes().splitlines()]
        if path.exists()
        else []
    )


class ForgottenNode(msgspec.Struct, frozen=True):
    """A node whose share no training goes on from."""

    name: str
    at: str
    reason: str


def read_forgotten_nodes(folder: Path) -> list[ForgottenNode]:
    """Read the nodes that were forgotten, from the coordinator's folder."""
    path = folder / FORGOTTEN
    return msgspec.convert(read_json(path), list[ForgottenNode]) if path.exists() else []


def read_delivery(root: Path) -> Delivery | None:
    """Return what is known of the version that this node was given last; None: none yet."""
    path = root / NODE / DELIVERED / DELIVERY
    return msgspec.convert(read_json(path), Delivery) if path.exists() else None


def require_delivery(root: Path) -> Delivery:
    """Return what this node was given last. Raises UserError: nothing yet; DamagedError."""
    if found := read_delivery(root):
        remedy = "the coordinator's next version that passes its gate takes its place"
        check_files(root / NODE / DELIVERED, found.files, remedy)
        return found
    raise UserError(
        "this checkout was given no version of a federation",
        remedy="the coordinator gives one to the nodes that are connected when its gate says promote; "
        "`ratchet federate status` tells what came",
    )


class Part(msgspec.Struct, frozen=True):
    """What a node did in a round; under secure aggregation its rows are not known."""

    name: str
    rows: int | None
    steps: int
    seconds: float
    train_loss: float
    validation_loss: float | None
    epsilon: float | None = None  # spent of the privacy of its rows, with earlier trainings
    learned_tokens: int = 0  # not known under secure aggregation


class Round(msgspec.Struct, frozen=True):
    """The record of a round. `left_out`: name → reason. `moved`: norm of the update's change."""

    number: int
    factors: str
    nodes: list[Part]
    left_out: dict[str, str]
    rows: int
    seconds: float
    sent_bytes: int
    received_bytes: int
    moved: float

    @property
    def sent_mib(self) -> float:
        """Return what travelled, both ways, in MiB."""
        return (self.sent_bytes + self.received_bytes) / 2**20

    @property
    def train_loss(self) -> float:
        return _mean(self.nodes, "train_loss")

    @property
    def validation_loss(self) -> float | None:
        return (
            _mean(self.nodes, "validation_loss")
            if all(part.validation_loss is not None for part in self.nodes)
            else None
        )


def read_trained_rounds(reports: Path) -> list[Round]:
    """Read the rounds from a training's reports; without nodes there are none."""
    path = reports / ROUNDS
    return msgspec.convert(read_json(path), list[Round]) if path.exists() else []


def _mean(parts: Sequence[Part], what: str) -> float:
    """Weighted by rows where they are known."""
    weights = [part.rows if part.rows is not None else 1 for part in parts]
    values = [float(getattr(part, what)) for part in parts]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
