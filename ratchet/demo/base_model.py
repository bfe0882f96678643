"""Pre-train the demo's base model, a small Llama with its own tokenizer, on documentation.

The loss counts every token, so that the model learns from the prompts too; the loss of a fine-tuning counts
only the answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from ratchet.config.training import BaseConfig, DemoBase
from ratchet.data.examples import Example
from ratchet.demo.tokenizer import train_tokenizer
from ratchet.models.chat_template import ChatFormat, Encoded
from ratchet.models.loading import compute_dtype, quiet
from ratchet.pipeline.stage import say
from ratchet.training.collation import Batches
from ratchet.training.packing import IGNORED, pack
from ratchet.training.schedule import Report, Schedule
from ratchet.training.trainer import Batch, Predict, fit

WINDOW = 256  # tokens; short windows keep attention cheap on a CPU


def make_tokenizer(rows: list[Example], demo: DemoBase) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the texts of `rows`."""
    texts = (message.content for row in rows for message in row.messages)
    return train_tokenizer(texts, vocab_size=demo.vocab_size, context=demo.context)


def llama(demo: DemoBase, chat: ChatFormat) -> LlamaConfig:
    """Return transformers' config of the model."""
    return LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=demo.hidden_size,
        # 2.75 times the width, about the 8/3 usual for SwiGLU, which has three matrices (arXiv 2002.05202); a
        # multiple of 8.
        intermediate_size=demo.hidden_size * 11 // 4 // 8 * 8,
        num_hidden_layers=demo.layers,
        num_attention_heads=demo.heads,
        num_key_value_heads=demo.heads,
        max_position_embeddings=demo.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=chat.stop_id,
        pad_token_id=chat.pad_id,
    )


def pretrain(rows: list[Example], chat: ChatFormat, config: BaseConfig) -> Any:
    """Train a new model on the rows that fit into a window. Raises DivergenceError."""
    demo = config.demo
    set_seed(config.seed)
    model: Any = LlamaForCausalLM(llama(demo, chat))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    window = min(demo.context, WINDOW)
    encoded: list[Encoded] = [row for example in rows if len((row := chat.encode(example)).ids) <= window]
    schedule = Schedule(
        steps=demo.steps,
        batch_windows=max(1, demo.batch_tokens // window),
        accumulate=1,
        learning_rate=demo.learning_rate,
        kind="cosine",
        warmup_share=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        evaluations=1,
        patience=1,
        seed=config.seed,
        compute=compute_dtype("auto")[0],
    )
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    say(f"base: pre-training {millions:.2f}M parameters on {len(encoded)} rows, {demo.steps} steps")
    with quiet():
        outcome = fit(
            model,
            pack(encoded, window),
            [],
            schedule,
            pad_id=chat.pad_id,
            loss=TextLoss(demo.text_weight),
            report=_report(demo.steps),
        )
    say(f"base: loss {outcome.train_loss:.3f} after {outcome.seconds:.0f} s")
    return model


class TextLoss:
    """Weighted cross-entropy of every token but a row's first: 1 for an answer's, `text_weight` for others.

    The mean is over the weights of one forward pass, since an optimizer step of pre-training has only one.
    """

    def __init__(self, text_weight: float) -> None:
        self._text_weight = text_weight

    def prepare(self, model: Any, batches: Batches) -> Batches:
        return batches

    def validate(self, batch: Batch, predict: Predict) -> Tensor:
        return self(batch, predict, torch.ones(()))[0]

    def __call__(self, batch: Batch, predict: Predict, count: Tensor) -> tuple[Tensor, Tensor]:
        learned = batch["labels"][:, 1:] != IGNORED  # (batch, seq - 1)
        # A row's first token and padding are no targets, because no token of the row predicts them.
        own = batch["position_ids" if "position_ids" in batch else "attention_mask"][:, 1:] > 0
        weights = torch.where(learned, 1.0, self._text_weight) * own
        chosen = weights > 0
        losses = cross_entropy(predict(chosen), batch["input_ids"][:, 1:][chosen], reduction="none")
        return losses * weights[chosen], weights.sum()


def _report(steps: int) -> Report:
    def report(step: int, values: dict[str, float]) -> None:
        if step % max(1, steps // 10) < max(1, steps // 100) and "train_loss" in values:
            say(f"base: step {step}/{steps}, loss {values['train_loss']:.3f}")

    return report
