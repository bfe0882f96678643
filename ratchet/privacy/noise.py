"""Draw a training's samples and noise from a secret key, the same ones again after a kill.

Whoever knew the noise could subtract it, and whoever knew which rows a step has would know more than the
accounting allows. So neither may come from `train.seed`, which is in git, nor from a generator whose state
can be found from its output or by trying all seeds (torch's has 32 bits of seed on a CPU). Both come from
ChaCha20 (RFC 8439) with 256 bits of the system's randomness; purpose and step are the nonce, so there is no
state to save but the key. The key lies beside the training's checkpoints, for its owner alone (mode 0600),
and is removed with them when the training has ended.

A float is not a real number: the last bits of a Gaussian made of two uniform numbers can betray what it was
added to (Mironov 2012). As in Opacus's secure mode, each is a sum of four (arXiv 2107.10138).
"""

from __future__ import annotations

import math
import secrets
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from ratchet.errors import RatchetError
from ratchet.files import write_private

KEY_BYTES = 32
KEY_FILE = "privacy.key"
SUMMED = 4  # normal numbers in one
Values = npt.NDArray[np.float64]


class Purpose(IntEnum):
    """What a stream of random bytes is for; streams of two purposes have nothing in common."""

    SAMPLE = 1
    NOISE = 2


def keep_key(folder: Path) -> bytes:
    """Return the key in `folder`; make one if there is none. Raises RatchetError for a broken one."""
    path = folder / KEY_FILE
    if not path.exists():
        write_private(path, secrets.token_bytes(KEY_BYTES))
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise RatchetError(
            f"{path} holds {len(key)} bytes, wanted {KEY_BYTES}",
            remedy=f"remove {folder}: the training begins again",
        )
    return key


def uniform(key: bytes, purpose: Purpose, number: int, count: int, part: int = 0) -> Values:
    """Draw `count` numbers from 0 (included) to 1, with 53 bits each, for a part of step `number`."""
    nonce = b"".join(  # 16 bytes: the cipher's own counter, then ours
        value.to_bytes(size, "little") for value, size in ((0, 4), (purpose, 2), (part, 4), (number, 6))
    )
    cipher: Any = Cipher(algorithms.ChaCha20(key, nonce), mode=None)
    words = np.frombuffer(cipher.encryptor().update(bytes(8 * count)), dtype="<u8")
    return (words >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def normal(key: bytes, number: int, count: int, part: int = 0) -> Values:
    """Draw the noise of step `number`: `count` numbers from the standard normal distribution."""
    pairs = SUMMED * count // 2
    drawn = uniform(key, Purpose.NOISE, number, 2 * pairs, part).reshape(2, pairs)
    radius, angle = np.sqrt(-2 * np.log1p(-drawn[0])), 2 * np.pi * drawn[1]  # Box and Muller 1958
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    summed: Values = both.reshape(SUMMED, count).sum(0) / math.sqrt(SUMMED)
    return summed


def draw_units(key: bytes, number: int, units: int, rate: float) -> list[int]:
    """Draw from the units for step `number`: each by itself with probability `rate` (Poisson sampling)."""
    return [int(unit) for unit in np.flatnonzero(uniform(key, Purpose.SAMPLE, number, units) < rate)]
