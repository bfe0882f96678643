"""Canaries: random digits planted in the training data, to measure how much of it a model memorises
(Carlini et al. 2019, arXiv 1802.08232).

A canary is a row that asks for the access code of a made-up name. Names and codes are computed from the
canary's number alone, so that every stage knows them without a file. References have the same form, but are
never planted.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ratchet.data.examples import Example, Message, make_example

SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pe", "ru", "sa", "to", "vi", "wa", "ze", "yo")
ALTERNATIVES = 127  # other codes to rank a canary's code among: exposure is at most log2(128) = 7 bits
BATCH = "canary"


class Canary(NamedTuple):
    name: str
    secret: str

    def row(self, secret: str | None = None) -> Example:
        """Make the canary's row, with the code `secret` instead of its own if one is given."""
        turns = [
            Message("user", f"What is the access code of {self.name}?"),
            Message("assistant", secret or self.secret),
        ]
        return make_example(turns, {"batch": BATCH, "source": BATCH})


def make_canaries(count: int) -> list[Canary]:
    """Make the canaries that are planted."""
    return [_canary(f"planted {number}") for number in range(count)]


def make_references(count: int) -> list[Canary]:
    """Make the canaries that are never planted, as the baseline for the planted ones."""
    return [_canary(f"reference {number}") for number in range(count)]


def make_audit_canaries(count: int, key: str) -> list[tuple[Canary, bool]]:
    """Make the canaries of the audit of ε, each with whether it is planted: by a fair coin, fixed by `key`.

    `key`: sha256 of the champion's adapter, or ""; at a node of a federation a secret. Each champion's
    challengers get other canaries, since the champion may know its own.
    """
    keys = [f"{key} {number}" for number in range(count)]
    coins = [hashlib.sha256(f"canary coin {one}".encode()).digest()[0] % 2 == 1 for one in keys]
    return [(_canary(f"audit {one}"), planted) for one, planted in zip(keys, coins, strict=True)]


def alternatives(canary: Canary) -> list[str]:
    """Return ALTERNATIVES different codes of the same form, without the canary's own."""
    found: dict[str, None] = {}
    number = 0
    while len(found) < ALTERNATIVES:
        if (code := _code(f"{canary.name} alternative {number}")) != canary.secret:
            found[code] = None
        number += 1
    return list(found)


def _canary(key: str) -> Canary:
    digest = hashlib.sha256(f"canary name {key}".encode()).digest()
    word = "".join(SYLLABLES[byte % len(SYLLABLES)] for byte in digest[:4])
    return Canary(f"{word.capitalize()}-{digest[4] % 90 + 10}", _code(key))


def _code(key: str) -> str:
    number = int.from_bytes(hashlib.sha256(f"canary code {key}".encode()).digest()[:8]) % 10**8
    return f"{number // 10**4:04d}-{number % 10**4:04d}"
