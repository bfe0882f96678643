"""Measure false alarms and power of the monitor's verdict on what pictures show, photographed alike.

    python -m benchmarks.picture_drift [--windows 400]

Pictures are drawn: one shape of equal area and light on noise, of one size, so that a new shape changes how
pictures look as little as can be. A small LLaVA is made whose vision tower learned to tell shapes apart, as
the tower of a real base was trained on the world. The champion's rows show some shapes. Null windows are
fresh splits of held-out pictures; other windows hold a share of a shape that the rows never showed. `looks
alone` is the verdict without the tower's features.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binom

from ratchet.engines.picture_pooling import measure_pictures
from ratchet.models.processors import MediaProcessor
from ratchet.monitoring.drift import Family, judge
from ratchet.monitoring.pictures import Look, content_family, look_of, picture_family

SIDE, PATCH, WIDTH, TOKENS = 32, 8, 64, 16
KNOWN = ("disc", "square", "diamond", "bar", "triangle")
NEW = ("cross", "corner", "pole")
STEPS, BATCH, DRAWN, RESAMPLES = 400, 128, 6000, 500
Chance = np.random.Generator


def draw(kind: str, chance: Chance) -> NDArray[np.uint8]:
    """Draw a shape, (SIDE, SIDE, 3)."""
    area, light = chance.uniform(90, 140), chance.uniform(60, 110)
    down, right = np.mgrid[:SIDE, :SIDE] - chance.uniform(11, SIDE - 11, 2)[:, None, None]
    x, y, half = np.abs(right), np.abs(down), np.sqrt(area) / 2
    arm = np.sqrt(area / 5) / 2
    shapes = {
        "disc": np.hypot(x, y) < np.sqrt(area / np.pi),
        "square": np.maximum(x, y) < half,
        "diamond": x + y < np.sqrt(2) * half,
        "bar": (x < 2 * half) & (y < half / 2),
        "pole": (y < 2 * half) & (x < half / 2),
        "triangle": (down < half * 1.2) & (down - 2 * x > -half * 1.5),
        "cross": ((x < arm) & (y < 3 * arm)) | ((y < arm) & (x < 3 * arm)),
        "corner": ((right > -half) & (down < half) & (x < half) & (y < half) & ((right < 0) | (down > 0))),
    }
    shape = shapes[kind]
    bright = light + chance.uniform(70, 110) * np.sqrt(area / max(1, shape.sum()))
    pixels = np.where(shape, bright, light)[..., None] + chance.normal(0, 12, (SIDE, SIDE, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def store(pixels: NDArray[np.uint8]) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(pixels).save(stored, "PNG")
    return stored.getvalue()


def name_of(picture: bytes) -> str:
    return f"{hashlib.sha256(picture).hexdigest()}.png"


class Sees(NamedTuple):
    """A model that reads pictures, and its processor."""

    model: Any
    processor: MediaProcessor


def make_model(kinds: Sequence[str], *, steps: int = STEPS, seed: int = 0) -> Sees:
    """Make a LLaVA whose vision tower has learned to tell these kinds of shapes apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = Tokenizer(models.WordLevel({"<image>": 0, "<pad>": 1, "<end>": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=["<image>"],
    )
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=PATCH,
                projection_dim=WIDTH,
            ),
            text_config=LlamaConfig(
                vocab_size=4, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1
            ),
            image_token_index=0,
            image_seq_length=TOKENS,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    _teach(model, images, kinds, steps, np.random.default_rng(seed))
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return Sees(model.eval(), MediaProcessor(processor))


def _teach(model: Any, images: Any, kinds: Sequence[str], steps: int, chance: Chance) -> None:
    """Train tower and projector to name the kind of a picture."""
    head = torch.nn.Linear(WIDTH, len(kinds))
    tower = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW([*tower, *head.parameters()], lr=2e-3)
    kind_of = chance.integers(len(kinds), size=DRAWN)
    drawn = [Image.fromarray(draw(kinds[kind], chance)) for kind in kind_of]
    pixels = images(drawn, return_tensors="pt")["pixel_values"]
    for _ in range(steps):
        batch = chance.integers(DRAWN, size=BATCH)
        seen = model.model.get_image_features(pixel_values=pixels[batch]).pooler_output
        seen = torch.stack(list(seen)).reshape(BATCH, TOKENS, WIDTH).mean(1)
        wanted = torch.tensor(kind_of[batch])
        loss = torch.nn.functional.cross_entropy(head(seen), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = float((head(seen).argmax(-1) == wanted).float().mean())
    print(f"the tower names {right:.0%} of the {len(kinds)} shapes that it learned")


def measured(sees: Sees, kinds: Iterable[str], count: int, seed: int) -> list[Look]:
    """Draw pictures of these kinds, and measure how they look and what the model sees."""
    chance = np.random.default_rng(seed)
    drawn = [store(draw(str(chance.choice(list(kinds))), chance)) for _ in range(count)]
    pictures = {name_of(picture): picture for picture in drawn}
    features = measure_pictures(sees.model, sees.processor, pictures, list(pictures))
    return [
        msgspec.structs.replace(look_of(name, picture), features=features[name])
        for name, picture in pictures.items()
    ]


def alarms(
    held_out: Sequence[Look],
    trained: Sequence[Look],
    new: Sequence[Look],
    *,
    windows: int,
    size: int,
    share: float,
) -> tuple[int, int]:
    """Count the windows called drift by both families of pictures, and by how the pictures look alone."""
    found, by_looks = 0, 0
    for number in range(windows):
        chance = np.random.default_rng(number)
        count = round(share * size)
        order = chance.permutation(len(held_out))
        window = [held_out[place] for place in order[: size - count]]
        window += [new[place] for place in chance.permutation(len(new))[:count]]
        reference = [held_out[place] for place in order[size - count :]]
        looks = picture_family(window, reference, list(trained))
        content = content_family(window, reference, trained)
        assert isinstance(looks, Family) and isinstance(content, Family)
        settings: dict[str, Any] = {"rate": 0.05, "resamples": RESAMPLES, "seed": number}
        found += judge([looks, content], **settings).drift
        by_looks += judge([looks], **settings).drift
    return found, by_looks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=400)
    windows = parser.parse_args().windows
    torch.set_num_threads(1)
    for learned, kinds in (("all shapes", (*KNOWN, *NEW)), ("the rows' shapes alone", KNOWN)):
        started = time.perf_counter()
        sees = make_model(kinds)
        known = measured(sees, KNOWN, 2000, seed=1)
        new = {kind: measured(sees, [kind], 200, seed=2) for kind in NEW}
        trained, held_out = known[:500], known[500:]
        print(f"a tower that learned {learned} ({time.perf_counter() - started:.0f} s)")
        for size, share in ((100, 0.0), (500, 0.0), (500, 0.05), (500, 0.1), (200, 0.1)):
            for kind in NEW[:1] if not share else NEW:
                count = windows if not share else max(20, windows // 4)
                found, by_looks = alarms(held_out, trained, new[kind], windows=count, size=size, share=share)
                limit = int(binom.ppf(0.99, count, 0.05)) if not share else ""
                told = f"{share:.0%} {kind}" if share else f"nothing new (99 % limit {limit})"
                print(f"  n = {size}, {told}: {found} of {count} called drift, by looks alone {by_looks}")


if __name__ == "__main__":
    main()
