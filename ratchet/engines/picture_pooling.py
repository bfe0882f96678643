"""What a model sees in pictures: the mean of the features that it puts in the place of a picture's tokens.

They come from its vision tower and projector, and cost nothing where the model reads the picture anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ratchet.monitoring.picture_features import pack

TOGETHER = 8  # pictures in one pass through the tower


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
