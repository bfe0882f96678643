"""Tiny models of many families, from the base to the export: each passes, or is refused by its proof."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ratchet.config.evaluation import EvaluateConfig, ParityConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, TrainConfig
from ratchet.data.examples import encode_line, read_examples
from ratchet.errors import BaseModelError
from ratchet.files import read_json, write_bytes
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import encode_last_answer
from ratchet.models.generation import answer_likelihoods, greedy_ids, likelihoods_and_answers
from ratchet.models.loading import WEIGHTS, load_base, load_chat, load_tokenizer, quiet
from ratchet.models.manifests import GENERATION
from ratchet.promotion.verdict import Candidate, Rival, Verdict
from ratchet.serving.bundle import bundle_candidate
from ratchet.serving.version_source import Source
from tasks.base import make_base
from tasks.export import export
from tasks.parity import parity
from tasks.tokenize import tokenize
from tasks.train import train

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}
SCORES = {"rows": 6, "exact_match": INTERVAL, "answer_nll": INTERVAL, "perplexity": 2.0}
METRICS: dict[str, Any] = {"champion": None, "slices": {"test": {"candidate": SCORES}}}
DECISION = Verdict("promote", ["better"], Rival("base", None), [], Candidate("key", "sha"))
REVISION = "0123456789abcdef0123456789abcdef01234567"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


class Family(NamedTuple):
    """A family's config beside SIZES, and the proofs that do not just pass."""

    model_type: str
    config: Mapping[str, Any] = MappingProxyType({})
    adapted: frozenset[str] = frozenset()
    refused: str = ""


FAMILIES = {
    "llama": Family("llama"),
    "llama, tied": Family("llama", {"tie_word_embeddings": True}),
    "qwen2, biased": Family("qwen2"),
    "qwen3": Family("qwen3", {"head_dim": 8}),
    "gemma2, no sdpa": Family("gemma2", {"head_dim": 8, "sliding_window": 16}, frozenset({"attention"})),
    "gemma3": Family("gemma3_text", {"head_dim": 8, "sliding_window": 16}),
    "mistral, sliding window": Family("mistral", {"sliding_window": 16}),
    "phi3, fused": Family("phi3"),
    "gpt2, Conv1D": Family("gpt2", {"n_positions": 128}),
    "gpt_neox": Family("gpt_neox"),
    "falcon": Family("falcon", {}, frozenset({"packing"})),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, frozenset({"packing"})),
    "mixtral": Family("mixtral", {"num_local_experts": 4}, frozenset({"targets"})),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 8, **EXPERTS}, frozenset({"targets"})),
    "olmo2": Family("olmo2"),
    "granite": Family("granite"),
    "stablelm": Family("stablelm"),
    "starcoder2": Family("starcoder2"),
    "smollm3": Family("smollm3"),
    "cohere": Family("cohere"),
    "bloom, no positions": Family("bloom", {"n_layer": 2, "n_head": 4}, frozenset({"attention", "packing"})),
    "lfm2, hybrid": Family(
        "lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, frozenset({"packing"})
    ),
    "mamba, no attention": Family("mamba", {}, refused="cache"),
}


def make_checkpoint(family: Family, tokenizer: Any, folder: Path) -> None:
    """Write an untrained model whose layers matter more than transformers' small random weights would."""
    torch.manual_seed(7)
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # Some configs have no field for a size: transformers keeps it as an attribute that it does not read.
    config = AutoConfig.for_model(family.model_type, **{**SIZES, **family.config, **tokens})
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


class Place(NamedTuple):
    """The folders of one family's way through the stages."""

    folder: Path
    prepared: Path
    nobody: Path
    config: Config

    @property
    def base(self) -> Path:
        return self.folder / "base"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A few short rows of each split."""
    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 16), ("validation", 4), ("test", 6), ("golden", 0)):
        rows = sorted(read_examples(prepared / f"{split}.jsonl"), key=lambda row: len(row.answer))
        write_bytes(folder / f"{split}.jsonl", map(encode_line, rows[:count]))
    return folder


@pytest.fixture(params=FAMILIES)
def place(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    hub_cache: Path,
    tiny_base: Path,
    few: Path,
    nobody: Path,
    tiny_config: Config,
) -> Any:
    """The family's checkpoint in the hub's cache."""
    repository = hub_cache / "models--tiny--family"
    make_checkpoint(FAMILIES[request.param], load_tokenizer(tiny_base), repository / "snapshots" / REVISION)
    config = tiny_config.model_copy(
        update={
            "base": BaseConfig(model="tiny/family", revision=REVISION),
            "adapter": AdapterConfig(rank=4, alpha=8.0),
            "train": TrainConfig(epochs=2, evaluations=1, learning_rate=1e-2),
            "evaluate": EvaluateConfig(max_new_tokens=8),
            "parity": ParityConfig(rows=6),
        }
    )
    yield FAMILIES[request.param], Place(tmp_path, few, nobody, config)
    shutil.rmtree(repository)


def test_a_family_goes_from_base_to_export_or_is_refused_by_its_proof(place: tuple[Family, Place]) -> None:
    family, at = place
    if family.refused:
        with pytest.raises(BaseModelError, match=rf"cannot be trained and served here: .*{family.refused}"):
            make_base(at.base, at.config)
        assert not at.base.exists()
        return
    make_base(at.base, at.config, at.base.with_name("base.json"))
    findings = read_json(at.base.with_name("base.json"))["findings"]
    adapted = {finding["name"] for finding in findings if finding["result"] != "ok"}
    assert adapted == family.adapted, findings
    attention = "eager" if "attention" in adapted else "sdpa"
    assert read_json(at.base / "manifest.json")["attention"] == attention
    assert load_base(at.base).config._attn_implementation == attention

    tokenize(at.prepared, at.base, at.nobody, at.folder / "tokens", at.config)
    candidate = at.folder / "candidate"
    train(at.folder / "tokens", at.base, at.nobody, candidate, at.folder / "reports", at.config)
    if "targets" in adapted:
        trained = " ".join(load_file(candidate / WEIGHTS))
        assert "q_proj" in trained and not any(
            word in trained for word in ("expert", "mlp", "gate", "router")
        )
    report = parity(
        at.prepared, at.folder / "tokens", at.base, candidate, at.folder / "parity.json", at.config
    )
    assert report.passed, [part.reason for part in report.parts if part.result == "fail"]
    bundle = bundle_candidate(candidate, at.base, at.config)
    rows = list(read_examples(at.prepared / "test.jsonl"))
    model, chat = load_trained(at.base, candidate).eval(), load_chat(at.base)
    prompts = [chat.encode_prompt(row.prompt) for row in rows]
    wholes = [encode_last_answer(chat, row) for row in rows]
    likelihoods, answers = likelihoods_and_answers(model, wholes, prompts, chat, max_new_tokens=8)
    assert answers == greedy_ids(model, prompts, chat, max_new_tokens=8, batch_size=1)
    alone = answer_likelihoods(model, wholes, pad_id=chat.pad_id, batch_size=1)
    assert [one.nll for one in likelihoods] == pytest.approx([one.nll for one in alone], rel=1e-3)
    source = Source("v1", "c" * 40, bundle, rows, METRICS, DECISION)
    record = export(source, "merged", at.folder / "exported", at.config)
    assert record.check.result == "pass"
    kept = [read_json(at.folder / name / GENERATION) for name in ("base", "candidate", "exported")]
    assert kept[0] == kept[1] == kept[2] and kept[0]["do_sample"] is False and kept[0]["eos_token_id"]


@pytest.mark.parametrize("place", ["qwen3_moe"], indirect=True)
def test_experts_that_are_named_are_refused_before_training(place: tuple[Family, Place]) -> None:
    _, at = place
    adapter = AdapterConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with pytest.raises(BaseModelError, match=r"training: .*reaches routers or experts"):
        make_base(at.base, at.config.model_copy(update={"adapter": adapter}))
    assert not at.base.exists()
