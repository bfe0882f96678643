"""Pre-train the base of `ratchet demo --base charts`, a small LLaVA with SigLIP's tower, on charts.

    python -m ratchet.demo.chart_base --out FOLDER

Tower, projector and language model are trained together. The base learns what any chart is made of
(`bars`), which colours there are and how many. To say what a chart shows (`3 bars`) is left to the adapters.
Equal seeds give equal weights on a machine.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ratchet.data.examples import MEDIA_MARK, Message, make_example
from ratchet.demo.charts import ASKED, COLOURS, KINDS, PARTS, Chart, draw
from ratchet.demo.tokenizer import CONTROL_TOKENS, train_tokenizer
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.loading import quiet
from ratchet.models.processors import MediaProcessor
from ratchet.pipeline.stage import run_stage, say
from ratchet.training.packing import IGNORED

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    f"{{%- if part.type == 'image' -%}}{IMAGE}{{%- else -%}}{{{{ part.text }}}}{{%- endif -%}}"
    "{%- endfor -%}{%- endif -%}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# An adapter changes no embeddings, so the base has to learn all words of the answers: `3`, `bars`, `lines`.
LEARNED = ("parts", "colours", "count")
SEED, FIRST_SEED = 20, 1_000_000  # of the weights; of the charts, which no batch and no client uses
EACH = 800  # charts of a kind
STEPS, BATCH, LEARNING_RATE = 1600, 32, 2.0e-3
WEIGHTS = {"parts": 0.4}  # how often a question is asked against the others, which are harder
SMOOTHED = 50  # steps over which the told loss is averaged
SIDE, PATCH = 64, 16  # pixels of the picture that the tower sees, and of a patch, which gives one token
TOKENS = (SIDE // PATCH) ** 2
WIDTH, LAYERS, HEADS, CONTEXT = 96, 2, 4, 512


def make_processor() -> LlavaProcessor:
    """Make tokenizer and processor; a picture has TOKENS tokens."""
    texts = [
        *ASKED.values(),
        *PARTS.values(),
        *map(str, range(10)),
        *COLOURS,
    ]
    tokenizer = train_tokenizer(
        [text for text in texts for _ in range(5)],
        vocab_size=400,
        context=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        control=(*CONTROL_TOKENS, IMAGE),
    )
    return LlavaProcessor(  # type: ignore[no-untyped-call]  # its class has no annotations
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
    layers: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
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

    A step takes BATCH random charts with a question each; the loss is the mean over the tokens of answers.
    """
    charts = [chart for kind in KINDS for chart in draw(kind, range(FIRST_SEED, FIRST_SEED + each))]
    processor: Any = make_processor()
    images = processor.image_processor(
        [Image.open(io.BytesIO(chart.png)) for chart in charts], return_tensors="pt"
    )
    pixels = images["pixel_values"]  # (charts, 3, SIDE, SIDE)
    rows = Rows(processor)
    asked = [(place, question) for place, chart in enumerate(charts) for question in LEARNED]
    weights = [WEIGHTS.get(question, 1.0) for _, question in asked]
    torch.manual_seed(SEED)
    chance = random.Random(SEED)  # noqa: S311 (no secret: the order of questions)
    model: Any = make_model(processor.tokenizer)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(
        f"base: pre-training {millions:.2f}M parameters on {len(charts)} charts of {SIDE}x{SIDE} pixels, "
        f"{steps} steps"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, steps=steps))
    started, loss = time.perf_counter(), 0.0
    with quiet():
        for step in range(1, steps + 1):
            chosen = chance.choices(asked, weights, k=BATCH)
            batch = rows.batch([(charts[place], question) for place, question in chosen])
            found = model(pixel_values=pixels[[place for place, _ in chosen]], **batch)
            # In float32: at this width bfloat16 takes twice as long, even with instructions for it.
            found.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss += (float(found.loss) - loss) / min(step, SMOOTHED)
            if step % max(1, steps // 10) == 0:
                say(f"base: step {step}/{steps}, loss {loss:.3f}")
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, safe_serialization=True)
        processor.save_pretrained(folder)
    say(f"base: loss {loss:.3f} after {time.perf_counter() - started:.0f} s")


def _share(step: int, *, steps: int) -> float:
    """Return the share of the learning rate: a warm-up and a cosine. Transformers' own would load PEFT."""
    return min(1.0, 20 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Rows:
    """Questions about charts as batches of tokens, which depend on question and answer alone."""

    def __init__(self, processor: Any) -> None:
        blank = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE)).save(blank, "PNG")
        self._name = f"{hashlib.sha256(blank.getvalue()).hexdigest()}.png"
        media = {self._name: blank.getvalue()}
        self._chat = ChatFormat(processor.tokenizer, (), MediaProcessor(processor), media)
        self._known: dict[tuple[str, str], Encoded] = {}

    def batch(self, asked: Sequence[tuple[Chart, str]]) -> dict[str, torch.Tensor]:
        """Return ids, labels and mask, (batch, seq) each, padded on the right."""
        rows = [self._encode(question, chart.answer(question)) for chart, question in asked]
        length = max(len(row.ids) for row in rows)
        pads = [length - len(row.ids) for row in rows]
        labels = [
            [id if learned else IGNORED for id, learned in zip(row.ids, row.learned, strict=True)]
            for row in rows
        ]
        columns = {
            "input_ids": [row.ids + [self._chat.pad_id] * pad for row, pad in zip(rows, pads, strict=True)],
            "labels": [label + [IGNORED] * pad for label, pad in zip(labels, pads, strict=True)],
            "attention_mask": [[1] * (length - pad) + [0] * pad for pad in pads],
        }
        return {name: torch.tensor(column) for name, column in columns.items()}

    def _encode(self, question: str, answer: str) -> Encoded:
        if (question, answer) not in self._known:
            shown = Message("user", MEDIA_MARK + ASKED[question], media=(self._name,))
            row = make_example([shown, Message("assistant", answer)], {})
            self._known[question, answer] = self._chat.encode(row)
        return self._known[question, answer]


if __name__ == "__main__":
    run_stage(__doc__, ["out"], lambda _, arguments: pretrain(arguments.out))
