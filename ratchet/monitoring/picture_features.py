"""What pictures show, as the model that answers sees them: one small vector a picture, to be compared.

`ratchet.engines.picture_pooling` gets them from a model. A vector is projected to DIMENSIONS at random, which
keeps distances (Johnson and Lindenstrauss 1984) and keeps the log small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratchet.errors import DataError
from ratchet.media.names import is_sound

FILE = "pictures.safetensors"
DIMENSIONS = 128
SIDES = ("held_out", "trained")
Vectors = NDArray[np.float32]


class Features(msgspec.Struct, frozen=True):
    """Packed features of the champion's pictures, by name: of held-out rows and of those it learned from."""

    held_out: dict[str, bytes] = {}
    trained: dict[str, bytes] = {}


def sample(names: Iterable[str], most: int) -> list[str]:
    """Return the `most` smallest names of pictures; names are hashes, so this is a random sample."""
    return sorted({name for name in names if not is_sound(name)})[:most]


def pack(features: Vectors) -> bytes:
    """Return pooled features, (width,), as at most DIMENSIONS numbers of float16.

    Roots come first, since a few of a tower's dimensions are far larger than the others and would be all
    that a distance tells. Features that are not finite give b"".
    """
    even = np.sign(features) * np.sqrt(np.abs(features))
    length = float(np.linalg.norm(even))
    if not np.isfinite(length) or not length:
        return b""
    even = even / length
    if len(even) > DIMENSIONS:
        even = even @ _directions(len(even))
    return even.astype("<f2").tobytes()


@cache
def _directions(width: int) -> Vectors:
    """Draw the directions of the projection, (width, DIMENSIONS): the same ones at every start."""
    drawn = np.random.RandomState(width).standard_normal((width, DIMENSIONS))  # whose stream never changes
    return np.asarray(drawn / np.sqrt(DIMENSIONS), dtype=np.float32)


def unpack(packed: Sequence[bytes]) -> Vectors:
    """Return packed features as (pictures, dimensions)."""
    return np.array([np.frombuffer(one, "<f2") for one in packed], dtype=np.float32)


def write_features(path: Path, features: Features) -> None:
    from safetensors.numpy import save_file

    sides = {side: getattr(features, side) for side in SIDES}
    save_file(
        {side: unpack(list(found.values())).astype(np.float16) for side, found in sides.items()},
        path,
        {side: json.dumps(list(found)) for side, found in sides.items()},
    )


def read_features(path: Path) -> Features:
    """Read the file; without it there are none. Raises DataError for a malformed file."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return Features()
    try:
        with safe_open(path, "numpy") as stored:
            names = {side: json.loads(stored.metadata()[side]) for side in SIDES}
            found = {
                side: dict(zip(names[side], map(_bytes, stored.get_tensor(side)), strict=True))
                for side in SIDES
            }
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} holds no features of pictures: {error}",
            remedy="remove .ratchet/monitor; it is made anew",
        ) from None
    return Features(**found)


def _bytes(vector: NDArray[np.float16]) -> bytes:
    return vector.astype("<f2").tobytes()
