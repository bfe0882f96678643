"""Sum the vectors of nodes without learning any single one: masks that cancel in pairs.

The protocol of Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS
2017), with both masks: each pair of nodes shares one that cancels in the sum, and each node has one of its
own, which is taken off by shares that the others hold. A node that drops out costs nothing: enough of the
others give their shares of its key. The sum is of whole numbers modulo 2⁶⁴, so it is exact.

The coordinator is expected to relay messages as they are; it learns the sum, who took part, and nothing more,
unless it works together with as many nodes as the threshold says. A node never reveals both its shares of
another node's key and of that node's own mask, since both together would show its vector.

A node may be killed between any two writes, and is asked again then. So what a member answers follows from
its secrets, which are drawn and stored once, and from the question; and its caller stores the first question
of each step (`Member.state`) before the answer leaves. Asked the same again, it gives the same bytes, which
tell nothing new. Asked anything else, it gives nothing: two vectors under one mask show their difference,
letters of two polynomials do not fit together, and shares for two splits show a single vector.

A sum that failed is tried again with fresh keys. A member that has given its shares is not replaced: each
node does so in one try of a sum at most, and takes part in no later one. As more than half of a try's nodes
have to give shares before it can be summed, two tries that were summed differ by two nodes at least, and no
combination of such sums is a single vector.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from ratchet.errors import DataError, UserError

STEPS = 2**24  # of a unit: numbers are rounded to multiples of 1 / STEPS
MOST = 2**62  # the sum of all nodes' steps has to stay below, or it would wrap around
PRIME = 2**521 - 1  # of the field of the shares; a secret has 256 bits
SECRET = 32  # bytes
NONCE = bytes(12)  # every key encrypts one message

Words = NDArray[np.uint64]


# --- numbers ---


def encode(values: NDArray[np.floating], members: int) -> Words:
    """Round numbers to whole steps modulo 2⁶⁴, for a sum of `members` vectors.

    Raises DataError: one is not finite, or so large that the sum could wrap around.
    """
    steps = np.rint(np.asarray(values, np.float64) * STEPS)
    if not np.isfinite(steps).all() or (steps.size and np.abs(steps).max() >= MOST / members):
        raise DataError(
            f"a vector holds numbers that are not finite or over {MOST / members / STEPS:.3g} in size",
            remedy="the training diverged: lower its learning rate",
        )
    return steps.astype(np.int64).view(np.uint64)


def decode(words: Words) -> NDArray[np.float64]:
    """Return the numbers of a sum of encoded vectors.

    Raises DataError: it is none. What is left of a mask after a wrong share is as random as the mask, so half
    of its words are as large as no sum of encoded numbers.
    """
    steps = words.view(np.int64)
    if large := int(((steps >= MOST) | (steps <= -MOST)).sum()):
        raise DataError(
            f"the sum holds {large} numbers of {len(steps)} that no sum of nodes can hold",
            remedy="a node sent a wrong share: start the round again",
        )
    return steps.astype(np.float64) / STEPS


# --- shares of a secret ---


class Share(NamedTuple):
    """A share of a secret: the value of a random polynomial at `place` (Shamir, CACM 1979)."""

    place: int
    value: int


def split(secret: bytes, places: Collection[int], threshold: int) -> dict[int, Share]:
    """Split a secret so that any `threshold` shares give it, and fewer tell nothing; places are over 0."""
    factors = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    found = {}
    for place in places:
        value = 0
        for factor in reversed(factors):
            value = (value * place + factor) % PRIME
        found[place] = Share(place, value)
    return found


def combine(shares: Collection[Share], threshold: int) -> bytes:
    """Return the secret. Raises UserError: too few shares; DataError: they are not of one secret."""
    chosen = list({share.place: share for share in shares}.values())[:threshold]
    if len(chosen) < threshold:
        raise UserError(
            f"{len(chosen)} shares of a secret are here, {threshold} are needed",
            remedy="too many nodes dropped out: this round ends without a sum; start another",
        )
    total = 0
    for share in chosen:
        above, below = 1, 1
        for other in chosen:
            if other.place != share.place:
                above = above * -other.place % PRIME
                below = below * (share.place - other.place) % PRIME
        total = (total + share.value * above * pow(below, -1, PRIME)) % PRIME
    if total >= 2 ** (8 * SECRET):
        raise DataError(
            "the shares of a secret do not fit together",
            remedy="a node sent a wrong share: start the round again",
        )
    return total.to_bytes(SECRET, "big")


# --- masks ---


def can_agree(key: bytes) -> bool:
    """Return whether a public key leads to secrets: a few points lead everybody to zero (RFC 7748, 6.1)."""
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return False
    return True


def _agree(ours: X25519PrivateKey, theirs: bytes, purpose: bytes) -> bytes:
    shared = ours.exchange(X25519PublicKey.from_public_bytes(theirs))
    return HKDF(hashes.SHA256(), SECRET, None, purpose).derive(shared)


def _stream(seed: bytes, size: int) -> Words:
    """Return `size` words that only a holder of the seed can tell from random ones (ChaCha20)."""
    cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(cipher.update(bytes(8 * size)), np.dtype("<u8")).astype(np.uint64)


def _pair_mask(ours: X25519PrivateKey, own: int, other: int, theirs: bytes, tag: bytes, size: int) -> Words:
    """Return the mask that `own` adds for its pair with `other`; the other one adds its negative."""
    mask = _stream(_agree(ours, theirs, b"mask" + tag), size)
    return mask if own < other else np.uint64(0) - mask


class Member:
    """One node in one try of a sum. `place` is its number there, over 0; `tag` names the try."""

    def __init__(self, place: int, tag: bytes, threshold: int) -> None:
        """Draw fresh keys. A key serves one try only: used twice, masks would show differences."""
        self.place, self.tag, self.threshold = place, tag, threshold
        self._key, self._letters = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(SECRET)
        self._publics: dict[int, Publics] = {}
        self._letters_out: dict[int, bytes] = {}
        self._held: dict[int, tuple[Share, Share]] = {}  # of other nodes: of the key, of the seed
        self._masked = ""  # sha256 of the letters and of the vector that the masks are for
        self._revealed: tuple[frozenset[int], frozenset[int]] | None = None

    def state(self) -> dict[str, Any]:
        """Return all that a restarted node needs to go on, for JSON. It holds secrets: mode 0600."""
        return {
            "place": self.place,
            "tag": self.tag.hex(),
            "threshold": self.threshold,
            "keys": [self._key.private_bytes_raw().hex(), self._letters.private_bytes_raw().hex()],
            "seed": self._seed.hex(),
            "publics": {node: [key.hex() for key in keys] for node, keys in self._publics.items()},
            "letters": {node: letter.hex() for node, letter in self._letters_out.items()},
            "held": {node: [hex(share.value) for share in shares] for node, shares in self._held.items()},
            "masked": self._masked,
            "revealed": self._revealed and [sorted(nodes) for nodes in self._revealed],
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Member:
        """Return the member that `state` describes."""
        member = cls(state["place"], bytes.fromhex(state["tag"]), state["threshold"])
        member._key, member._letters = (
            X25519PrivateKey.from_private_bytes(bytes.fromhex(key)) for key in state["keys"]
        )
        member._seed = bytes.fromhex(state["seed"])
        member._publics = {
            int(node): Publics(*(bytes.fromhex(key) for key in keys))
            for node, keys in state["publics"].items()
        }
        member._letters_out = {int(node): bytes.fromhex(text) for node, text in state["letters"].items()}
        member._held = {
            int(node): (Share(member.place, int(one, 16)), Share(member.place, int(other, 16)))
            for node, (one, other) in state["held"].items()
        }
        member._masked = state["masked"]
        if state["revealed"]:
            sent, dropped = map(frozenset, state["revealed"])
            member._revealed = (sent, dropped)
        return member

    @property
    def has_revealed(self) -> bool:
        """Whether it gave its shares, so that its vector may be in a sum."""
        return self._revealed is not None

    @property
    def publics(self) -> Publics:
        """The keys that all others get."""
        return Publics(
            self._key.public_key().public_bytes_raw(), self._letters.public_key().public_bytes_raw()
        )

    def deal(self, publics: Mapping[int, Publics]) -> dict[int, bytes]:
        """Return a sealed letter for each other node, with its shares of this node's two secrets.

        Raises UserError: there are fewer nodes than the threshold, or at least twice as many, so that two
        halves could be asked for other shares; another node has this one's number; or letters were dealt to
        other nodes before.
        """
        if self._publics:
            self._check_same(self._publics == dict(publics), "letters for other nodes")
            return dict(self._letters_out)
        few = len(publics) < self.threshold
        if few or len(publics) >= 2 * self.threshold or publics.get(self.place) != self.publics:
            raise UserError(
                f"the round has {len(publics)} nodes for a threshold of {self.threshold}; wanted at least "
                "as many, fewer than twice as many, and each with its own keys",
                remedy="wait for more nodes, or raise the threshold over half of them",
            )
        self._publics = dict(publics)
        keys = split(self._key.private_bytes_raw(), publics, self.threshold)
        seeds = split(self._seed, publics, self.threshold)
        self._held[self.place] = (keys[self.place], seeds[self.place])
        for other in publics:
            if other != self.place:
                text = b"".join(share.value.to_bytes(66, "big") for share in (keys[other], seeds[other]))
                cipher = ChaCha20Poly1305(self._letter_key(self.place, other))
                self._letters_out[other] = cipher.encrypt(NONCE, text, None)
        return dict(self._letters_out)

    def _letter_key(self, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.place else sender
        purpose = b"letter" + self.tag + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")
        return _agree(self._letters, self._publics[other].letters, purpose)

    def _receive(self, letters: Mapping[int, bytes]) -> None:
        for sender, letter in letters.items():
            try:
                text = ChaCha20Poly1305(self._letter_key(sender, self.place)).decrypt(NONCE, letter, None)
            except (InvalidTag, KeyError):
                raise DataError(
                    f"the letter of node {sender} cannot be opened", remedy="start the round again"
                ) from None
            values = (int.from_bytes(text[:66], "big"), int.from_bytes(text[66:], "big"))
            self._held[sender] = (Share(self.place, values[0]), Share(self.place, values[1]))

    def mask(self, letters: Mapping[int, bytes], words: Words) -> Words:
        """Return the vector with all masks. Only nodes whose letters came (by sender) take part in them.

        Raises DataError: a letter was changed on its way; UserError: fewer letters than the threshold, or
        another vector or other letters were masked before.
        """
        texts = b"".join(number.to_bytes(4, "big") + letters[number] for number in sorted(letters))
        asked = hashlib.sha256(hashlib.sha256(texts).digest() + words.tobytes()).hexdigest()
        self._check_same(self._masked in ("", asked), "another vector under the same masks")
        self._receive(letters)
        if len(self._held) < self.threshold:
            raise UserError(
                f"letters of {len(self._held)} nodes are here, {self.threshold} are needed",
                remedy="wait for more nodes, and start the round again",
            )
        self._masked = asked
        masked = words + _stream(self._seed, words.size)
        for other in self._held:
            if other != self.place:
                theirs = self._publics[other].masks
                masked = masked + _pair_mask(self._key, self.place, other, theirs, self.tag, words.size)
        return masked

    def _check_same(self, same: bool, what: str) -> None:
        if not same:
            raise UserError(
                f"the coordinator asks this node for {what}: a step of a sum has one answer",
                remedy="this node gives none; leave the federation unless its coordinator can explain it",
            )

    def reveal(self, sent: Collection[int], dropped: Collection[int]) -> Revealed:
        """Return this node's shares: of the keys of nodes that dropped out, of the masks of the others.

        Raises UserError: a node stands in both lists, too few sent something, or another split was asked for
        before; each would let the coordinator see a single vector.
        """
        asked = (frozenset(sent), frozenset(dropped))
        if asked[0] & asked[1] or len(asked[0]) < self.threshold or self._revealed not in (None, asked):
            raise UserError(
                f"the coordinator asks for shares that would show a single node's update: of nodes "
                f"{sorted(asked[0])} as present and {sorted(asked[1])} as away",
                remedy="this node gives none; leave the federation unless its coordinator can explain it",
            )
        self._revealed = asked
        return Revealed(
            keys={node: self._held[node][0] for node in asked[1] if node in self._held},
            seeds={node: self._held[node][1] for node in asked[0] if node in self._held},
        )


class Publics(NamedTuple):
    """A node's public keys of one round: for masks, and for letters."""

    masks: bytes
    letters: bytes


class Revealed(NamedTuple):
    """One node's shares, by the node whose secret they are of."""

    keys: Mapping[int, Share]
    seeds: Mapping[int, Share]


def unmask(
    masked: Mapping[int, Words],
    publics: Mapping[int, Publics],
    revealed: Sequence[Revealed],
    *,
    tag: bytes,
    threshold: int,
) -> Words:
    """Return the sum of the vectors that came, modulo 2⁶⁴.

    `masked` are those that came, `publics` those of all nodes that dealt letters. Raises UserError: there are
    too few shares; DataError: they do not fit.
    """
    total = np.sum(list(masked.values()), axis=0, dtype=np.uint64)
    for node in masked:
        seed = combine([each.seeds[node] for each in revealed if node in each.seeds], threshold)
        total = total - _stream(seed, total.size)
    for node in publics.keys() - masked.keys():
        raw = combine([each.keys[node] for each in revealed if node in each.keys], threshold)
        key = X25519PrivateKey.from_private_bytes(raw)
        if key.public_key().public_bytes_raw() != publics[node].masks:
            raise DataError(
                f"the shares of node {node}'s key give another key",
                remedy="a node sent a wrong share: start the round again",
            )
        for other in masked:
            # The others added the negative of what the missing node would have added.
            total = total + _pair_mask(key, node, other, publics[other].masks, tag, total.size)
    return np.asarray(total, np.uint64)
