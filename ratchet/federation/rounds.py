"""Train a global adapter in rounds: send it to the nodes, check what comes back, aggregate, go on.

All that a round receives and makes is kept in a folder of its own, so a coordinator that was killed goes on
where it was: nodes answer a request that they know with the same bytes.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from safetensors.torch import load_file, save
from torch import Tensor

from ratchet.config.federation import FederateConfig
from ratchet.errors import RatchetError, UserError
from ratchet.evaluation.node_scores import Scores, Sums, check_sums
from ratchet.federation import aggregation, messages
from ratchet.federation.aggregation import Aggregate, LowRank
from ratchet.federation.messages import write_message
from ratchet.federation.records import RECORD, Part, Round
from ratchet.federation.secure import SharesMissing, SharesWrong, Sum, check_enough
from ratchet.federation.state import distance, read_state, state_tensors, updates_of, write_state
from ratchet.federation.strategies import make_strategy
from ratchet.files import read_json, write_bytes, write_json

STATE = "global.safetensors"
NODES = "nodes.json"  # those that are asked in a round
ATTEMPT = "attempt.json"  # of the secure sum of a round
SERVER = "strategy.safetensors"  # what a strategy keeps from round to round
STEP_SECONDS = 120.0  # that a node has for a step without training
WAIT_SECONDS = 1.0  # between two looks for nodes that are away

Say = Callable[[str], None]
Answer = TypeVar("Answer")


class Link(Protocol):
    """How the coordinator reaches its nodes."""

    def nodes(self) -> dict[str, str]:
        """Return the nodes that are connected: id → name."""

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        """Send a request to each node (by id); return each one's reply, or the reason why there is none.

        `name` is the same when a coordinator asks again after it was killed.
        """

    def forget(self, name: str) -> None:
        """Forget what was asked under names that begin like this."""


class Plan(NamedTuple):
    """What a run of rounds is about, the same for all its rounds."""

    run: str
    params: dict[str, dict[str, Any]]  # the sections tokenize, train and adapter
    base: dict[str, Any]
    adapter_config: dict[str, Any]
    scale: float
    settings: FederateConfig


class Received(NamedTuple):
    """What came back from the nodes of a round."""

    parts: dict[str, Part]  # by node id
    adapters: dict[str, dict[str, Tensor]]
    left_out: dict[str, str]
    received_bytes: int


def run_rounds(
    link: Link, folder: Path, start: Aggregate, plan: Plan, say: Say
) -> tuple[Aggregate, list[Round]]:
    """Return the global adapter after the last round, and the records of all.

    Raises UserError: too few nodes took part in a round; SharesWrong.
    """
    current, records = start, []
    for number in range(1, plan.settings.rounds + 1):
        home = folder / f"round-{number}"
        home.mkdir(parents=True, exist_ok=True)
        if (home / RECORD).exists():
            record = msgspec.convert(read_json(home / RECORD), Round)
            current = read_state(home / STATE)
            say(f"round {number} of {plan.settings.rounds}: done before")
        else:
            try:
                current, record = _run_round(link, folder, current, plan, number, say)
            except SharesWrong:
                raise
            except SharesMissing:
                # Nothing but the shares is asked for again: a node gives them in one try of a sum only.
                link.forget(f"{plan.run}-{number}-{_attempt(home)}-reveal")
                raise
            except UserError:
                # Started again, the round asks again; a node that answered repeats itself. The sum begins
                # anew with fresh keys, since other nodes may be there.
                (home / ATTEMPT).unlink(missing_ok=True)
                link.forget(f"{plan.run}-{number}-")
                (home / NODES).unlink(missing_ok=True)
                raise
        records.append(record)
    return current, records


def factors_of(number: int, aggregate: str) -> str:
    return "both" if aggregate != "alternate" else "up" if number % 2 else "down"


def _run_round(
    link: Link, folder: Path, current: Aggregate, plan: Plan, number: int, say: Say
) -> tuple[Aggregate, Round]:
    settings, home, began = plan.settings, folder / f"round-{number}", time.monotonic()
    factors = factors_of(number, settings.aggregation)
    nodes = _nodes_of_round(link, home, settings, say)
    params = {**plan.params, "train": {**plan.params["train"], "factors": factors}}
    request = write_message(
        messages.Train(
            run=plan.run,
            round=number,
            params=params,
            base=plan.base,
            adapter_config=plan.adapter_config,
            scale=plan.scale,
            masked=settings.secure,
            audit_canaries=settings.audit_canaries,
        ),
        state_tensors(current),
    )
    say(
        f"round {number} of {settings.rounds}: {len(nodes)} nodes train ({', '.join(sorted(nodes.values()))})"
    )
    seconds = settings.round_minutes * 60
    replies = link.ask(dict.fromkeys(nodes, request), seconds, f"{plan.run}-{number}-train")
    received = _receive(replies, nodes, current, settings)
    for name, reason in received.left_out.items():
        say(f"round {number}: without {name}: {reason}")
    check_enough(number, received.parts, settings.min_nodes, received.left_out)
    if settings.secure:
        after, rows, received = _sum(link, home, received, nodes, current, plan, number, factors)
    else:
        rows = sum(part.rows or 0 for part in received.parts.values())
        after = _aggregate(current, received, home.parent, number, settings)
    after_update, before_update = (updates_of(aggregate) for aggregate in (after, current))
    record = Round(
        number,
        factors,
        sorted(received.parts.values(), key=lambda part: part.name),
        received.left_out,
        rows,
        time.monotonic() - began,
        len(request) * len(nodes),
        received.received_bytes,
        plan.scale * distance(after_update, before_update),
    )
    write_state(home / STATE, after)
    write_json(home / RECORD, msgspec.to_builtins(record))
    told = f", validation loss {record.validation_loss:.4f}" if record.validation_loss is not None else ""
    losses = f"training loss {record.train_loss:.4f}{told}"
    say(f"round {number}: {losses} at {len(record.nodes)} nodes with {rows} rows")
    return after, record


def _nodes_of_round(link: Link, home: Path, settings: FederateConfig, say: Say) -> dict[str, str]:
    """Return the nodes of the round: those that were asked before it was interrupted, or that are here."""
    return _noted(home, lambda: wait_for_nodes(link, settings, say))


def asked_nodes(link: Link, home: Path) -> dict[str, str]:
    """Return the nodes that are connected, id → name; a coordinator that was killed gets the same again."""
    return _noted(home, link.nodes)


def _noted(home: Path, find: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Return the nodes that are noted in `home`; note those that `find` returns the first time."""
    note = home / NODES
    if not note.exists():
        write_json(note, find())
    nodes: dict[str, str] = read_json(note)
    return nodes


def wait_for_nodes(link: Link, settings: FederateConfig, say: Say) -> dict[str, str]:
    """Return the nodes that are connected, as soon as they are enough.

    Raises UserError: after `federate.round_minutes` they are still too few.
    """
    until, told = time.monotonic() + settings.round_minutes * 60, False
    while len(nodes := link.nodes()) < settings.min_nodes:
        if time.monotonic() > until:
            raise UserError(
                f"{len(nodes)} nodes are connected ({', '.join(sorted(nodes.values())) or 'none'}); "
                f"`federate.min_nodes` asks for {settings.min_nodes}",
                remedy="start the others (`ratchet federate join`), or lower federate.min_nodes",
            )
        if not told:
            say(f"waiting for nodes: {len(nodes)} of {settings.min_nodes} are connected")
            told = True
        time.sleep(WAIT_SECONDS)
    return nodes


def _receive(
    replies: Mapping[str, bytes | str], nodes: Mapping[str, str], current: Aggregate, settings: FederateConfig
) -> Received:
    """Read and check the replies; those that do not hold what they should are left out, with the reason."""
    parts: dict[str, Part] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    left_out = {}
    size = 0
    for node, name in nodes.items():
        reply = replies.get(node, "it did not answer")
        try:
            size += len(reply) if isinstance(reply, bytes) else 0
            message = messages.read_answer(reply, messages.Trained)
            trained = message.header
            if not math.isfinite(trained.train_loss) or (trained.rows < 1 and not settings.secure):
                raise UserError(f"it trained on {trained.rows} rows to a loss of {trained.train_loss}")
            messages.check_tensors(message.tensors, {} if settings.secure else current.adapter)
        except RatchetError as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        parts[node] = Part(
            name,
            None if settings.secure else trained.rows,
            trained.steps,
            trained.seconds,
            trained.train_loss,
            trained.validation_loss,
            trained.epsilon,
            trained.learned_tokens,
        )
        if not settings.secure:
            adapters[node] = message.tensors
    received = Received(parts, adapters, left_out, size)
    return received if settings.secure else _without_long(received, current, settings)


def _without_long(received: Received, current: Aggregate, settings: FederateConfig) -> Received:
    """Leave out updates that are much longer than the median one."""
    if len(received.adapters) < 3:  # of two, neither is the odd one
        return received
    nodes = list(received.adapters)
    norms = aggregation.distances([current.adapter, *received.adapters.values()])[0, 1:].tolist()
    limit = settings.norm_limit * median(norms)
    long = {node: norm for node, norm in zip(nodes, norms, strict=True) if norm > limit}
    told = {
        received.parts[
            node
        ].name: f"its update has the norm {norm:.3g}, over {settings.norm_limit:g} times the "
        f"median {median(norms):.3g}"
        for node, norm in long.items()
    }
    return Received(
        {node: part for node, part in received.parts.items() if node not in long},
        {node: adapter for node, adapter in received.adapters.items() if node not in long},
        {**received.left_out, **told},
        received.received_bytes,
    )


# --- aggregation ---


def _aggregate(
    current: Aggregate, received: Received, folder: Path, number: int, settings: FederateConfig
) -> Aggregate:
    nodes = sorted(received.adapters, key=lambda node: received.parts[node].name)
    before, after = (folder / f"round-{each}" / SERVER for each in (number - 1, number))
    strategy = make_strategy(
        settings.strategy,
        exact=settings.aggregation == "exact",
        poisoned=settings.poisoned,
        learning_rate=settings.server_learning_rate,
    )
    combined = strategy.combine(
        current.adapter,
        [received.adapters[node] for node in nodes],
        [float(received.parts[node].rows or 0) for node in nodes],
        load_file(before) if before.exists() else {},
    )
    if combined.state:
        write_bytes(after, [save(combined.state)])
    found = combined.aggregate
    return Aggregate(found.adapter, _added(found.residual, current.residual))


def _added(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return the sum of residuals: all nodes trained beside `other`, so it is part of each one's update."""
    found = {}
    for layer in sorted({*one, *other}):
        parts = [part[layer] for part in (one, other) if layer in part]
        found[layer] = parts[0] if len(parts) == 1 else (parts[0] + parts[1]).cut()[0]
    return found


def _attempt(home: Path) -> str:
    """Return the id of the sum that goes on in this round, or of a new one."""
    if not (home / ATTEMPT).exists():
        write_json(home / ATTEMPT, secrets.token_hex(6))
    return str(read_json(home / ATTEMPT))


def _sum(
    link: Link,
    home: Path,
    received: Received,
    nodes: Mapping[str, str],
    current: Aggregate,
    plan: Plan,
    number: int,
    factors: str,
) -> tuple[Aggregate, int, Received]:
    """Return the aggregate and the number of rows from the nodes' masked sum. Raises UserError."""
    sum_ = sum_of(link, plan, number, home, nodes)
    summed = sum_.of(list(received.parts), current.adapter, factors)
    found = Received(
        {node: received.parts[node] for node in summed.nodes},
        {},
        received.left_out | summed.left_out,
        received.received_bytes + summed.received_bytes,
    )
    return Aggregate(summed.weights, current.residual), summed.rows, found


def ask_each(
    link: Link,
    nodes: Mapping[str, str],
    request: bytes,
    seconds: float,
    name: str,
    read: Callable[[bytes | str], Answer],
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Ask all nodes (id → name) the same.

    Return what `read` makes of each answer, by node; and the first line of why there is none, by name: `read`
    raises RatchetError for an answer that cannot be used.
    """
    replies = link.ask(dict.fromkeys(nodes, request), seconds, name)
    found: dict[str, Answer] = {}
    left_out = {}
    for node, called in nodes.items():
        try:
            found[node] = read(replies.get(node, "it did not answer"))
        except RatchetError as error:
            left_out[called] = str(error).splitlines()[0]
    return found, left_out


def sum_of(link: Link, plan: Plan, number: int, home: Path, nodes: Mapping[str, str]) -> Sum:
    """Return the secure sum that goes on in this round, whose files are in `home`, or a new one."""
    attempt = _attempt(home)

    def ask(requests: Mapping[str, bytes], step: str) -> dict[str, bytes | str]:
        return link.ask(requests, STEP_SECONDS, f"{plan.run}-{number}-{attempt}-{step}")

    return Sum(plan.run, number, attempt, ask, plan.settings.min_nodes, nodes)


def score_at_nodes(
    link: Link, home: Path, plan: Plan, asked: messages.Score, tensors: Mapping[str, Tensor]
) -> Scores:
    """Ask the nodes that are connected to compare candidate and rival on their own held-out rows.

    A node that does not answer with sums is named; none has to. With `asked.masked` the sum of all nodes is
    all that is learned. `home` is the folder of the comparison: a coordinator that was killed asks the same
    nodes again.
    """
    nodes = asked_nodes(link, home)

    def read(answer: bytes | str) -> dict[str, Sums]:
        groups: dict[str, Sums] = messages.read_answer(answer, messages.Scored).header.groups
        if fault := check_sums(groups, asked.least):
            raise UserError(fault)
        if not groups and not asked.masked:
            raise UserError(f"it has fewer than {asked.least} held-out rows")
        return groups

    request, seconds = write_message(asked, tensors), plan.settings.round_minutes * 60
    found, left_out = ask_each(link, nodes, request, seconds, f"{plan.run}-score", read)
    rival = "champion" if "champion" in asked.adapters else "base"
    if not asked.masked:
        return Scores(asked.metric, rival, {nodes[node]: groups for node, groups in found.items()}, left_out)
    sum_ = sum_of(link, plan, asked.round, home, nodes)
    try:
        values, summed = sum_.total(list(found), len(Sums.__struct_fields__))
    except RatchetError as error:
        left_out |= {nodes[node]: str(error).splitlines()[0] for node in found}
        return Scores(asked.metric, rival, {}, left_out)
    left_out |= sum_.left_out
    sums = Sums(round(values[0]), *(float(value) for value in values[1:]))
    return Scores(asked.metric, rival, {}, left_out, sums, sorted(nodes[node] for node in summed))
