"""Pre-train the base of `ratchet demo --base charts`, a small LLaVA with SigLIP's tower, on charts.

    python -m ratchet.demo.chart_base FOLDER

Tower, projector and language model are trained together. The base learns to name the kind and the
colours of any chart, and what pies show (`3 slices`). What bars and lines show is left to the adapters. Equal
seeds give equal weights on a machine.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
    set_seed,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ratchet.data.examples import MEDIA_MARK, Message, make_example
from ratchet.demo.base_model import CONTROL_TOKENS, tell_loss, train_tokenizer
from ratchet.demo.charts import ASKED, COLOURS, KINDS, PARTS, Chart, Kind, draw
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import quiet
from ratchet.models.processors import MediaProcessor
from ratchet.pipeline.stage import say
from ratchet.training.loss import AnswerLoss
from ratchet.training.packing import pack
from ratchet.training.schedule import Schedule
from ratchet.training.trainer import fit

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    f"{{%- if part.type == 'image' -%}}{IMAGE}{{%- else -%}}{{{{ part.text }}}}{{%- endif -%}}"
    "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
LEARNED: dict[Kind, tuple[str, ...]] = {
    "bar": ("kind", "colours"),
    "line": ("kind", "colours"),
    "pie": ("kind", "colours", "count", "shown"),
}
SEED, FIRST_SEED = 20, 1_000_000  # of the weights; of the charts, which no batch and no client uses
EACH = 700  # charts of a kind
STEPS, BATCH, LEARNING_RATE = 800, 32, 2.0e-3
SIDE, PATCH = 64, 16  # pixels of the picture that the tower sees, and of a patch, which gives one token
TOKENS = (SIDE // PATCH) ** 2
WIDTH, LAYERS, HEADS, CONTEXT = 96, 2, 4, 512


def make_processor() -> LlavaProcessor:
    """Make tokenizer and processor; a picture has TOKENS tokens."""
    texts = [
        *ASKED.values(),
        *KINDS,
        *PARTS.values(),
        *map(str, range(10)),
        *COLOURS,
        *(f", {colour}" for colour in COLOURS),
    ]
    tokenizer = train_tokenizer(
        [text for text in texts for _ in range(5)],
        vocab_size=400,
        context=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        control=(*CONTROL_TOKENS, IMAGE),
    )
    return LlavaProcessor(
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: Any) -> LlavaForConditionalGeneration:
    """Make the model with random weights."""
    layers = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                image_size=SIDE,
                patch_size=PATCH,
                vision_use_head=False,
                **layers,
            ),
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH * 11 // 4 // 8 * 8,
                num_key_value_heads=HEADS,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **layers,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=TOKENS,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    )


def pretrain(folder: Path, *, each: int = EACH, steps: int = STEPS) -> None:
    """Train the base on `each` charts of each kind, and write it to `folder` as transformers does.

    A row asks all that the base learns about its chart, in an order of its own. Raises DivergenceError.
    """
    charts = [chart for kind in KINDS for chart in draw(kind, range(FIRST_SEED, FIRST_SEED + each))]
    processor: Any = make_processor()
    media = {_name(chart): chart.png for chart in charts}
    chat = ChatFormat(processor.tokenizer, (), MediaProcessor(processor), media)
    chance = random.Random(SEED)  # noqa: S311 (no secret: the order of questions)
    rows = [chat.encode(make_example(_ask(chart, chance), {})) for chart in charts]
    pixels = {name: chat.inputs([[name]], torch.zeros(1, 1))["pixel_values"] for name in media}

    def inputs(names: Sequence[Sequence[str]], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.cat([pixels[name] for row in names for name in row])}

    set_seed(SEED)
    model: Any = make_model(processor.tokenizer)
    schedule = Schedule(
        steps=steps,
        batch_windows=BATCH,
        accumulate=1,
        learning_rate=LEARNING_RATE,
        kind="cosine",
        warmup_share=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        evaluations=1,
        patience=1,
        seed=SEED,
    )  # in float32: at this width bfloat16 takes twice as long
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(
        f"base: pre-training {millions:.2f}M parameters on {len(charts)} charts of {SIZE_TOLD}, {steps} steps"
    )
    with quiet():
        outcome = fit(
            model,
            pack(rows, CONTEXT),
            [],
            schedule,
            loss=AnswerLoss(),
            pad_id=chat.pad_id,
            report=tell_loss(steps),
            apart=True,
            inputs=inputs,
        )
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, safe_serialization=True)
        processor.save_pretrained(folder)
    say(f"base: loss {outcome.train_loss:.3f} after {outcome.seconds:.0f} s")


SIZE_TOLD = f"{SIDE}x{SIDE} pixels"


def _name(chart: Chart) -> str:
    return f"{hashlib.sha256(chart.png).hexdigest()}.png"


def _ask(chart: Chart, chance: random.Random) -> list[Message]:
    """Ask all that the base learns about a chart, in a random order; the picture stands before the first."""
    asked = list(LEARNED[chart.kind])
    chance.shuffle(asked)
    turns: list[Message] = []
    for place, question in enumerate(asked):
        text = ASKED[question]
        shown = Message("user", text) if place else Message("user", MEDIA_MARK + text, media=(_name(chart),))
        turns += [shown, Message("assistant", chart.answer(question))]
    return turns


if __name__ == "__main__":
    pretrain(Path(sys.argv[1]))
