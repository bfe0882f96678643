"""What pictures show, as the model that answers sees them: one small vector a picture, to be compared.

A model of text and pictures puts the features of a picture, from its vision tower and projector, in the place
of the picture's tokens. Their mean tells what the picture shows, and costs nothing where the model reads the
picture anyway. A vector is projected to DIMENSIONS at random, which keeps distances (Johnson and
Lindenstrauss 1984) and keeps the log small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ratchet.errors import DataError

if TYPE_CHECKING:
    import torch

FILE = "pictures.safetensors"
DIMENSIONS = 128
PICTURES = (".png", ".jpg")  # how the names of pictures end
TOGETHER = 8  # pictures in one pass through the tower
SIDES = ("held_out", "trained")
Vectors = NDArray[np.float32]


class Features(msgspec.Struct, frozen=True):
    """Packed features of the champion's pictures, by name: of held-out rows and of those it learned from."""

    held_out: dict[str, bytes] = {}
    trained: dict[str, bytes] = {}


# --- of a model ---------------------------------------------------------------------------------------------


class _Enough(Exception):
    pass


@contextmanager
def watched(model: Any, *, only: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect the embeddings, (batch, seq, width), that passes within the block give to the language model.

    With `only` a pass ends there, and the block with it: the tower alone runs.
    """
    seen: list[torch.Tensor] = []

    def note(_module: Any, _given: Any, named: Mapping[str, Any]) -> None:
        if named.get("inputs_embeds") is not None:
            seen.append(named["inputs_embeds"].detach())
        if only:
            raise _Enough

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    except _Enough:
        pass
    finally:
        handle.remove()


def pool(
    embeddings: torch.Tensor, ids: torch.Tensor, image_id: int, sizes: Sequence[Sequence[int]]
) -> list[list[bytes]]:
    """Return the packed features of each row's pictures, in order.

    `embeddings` is (batch, seq, width), `ids` (batch, seq); `sizes` says for each picture of a row how many
    of the row's tokens `image_id` are its own. Where they do not match, the features are b"".
    """
    found = []
    for row, tokens, lengths in zip(embeddings, ids, sizes, strict=True):
        features = row[tokens == image_id].float()  # (tokens of pictures, width)
        if not lengths or len(features) != sum(lengths):
            found.append([b""] * len(lengths))
            continue
        parts = features.split(list(lengths))
        found.append([pack(part.mean(0).cpu().numpy()) for part in parts])
    return found


def measure_pictures(
    model: Any, processor: Any, pictures: Mapping[str, bytes], names: Sequence[str]
) -> dict[str, bytes]:
    """Return the packed features of the named pictures; `processor` is the model's MediaProcessor.

    Only the vision tower and the projector run. A picture without finite features is left out.
    """
    import torch

    order, found = sorted(names), dict[str, bytes]()
    for start in range(0, len(order), TOGETHER):
        batch = order[start : start + TOGETHER]
        inputs = processor.alone([pictures[name] for name in batch])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.inference_mode(), watched(model, only=True) as seen:
            model(use_cache=False, **inputs)
        ids = inputs["input_ids"].where(inputs["attention_mask"].bool(), -1)
        sizes = [[int(count)] for count in (ids == processor.image_id).sum(1)]
        pooled = pool(seen[0], ids, processor.image_id, sizes)
        found |= {name: vectors[0] for name, vectors in zip(batch, pooled, strict=True) if vectors[0]}
    return found


def sample(names: Iterable[str], most: int) -> list[str]:
    """Return the `most` smallest names of pictures; names are hashes, so this is a random sample."""
    return sorted({name for name in names if name.endswith(PICTURES)})[:most]


# --- vectors ------------------------------------------------------------------------------------------------


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
