"""Sum the updates of nodes under masks, so that the coordinator learns the sum alone.

The nodes' part is in `ratchet.federation.node`, the protocol in `ratchet.federation.masking`. A node that
drops out at any step costs the round nothing but its own update, as long as over half of them go on. One that
drops out after it sent its vector costs nothing: the vector is in the sum, and the others' shares are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ratchet.errors import DataError, RatchetError, UserError
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
    left_out: dict[str, str]  # name → reason
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


def tag_of(run: str, number: int, attempt: str) -> bytes:
    return f"{run}/{number}/{attempt}".encode()


class SharesMissing(UserError):
    """The vectors are here, and too few shares of their masks: the same shares can be asked for again."""


class SharesWrong(UserError):
    """The shares that nodes gave fit no mask: nodes give them once, so the run cannot be gone on with."""


def check_enough(number: int, nodes: Sized, least: int, left_out: Mapping[str, str]) -> None:
    """Raise UserError unless a round has the updates of enough nodes; `left_out`: name → reason."""
    if len(nodes) < least:
        raise UserError(
            f"round {number} has the updates of {len(nodes)} nodes, wanted {least}{_why(left_out)}",
            remedy="the champion stays; mend the nodes that are named, and start the training again; "
            "`federate.min_nodes` asks for them, and a secure sum for more than half of those that trained",
        )


def _why(left_out: Mapping[str, str]) -> str:
    return f" ({'; '.join(f'{node}: {reason}' for node, reason in left_out.items())})" if left_out else ""


class Sum:
    """One round's secure sum, seen from the coordinator."""

    def __init__(
        self, run: str, number: int, attempt: str, ask: Ask, least: int, names: Mapping[str, str]
    ) -> None:
        """`least` nodes have to be in the sum; `attempt` is another one when it is begun anew.

        `names`: node → what it is called in reasons.
        """
        self._which = (run, number, attempt)
        self._number, self._ask, self._least, self._names = number, ask, least, names
        self.left_out: dict[str, str] = {}  # name → reason
        self._size = 0

    def of(self, nodes: list[str], current: Mapping[str, Tensor], factors: str) -> Summed:
        """Return the mean of the nodes' adapters. Raises UserError: too few of them went through."""
        names = masked_names(current, factors)
        values, summed = self.total(nodes, sum(current[name].numel() for name in names) + 1)
        return self._mean(values, current, names, summed)

    def total(self, nodes: list[str], length: int) -> tuple[Words, list[str]]:
        """Return the sum of the nodes' vectors of this length, and who is in it.

        Raises UserError: too few of them went through; SharesMissing: they did, and then went away;
        SharesWrong.
        """
        places = dict(enumerate(sorted(nodes), start=1))
        threshold, which = len(places) // 2 + 1, self._which
        least = max(self._least, threshold)
        self._check(places, least)
        published = self._step(
            "keys", {place: messages.Keys(*which, place, threshold) for place in places}, places
        )
        publics = {place: (found.header.masks, found.header.letters) for place, found in published.items()}
        for place, keys in list(publics.items()):
            if not all(masking.can_agree(bytes.fromhex(key)) for key in keys):
                self.left_out[self._names[places[place]]] = "keys: no secret can be agreed on with its keys"
                del published[place], publics[place]
        self._check(published, least)
        dealt = self._step("deal", {place: messages.Deal(*which, publics) for place in published}, places)
        for place in list(dealt):
            if {*dealt[place].header.letters, place} != {*publics}:
                self.left_out[self._names[places[place]]] = "deal: its letters are for other nodes"
                del dealt[place]
        self._check(dealt, least)
        letters = {
            place: {sender: found.header.letters[place] for sender, found in dealt.items() if sender != place}
            for place in dealt
        }
        masked = self._step(
            "mask", {place: messages.Mask(*which, theirs) for place, theirs in letters.items()}, places
        )
        vectors = {}
        for place, message in masked.items():
            words = message.tensors.get("words")
            if words is None or words.dtype != torch.int64 or tuple(words.shape) != (length,):
                self.left_out[self._names[places[place]]] = "it sent a vector of another length"
            else:
                vectors[place] = words.numpy().view(np.uint64)
        self._check(vectors, least)
        sent, dropped = sorted(vectors), sorted(dealt.keys() - vectors.keys())
        revealed = self._step(
            "reveal", {place: messages.Reveal(*which, sent, dropped) for place in vectors}, places
        )
        for place in list(revealed):
            header = revealed[place].header
            if ([*sorted(header.seeds)], [*sorted(header.keys)]) != (sent, dropped):
                self.left_out[self._names[places[place]]] = "reveal: its shares are of other nodes"
                del revealed[place]
        if len(revealed) < threshold:
            raise SharesMissing(
                f"{len(revealed)} nodes gave their shares in round {self._number}, wanted {threshold}"
                + _why(self.left_out),
                remedy="the champion stays; start the training again when the nodes that are named are back: "
                "they are asked for the same shares",
            )
        try:
            values = masking.decode(
                masking.unmask(
                    vectors,
                    {place: masking.Publics(*map(bytes.fromhex, publics[place])) for place in dealt},
                    [
                        masking.Revealed(
                            _shares(place, found.header.keys), _shares(place, found.header.seeds)
                        )
                        for place, found in revealed.items()
                    ],
                    tag=tag_of(*which),
                    threshold=threshold,
                )
            )
        except DataError as error:
            raise SharesWrong(
                f"round {self._number}: {str(error).splitlines()[0]}",
                remedy="the champion stays, and the run is given up: start the training again, which begins "
                "another one; a node of the sum sent a wrong share, and which one cannot be told",
            ) from error
        return values, [places[place] for place in sent]

    def _step(
        self, name: str, requests: Mapping[int, messages.Request], places: Mapping[int, str]
    ) -> dict[int, Message]:
        """Ask the nodes at these places, and return the replies that are what was asked for."""
        replies = self._ask({places[place]: write_message(asked) for place, asked in requests.items()}, name)
        found = {}
        for place in requests:
            reply = replies.get(places[place], "it did not answer")
            self._size += len(reply) if isinstance(reply, bytes) else 0
            try:
                found[place] = messages.read_answer(reply, WANTED[name])
            except RatchetError as error:
                self.left_out[self._names[places[place]]] = f"{name}: {str(error).splitlines()[0]}"
        return found

    def _check(self, found: Mapping[int, object], least: int) -> None:
        check_enough(self._number, found, least, self.left_out)

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
