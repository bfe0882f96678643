"""llama.cpp reads our GGUF files: same tokens, same distribution, same answers. Skipped without llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_server import Said, serving_gguf
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import FILE, LLAMA3, load_gguf, write_gguf
from ratchet.models.loading import load_tokenizer
from tasks.export import export
from tests.serving.test_export import CONFIG, small_llama, source

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (uv pip install xllamacpp)")

TEXTS = [
    "def close(self): the file's 12 handlers",
    "  Zürich,\n\n\tnaïve — 東京  \r\n   x",
    "I'll say WE'LL don't DON'T 'tis",
    "1234567 3.14159 x12y 0x7f",
    "...!!??  ((a)) [b]\n\n\n\nend   ",
    "emoji 🙂👩‍👩‍👧 e\u0301 \u00a0nbsp \u2003em",
    "<|end|>x <|user|> <|nobody|>",
    "a\x00b\x7f",
    "Ünïcödé ßẞ İı ǅ ½ ² ٣ 四",
    " ",
    "\n",
]


def logprobs(model: Any, ids: list[int], begin: int) -> Any:
    """Of each position from `begin` on, float64."""
    with torch.inference_mode():
        return torch.log_softmax(
            model(input_ids=torch.tensor([ids])).logits[0, begin:].double(), dim=-1
        ).numpy()


def compare(said: Said, model: Any, prompt: list[int]) -> tuple[float, float]:
    """Return (largest difference of a log-probability, how far a said token was below the model's best).

    The second is 0 where the answers are the same.
    """
    ours = logprobs(model, [*prompt, *said.ids[:-1]], len(prompt) - 1)
    behind = ours.max(axis=-1) - ours[range(len(said.ids)), said.ids]
    return float(np.abs(said.logprobs - ours).max()), float(behind.max())


@pytest.mark.parametrize(("to", "apart"), [("gguf", 0.01), ("int8", 0.1), ("int4", 0.1)])
def test_an_exported_adapter_says_in_llama_cpp_what_it_says_here(
    to: str, apart: float, candidate: Path, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    """int8 and int4 are compared with transformers' reading of the file: the export measures rounding."""
    made = source(candidate, tiny_base, prepared)
    export(made, to, tmp_path / "out", CONFIG)
    chat = ChatFormat(load_tokenizer(candidate))
    model = load_trained(tiny_base, candidate).eval() if to == "gguf" else load_gguf(tmp_path / "out")
    found, same = [], 0
    with serving_gguf(tmp_path / "out" / FILE) as server:
        for row in made.rows[:12]:
            prompt = chat.encode_prompt(row.prompt)
            messages = [{"role": message.role, "content": message.content} for message in row.prompt]
            assert server.ids(server.render(messages), control=True) == prompt
            said = server.say(prompt, 8, model.config.vocab_size)
            found.append(compare(said, model, prompt))
            same += server.chat(messages, 8).strip() == chat.decode_answer(said.ids)
    assert max(largest for largest, _ in found) < apart
    assert max(behind for _, behind in found) < apart, "another token only where two are as likely"
    assert same == 12, "its chat route renders, reads and stops as its completions do"


@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"head_dim": 32}],
    ids=["untied", "tied", "wide heads"],
)
def test_every_shape_that_is_written_is_computed_alike(
    settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    model, tokenizer = small_llama(**settings), load_tokenizer(tiny_base)
    write_gguf(
        model, tokenizer, tmp_path / FILE, name="small", stop_id=ChatFormat(tokenizer).stop_id, kind="gguf"
    )
    prompt = torch.randint(5, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    with serving_gguf(tmp_path / FILE) as server:
        largest, behind = compare(server.say(prompt, 8, 520), model, prompt)
    assert largest < 0.01 and behind < 0.01


CUTS = {
    "gpt-2": (ByteLevel(add_prefix_space=False), False),
    "smollm": (Steps([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), False),
    "llama-bpe": (
        Steps([Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
        True,
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_each_way_to_cut_text_is_llama_cpps_own(name: str, tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.backend_tokenizer.pre_tokenizer, tokenizer.backend_tokenizer.model.ignore_merges = CUTS[name]
    write_gguf(
        small_llama(),
        tokenizer,
        tmp_path / FILE,
        name="small",
        stop_id=ChatFormat(tokenizer).stop_id,
        kind="gguf",
    )
    with serving_gguf(tmp_path / FILE) as server:
        for text in TEXTS:
            ours = tokenizer.encode(text, add_special_tokens=False)
            assert server.ids(text, control=True) == ours == server.ids(text, control=True, start=True), text
            assert server.ids(text, control=False) == tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True
            ), text
        assert server.facts()["chat_template"] == tokenizer.chat_template


def test_added_words_are_found_where_they_are_found_here(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.add_tokens(["foo_bar", "foo_bar_baz", "Zürich", "two words", "\n\n\n", "<think>"])
    write_gguf(
        small_llama(vocab_size=len(tokenizer)),
        tokenizer,
        tmp_path / FILE,
        name="small",
        stop_id=4,
        kind="int8",
    )
    with serving_gguf(tmp_path / FILE) as server:
        for text in [
            "a foo_bar_baz, foo_bars  foo_bar",
            "inZürich, two words",
            "a\n\n\n\nb",
            "<think>x <|end|>",
        ]:
            assert server.ids(text, control=True) == tokenizer.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (None, "<|end|>"), ("<|system|>", "<|user|>")])
def test_a_template_that_names_the_first_and_last_token_renders_alike(
    bos: str | None, eos: str | None, tiny_base: Path, tmp_path: Path
) -> None:
    """Without a first token of its own a model would get token 11 of llama.cpp as one: here an apostrophe."""
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = f"{{{{ bos_token }}}}|{{{{ eos_token }}}}|\n{tokenizer.chat_template}"
    write_gguf(small_llama(), tokenizer, tmp_path / FILE, name="small", stop_id=4, kind="gguf")
    messages = [{"role": "user", "content": "hi"}]
    with serving_gguf(tmp_path / FILE) as server:
        assert server.render(messages) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
