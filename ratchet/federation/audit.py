"""Test the ε of a federation with canaries that its nodes plant among their own rows.

Each node draws its canaries and their coins by a key of its own, plants about half of them in all rounds of
a run, and guesses from the version that comes out which these were. Counts alone leave it. The bound that
follows from the counts of all nodes (`ratchet.privacy.audit`) holds as for one party, since every canary has
a coin of its own, and ε bounds what the version tells of a row at any node.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ratchet.errors import RatchetError, UserError
from ratchet.evaluation.canaries import Canary, make_audit_canaries
from ratchet.federation import messages
from ratchet.federation.messages import write_message
from ratchet.federation.rounds import Link, Plan, ask_each, asked_nodes, sum_of
from ratchet.federation.secure import Words
from ratchet.files import read_json, write_private
from ratchet.privacy.audit import SHARES, Guesses, add_guesses, check_guesses, guess

DRAWN = "canaries.json"  # a run's, at a node


class Drawn(NamedTuple):
    """The canaries of a run at a node: their number, and the key from which they and their coins follow."""

    number: int
    key: str

    @property
    def coins(self) -> list[tuple[Canary, bool]]:
        """Return the canaries, each with whether it is planted."""
        return make_audit_canaries(self.number, self.key)


def keep_drawn(folder: Path, number: int = 0) -> Drawn:
    """Return the canaries of a run, whose files are in `folder`; draw them the first time."""
    path = folder / DRAWN
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_private(path, json.dumps([number, secrets.token_hex(32)]).encode())
    return Drawn(*read_json(path))


def guess_planted(base: Path, version: Path, drawn: Drawn, batch_size: int) -> Guesses:
    """Guess by how much likelier than the base the version finds each canary's code."""
    from ratchet.audits.memorization import measure_losses
    from ratchet.models.adapters import load_trained
    from ratchet.models.loading import load_base, load_chat

    canaries, planted = zip(*drawn.coins, strict=True)
    chat = load_chat(base)
    before, after = (
        np.array(measure_losses(model, chat, canaries, batch_size=batch_size))
        for model in (load_base(base), load_trained(base, version))
    )
    return guess(before - after, np.array(planted))


def words_of_guesses(found: Guesses) -> Words:
    """Return what a node adds to the secure sum."""
    return np.array([found.canaries, *found.made, *found.right], np.float64)


def _read_words(values: Words) -> Guesses:
    counts = [round(value) for value in values]
    return Guesses(counts[0], counts[1 : 1 + len(SHARES)], counts[1 + len(SHARES) :])


class Audited(NamedTuple):
    """The guesses of all nodes together, None without any; who made them, and who did not: name → reason."""

    guesses: Guesses | None
    nodes: list[str]
    left_out: dict[str, str]


def audit_at_nodes(
    link: Link, home: Path, plan: Plan, asked: messages.Audit, tensors: Mapping[str, Tensor]
) -> Audited:
    """Let the nodes that are connected guess which of their canaries the version was trained on.

    With `asked.masked` the sum of their counts is all that is learned. `home` is the folder of the audit: a
    coordinator that was killed asks the same nodes again.
    """
    nodes, request = asked_nodes(link, home), write_message(asked, tensors)
    read = partial(_read_guesses, masked=asked.masked)
    seconds = plan.settings.round_minutes * 60
    found, left_out = ask_each(link, nodes, request, seconds, f"{plan.run}-audit", read)
    if not asked.masked:
        counts = [guesses for guesses in found.values() if guesses]
        names = sorted(nodes[node] for node in found)
        return Audited(add_guesses(counts) if counts else None, names, left_out)
    sum_ = sum_of(link, plan, asked.round, home, nodes)
    try:
        values, summed = sum_.total(list(found), 1 + 2 * len(SHARES))
    except RatchetError as error:
        why = str(error).splitlines()[0]
        return Audited(None, [], left_out | {nodes[node]: why for node in found})
    left_out |= sum_.left_out
    guesses = _read_words(values)
    if fault := check_guesses(guesses):
        return Audited(None, [], left_out | {nodes[node]: fault for node in summed})
    return Audited(guesses, sorted(nodes[node] for node in summed), left_out)


def _read_guesses(answer: bytes | str, *, masked: bool) -> Guesses | None:
    guesses: Guesses | None = messages.read_answer(answer, messages.Audited).header.guesses
    if masked:
        return None
    if guesses is None:
        raise UserError("it sent no counts")
    if fault := check_guesses(guesses):
        raise UserError(fault)
    return guesses
