"""Canaries: random digits planted in the training data, to measure how much of it a model gives away
(Carlini et al. 2019, arXiv 1802.08232).

A canary is a row that asks for the access code of a made-up name. Names and codes follow from the number of
the canary alone, so that every stage knows them without a file. References are of the same form and never
planted.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from ratchet.data.examples import Example, Message, make_example

SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pe", "ru", "sa", "to", "vi", "wa", "ze", "yo")
ALTERNATIVES = 127  # other codes that a canary's is ranked among: exposure goes up to log2(128) = 7 bits
BATCH = "canary"


class Canary(NamedTuple):
    name: str
    secret: str

    def row(self, secret: str | None = None) -> Example:
        """Make the canary's row, with the code `secret` in place of its own where one is given."""
        turns = [
            Message("user", f"What is the access code of {self.name}?"),
            Message("assistant", secret or self.secret),
        ]
        return make_example(turns, {"batch": BATCH, "source": BATCH})


def make_canaries(count: int) -> list[Canary]:
    """Make the canaries that are planted."""
    return [_canary(f"planted {number}") for number in range(count)]


def make_references(count: int) -> list[Canary]:
    """Make the canaries that are never planted, to compare with."""
    return [_canary(f"reference {number}") for number in range(count)]


def alternatives(canary: Canary) -> list[str]:
    """Return other codes of the same form, each once."""
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
