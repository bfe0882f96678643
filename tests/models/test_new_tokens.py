"""`base.new_tokens`: words become one token, whose embedding is trained, saved, served and merged."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, TrainConfig
from ratchet.data.examples import Message, make_example
from ratchet.errors import BaseModelError
from ratchet.files import read_json, write_json
from ratchet.models.adapters import add_adapter, load_trained, read_kind
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import why_no_gguf
from ratchet.models.loading import load_base, load_tokenizer, quiet
from ratchet.models.merging import load_merged
from ratchet.serving.admission import check_adapter_fits
from ratchet.training.packing import read_windows
from tasks.base import add_tokens
from tasks.tokenize import tokenize
from tasks.train import train
from tests.models.test_adapters import bundle, loss_in_the_engine

WORDS = ["dictionary", "iterator"]


class Grown(NamedTuple):
    base: Path
    tokens: Path
    ids: list[int]
    pieces: list[list[int]]


@pytest.fixture(scope="module")
def grown(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    prepared: Path,
    nobody: Path,
    tiny_config: Config,
) -> Grown:
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(tiny_base, folder / "base")
    details = add_tokens(folder / "base", WORDS)
    write_json(folder / "base/manifest.json", read_json(folder / "base/manifest.json") | details)
    tokenize(prepared, folder / "base", nobody, folder / "tokenized", tiny_config)
    return Grown(
        folder / "base",
        folder / "tokenized",
        [token["id"] for token in details["new_tokens"]],
        [token["pieces"] for token in details["new_tokens"]],
    )


def embeddings(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(torch.arange(model.config.vocab_size)).clone()


def test_a_word_is_one_token_and_reads_as_it_was_written(grown):
    chat = ChatFormat(load_tokenizer(grown.base))
    text = "The dictionary gives an iterator, dictionaryless and (iterator)."
    row = chat.encode(make_example([Message("user", "q"), Message("assistant", text)], {}))
    assert [row.ids.count(id) for id in grown.ids] == [1, 2]  # not within another word
    assert chat.decode_answer(row.ids[row.ids.index(chat.stop_id, 0) + 2 :]) == text
    assert chat.count_control(grown.ids) == 0
    assert (
        max(
            sum(id in window.input_ids for window in read_windows(grown.tokens / "train.arrow"))
            for id in grown.ids
        )
        > 0
    )


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_embedding_begins_as_the_mean_of_its_pieces(grown, tiny_base, method):
    table, before = (
        load_base(folder, method=method).get_input_embeddings().weight for folder in (grown.base, tiny_base)
    )
    assert len(table) == len(before) + 2
    torch.testing.assert_close(table[: len(before)], before)
    for id, pieces in zip(grown.ids, grown.pieces, strict=True):
        torch.testing.assert_close(table[id], before[pieces].mean(0))


@pytest.mark.parametrize("method", ["lora", "qlora", "dora", "full"])
def test_it_is_trained_saved_served_and_merged(tmp_path, grown, nobody, tiny_config, method):
    adapter = AdapterConfig(method=method, rank=4, alpha=8.0)
    config = tiny_config.model_copy(
        update={"adapter": adapter, "train": TrainConfig(epochs=0.3, evaluations=2, learning_rate=1e-2)}
    )
    out = tmp_path / "candidate"
    figures = train(grown.tokens, grown.base, nobody, out, tmp_path / "reports", config)
    with quiet():
        model, base = load_trained(grown.base, out), load_base(grown.base, method=method)
    moved = (embeddings(model).float() - embeddings(base).float()).abs().amax(dim=1)
    assert all(moved[id] > 1e-3 for id in grown.ids)
    if method != "full":
        assert moved[[id for id in range(len(moved)) if id not in grown.ids]].max() == 0
        assert not read_kind(out).shares  # on a shared base it would change the others
    expected = figures["best_validation_loss"]
    assert loss_in_the_engine(
        out, grown.base, read_windows(grown.tokens / "validation.arrow")
    ) == pytest.approx(expected, rel=5e-3 if method == "qlora" else 1e-5)
    ids = torch.tensor([[5, *grown.ids, 9]])
    with torch.no_grad(), quiet():
        torch.testing.assert_close(
            load_merged(grown.base, out)(ids).logits.float(),
            model(ids).logits.float(),
            rtol=0,
            atol=5e-2 if method == "qlora" else 1e-4,
        )


def test_where_tokens_are_read_and_written_by_two_tables_both_are_trained(grown):
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )
    model = add_adapter(base, AdapterConfig(rank=4), seed=1, new_ids=[17, 19])
    assert sorted(
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and "token" in name and weight.shape == (2, 16)
    ) == [
        f"base_model.model.{table}.token_adapter.trainable_tokens_delta.default"
        for table in ("lm_head", "model.embed_tokens")
    ]


def test_the_next_training_goes_on_from_it(tmp_path, grown, nobody, tiny_config):
    config = tiny_config.model_copy(
        update={"train": TrainConfig(epochs=0.2, evaluations=1, learning_rate=1e-2)}
    )
    first = tmp_path / "incumbent"
    train(grown.tokens, grown.base, nobody, first, tmp_path / "first", config)
    write_json(first / "manifest.json", read_json(first / "manifest.json") | {"version": 1})
    again = config.model_copy(
        update={"train": TrainConfig(epochs=0.2, evaluations=1, learning_rate=1e-9, start_from="champion")}
    )
    train(grown.tokens, grown.base, first, tmp_path / "candidate", tmp_path / "second", again)
    torch.testing.assert_close(
        embeddings(load_trained(grown.base, tmp_path / "candidate")),
        embeddings(load_trained(grown.base, first)),
        rtol=0,
        atol=1e-5,
    )


def test_a_word_that_is_a_token_already_is_refused(tmp_path, tiny_base):
    shutil.copytree(tiny_base, tmp_path / "base")
    with pytest.raises(BaseModelError, match="'a', which is one token"):
        add_tokens(tmp_path / "base", ["a"])
    tokenizer = load_tokenizer(tiny_base)
    word = next(
        word
        for token in tokenizer.get_vocab()
        if token.startswith("Ġ")
        and (word := token[1:]).isascii()
        and len(tokenizer.encode(word, add_special_tokens=False)) > 1
    )
    with pytest.raises(
        BaseModelError, match=f"'{word}', which is one token"
    ):  # behind a blank, as in a sentence
        add_tokens(tmp_path / "base", [word])


@pytest.mark.parametrize("word", ["<think>", " iterator", "", "<|user|>", "[INST]"])
def test_markup_is_no_word(word):
    with pytest.raises(ValidationError, match=r"base\.new_tokens names"):
        BaseConfig(new_tokens=[word])
    with pytest.raises(ValidationError, match="each once"):
        BaseConfig(new_tokens=["iterator", "iterator"])


def test_methods_that_would_leave_them_untrained_are_refused():
    with pytest.raises(ValidationError, match=r"base\.new_tokens.*`adapter\.method: ia3`"):
        Config(base=BaseConfig(new_tokens=["iterator"]), adapter=AdapterConfig(method="ia3"))


def test_llama_cpp_would_cut_text_otherwise_and_that_is_said(grown, tiny_base):
    config = load_base(grown.base).config
    assert "'dictionary'" in why_no_gguf(config, load_tokenizer(grown.base))
    assert not why_no_gguf(config, load_tokenizer(tiny_base))


def test_an_adapter_that_moves_other_embeddings_is_not_served(tmp_path, grown, candidate):
    shutil.copytree(candidate, tmp_path / "adapter")
    config = read_json(tmp_path / "adapter/adapter_config.json")
    for trained, served in (
        ({"embed_tokens": grown.ids}, True),
        ({"embed_tokens": [5]}, False),
        ([5], False),
    ):
        write_json(tmp_path / "adapter/adapter_config.json", config | {"trainable_token_indices": trained})
        with (
            contextlib.nullcontext()
            if served
            else pytest.raises(BaseModelError, match="trainable_token_indices")
        ):
            check_adapter_fits(bundle(1, tmp_path / "adapter", grown.base))
