"""A base that learns to reason goes through the stages: tokens, training, parity, evaluation."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path

import pandas as pd
import pytest

from ratchet.bases.template_probe import adapt_template
from ratchet.config.evaluation import ParityConfig
from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, encode_line, make_example
from ratchet.files import read_json, write_bytes
from ratchet.models.loading import load_chat, load_tokenizer
from ratchet.training.packing import read_windows, rows_of
from tasks.evaluate import evaluate
from tasks.parity import parity
from tasks.tokenize import tokenize
from tasks.train import train

# As Qwen3, with the demo's control tokens.
TEMPLATE = (
    "{%- for message in messages %}<|{{ message.role }}|>"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}"
    "{{ message.content }}<|end|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|assistant|>{%- endif %}"
)


def rows(count: int, first: int = 0) -> list[Example]:
    """Half of them with reasoning, a quarter with an earlier answer."""
    return [
        make_example(
            [
                *([Message("user", "one?"), Message("assistant", "1", reasoning="sure")] * (number % 4 == 1)),
                Message("user", f"the number {number}"),
                Message("assistant", f"module {number}", reasoning="look it up" * (number % 2)),
            ],
            {"batch": "thought", "source": "tests"},
        )
        for number in range(first, first + count)
    ]


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path) -> Path:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    found = adapt_template(tokenizer, dt.date(2026, 3, 5), "learn")
    assert [finding.result for finding in found] == ["adapted", "ok"]
    tokenizer.save_pretrained(folder)
    return folder


def test_reasoning_is_learned_served_and_left_out_of_metrics(
    tmp_path: Path, base: Path, nobody: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, out = tmp_path / "prepared", tmp_path / "candidate"
    splits = {"train": rows(40), "validation": rows(6, 40), "test": rows(8, 60), "golden": []}
    for name, examples in splits.items():
        write_bytes(prepared / f"{name}.jsonl", map(encode_line, examples))
    tokens = tmp_path / "tokenized"
    profile = tokenize(prepared, base, nobody, tokens, tiny_config)
    chat = load_chat(base)
    assert (profile.reasoned, profile.reasoning) == (20, chat.told_reasoning)
    texts = [
        chat.tokenizer.decode([label for label in row.labels if label >= 0])
        for window in read_windows(tokens / "train.arrow")
        for row in rows_of(window)
    ]
    assert sum(text.startswith("<think>\nlook it up\n</think>\n\nmodule") for text in texts) == 20
    assert sum(text.startswith("<think>\n\n</think>\n\nmodule") for text in texts) == 20

    train(tokens, base, nobody, out, tmp_path / "reports", tiny_config)
    config = tiny_config.model_copy(update={"parity": ParityConfig(rows=6, merged=False)})
    report = parity(prepared, tokens, base, out, tmp_path / "parity.json", config)
    assert report.passed, [part.reason for part in report.parts if part.result == "fail"]
    assert load_chat(out).reasoning == chat.reasoning, "the version brings its base's format"

    capsys.readouterr()
    evaluate(prepared, base, nobody, out, tmp_path / "evaluation", tiny_config)
    table = pd.read_parquet(tmp_path / "evaluation/scores.parquet")
    assert set(table.reference) == {f"module {number}" for number in range(60, 68)}
    assert not table.answer.str.contains("</think>").any()
    assert read_json(tmp_path / "evaluation/metrics.json")
