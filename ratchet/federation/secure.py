"""Sum the updates of nodes under masks, so that the coordinator learns the sum alone.

The nodes' part is in `ratchet.federation.node`, the protocol in `ratchet.federation.masking`. A node that
drops out at any step costs the round nothing but its own update, as long as over half of them go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ratchet.errors import RatchetError, UserError
from ratchet.federation import masking, messages
from ratchet.federation.aggregation import DOWN, UP
from ratchet.federation.messages import Message, write_message

Ask = Callable[[Mapping[str, bytes], str], dict[str, bytes | str]]  # requests by node, name of the step
Words = np.ndarray[Any, np.dtype[np.float64]]


class Summed(NamedTuple):
    """The weighted sum of the nodes' changes, and who is in it."""

    weights: dict[str, Tensor]  # the mean adapter
    rows: int
    nodes: list[str]
    left_out: dict[str, str]  # node → reason
    received_bytes: int


def masked_names(weights: Mapping[str, Tensor], factors: str) -> list[str]:
    """Return the names of the weights that a round trains, in the order of the masked vector."""
    frozen = {"up": DOWN, "down": UP}.get(factors, "\0")
    return sorted(name for name in weights if not name.endswith(frozen))


def words_of(trained: Mapping[str, Tensor], start: Mapping[str, Tensor], rows: int, factors: str) -> Words:
    """Return what a node adds to the sum: rows · (trained - start) of each weight, and the rows."""
    parts = [
        ((trained[name].double() - start[name].double()) * rows).flatten().numpy()
        for name in masked_names(start, factors)
    ]
    return np.concatenate([*parts, np.array([float(rows)])])


def tag_of(run: str, number: int) -> bytes:
    return f"{run}/{number}".encode()


class Sum:
    """One round's secure sum, seen from the coordinator."""

    def __init__(self, run: str, number: int, ask: Ask, least: int) -> None:
        """`least` nodes have to be in the sum."""
        self._run, self._number, self._ask, self._least = run, number, ask, least
        self.left_out: dict[str, str] = {}
        self._size = 0

    def of(self, nodes: list[str], current: Mapping[str, Tensor], factors: str) -> Summed:
        """Return the mean of the nodes' adapters. Raises UserError: too few of them went through."""
        names = masked_names(current, factors)
        values, summed = self.total(nodes, sum(current[name].numel() for name in names) + 1)
        return self._mean(values, current, names, summed)

    def total(self, nodes: list[str], length: int) -> tuple[Words, list[str]]:
        """Return the sum of the nodes' vectors of this length, and who is in it.

        Raises UserError: too few of them went through.
        """
        places = dict(enumerate(sorted(nodes), start=1))
        threshold = len(places) // 2 + 1
        run, number = self._run, self._number
        published = self._step(
            "keys", {place: messages.Keys(run, number, place, threshold) for place in places}, places
        )
        publics = {place: (found.header.masks, found.header.letters) for place, found in published.items()}
        dealt = self._step(
            "deal", {place: messages.Deal(run, number, publics) for place in published}, places
        )
        letters = {
            place: {sender: found.header.letters[place] for sender, found in dealt.items() if sender != place}
            for place in dealt
        }
        masked = self._step(
            "mask", {place: messages.Mask(run, number, theirs) for place, theirs in letters.items()}, places
        )
        vectors = {}
        for place, message in masked.items():
            words = message.tensors.get("words")
            if words is None or words.dtype != torch.int64 or tuple(words.shape) != (length,):
                self.left_out[places[place]] = "it sent a vector of another length"
            else:
                vectors[place] = words.numpy().view(np.uint64)
        self._check(vectors)
        sent, dropped = sorted(vectors), sorted(dealt.keys() - vectors.keys())
        revealed = self._step(
            "reveal", {place: messages.Reveal(run, number, sent, dropped) for place in vectors}, places
        )
        total = masking.unmask(
            vectors,
            {place: masking.Publics(*map(bytes.fromhex, publics[place])) for place in dealt},
            [
                masking.Revealed(_shares(place, found.header.keys), _shares(place, found.header.seeds))
                for place, found in revealed.items()
            ],
            tag=tag_of(run, number),
            threshold=threshold,
        )
        return masking.decode(total), [places[place] for place in sent]

    def _step(
        self, name: str, requests: Mapping[int, messages.Request], places: Mapping[int, str]
    ) -> dict[int, Message]:
        """Ask the nodes at these places, and return the replies that are what was asked for."""
        replies = self._ask({places[place]: write_message(asked) for place, asked in requests.items()}, name)
        found = {}
        for place in requests:
            reply = replies.get(places[place], "it did not answer")
            try:
                if isinstance(reply, str):
                    raise UserError(reply)
                self._size += len(reply)
                message = messages.read_reply(reply)
                if not isinstance(message.header, WANTED[name]):
                    kind = type(message.header).__name__
                    raise UserError(getattr(message.header, "reason", f"it sent {kind}"))
                found[place] = message
            except RatchetError as error:
                self.left_out[places[place]] = f"{name}: {str(error).splitlines()[0]}"
        self._check(found)
        return found

    def _check(self, found: Mapping[int, object]) -> None:
        if len(found) < self._least:
            why = "; ".join(f"{node}: {reason}" for node, reason in self.left_out.items())
            raise UserError(
                f"{len(found)} nodes are in the sum of round {self._number}, wanted {self._least}: {why}",
                remedy="the champion stays; mend the nodes that are named, and start the training again",
            )

    def _mean(
        self, values: Words, current: Mapping[str, Tensor], names: list[str], nodes: list[str]
    ) -> Summed:
        rows = round(values[-1])
        if rows < 1:
            raise UserError(
                f"the nodes' updates are of {rows} rows in all", remedy="start the training again"
            )
        mean, place = dict(current), 0
        for name in names:
            old = current[name]
            change = torch.from_numpy(values[place : place + old.numel()].copy()).reshape(old.shape) / rows
            mean[name] = (old.double() + change).to(old.dtype)
            place += old.numel()
        return Summed(mean, rows, nodes, self.left_out, self._size)


WANTED: dict[str, type] = {
    "keys": messages.Published,
    "deal": messages.Dealt,
    "mask": messages.Masked,
    "reveal": messages.Revealed,
}


def _shares(place: int, values: Mapping[int, str]) -> dict[int, masking.Share]:
    return {node: masking.Share(place, int(value, 16)) for node, value in values.items()}
