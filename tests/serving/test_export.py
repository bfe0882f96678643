"""Exports: what other programs load answers as the adapter does, is scored beside it, or is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from huggingface_hub import ModelCard
from places import commit, make_repository, use_mlflow, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config

from ratchet.config.evaluation import ParityConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.examples import Example, Message, encode_line, read_examples
from ratchet.errors import BaseModelError, UserError
from ratchet.evaluation.report import decode_metrics
from ratchet.files import read_json, sha256_file, write_bytes, write_json
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import FILE, load_gguf, why_no_gguf, write_gguf
from ratchet.models.loading import adapter_sha256, load_base, load_tokenizer
from ratchet.models.manifests import AdapterRecord, BaseName, TrainedManifest
from ratchet.models.merging import load_merged
from ratchet.pipeline.checkout import dvc, git
from ratchet.promotion.champion import Champion, write_champion
from ratchet.promotion.verdict import Candidate, Rival, Verdict
from ratchet.reporting.model_card import hub_card
from ratchet.serving.bundle import Bundle, Generation
from ratchet.serving.version_source import Source, find_source
from tasks.base import make_base
from tasks.export import Prompts, export, require_exportable, tell
from tasks.train import train

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}
METRICS: dict[str, Any] = {
    "champion": None,
    "slices": {
        "test": {
            "candidate": {"rows": 57, "exact_match": INTERVAL, "answer_nll": INTERVAL, "perplexity": 2.0}
        }
    },
}
DECISION = Verdict("promote", ["better"], Rival("base", None), [], Candidate("key", "sha"))
CONFIG = Config(parity=ParityConfig(rows=12))


def source(adapter: Path, base: Path, prepared: Path) -> Source:
    return Source(
        "v3",
        "c" * 40,
        Bundle("tiny", 3, adapter, base, 256, Generation(8)),
        list(read_examples(prepared / "test.jsonl")),
        METRICS,
        DECISION,
    )


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: Path,
    tiny_base: Path,
    nobody: Path,
    tiny_config: Config,
    candidate: Path,
) -> Any:
    """A candidate of each method, trained when it is asked for."""
    folder = tmp_path_factory.mktemp("trained")

    def make(method: str) -> Path:
        if method == "lora":
            return candidate
        if not (out := folder / method / "candidate").exists():
            adapter = AdapterConfig.model_validate(
                {"method": method, "rank": 4, "alpha": 8.0, "virtual_tokens": 5}
            )
            train(
                tokens,
                tiny_base,
                nobody,
                out,
                folder / method / "reports",
                tiny_config.model_copy(update={"adapter": adapter}),
            )
        return out

    return make


# --- merged ---


@pytest.mark.parametrize(
    ("method", "tolerance"), [("lora", 1e-4), ("dora", 1e-4), ("full", 0.0), ("qlora", 0.05)]
)
def test_a_merged_model_is_one_that_transformers_loads_and_says_what_the_adapter_says(
    method: str, tolerance: float, trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    made = source(trained(method), tiny_base, prepared)
    record = export(made, "merged", tmp_path / "out", CONFIG)
    model, chat = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(),
        ChatFormat(load_tokenizer(tmp_path / "out")),
    )
    adapter = load_trained(tiny_base, made.bundle.adapter).eval()
    with torch.inference_mode():
        for row in made.rows[:4]:
            ids = torch.tensor([chat.encode(row).ids])
            wanted = adapter(input_ids=ids).logits.float()
            assert (model(input_ids=ids).logits - wanted).abs().max() <= tolerance * max(
                1.0, float(wanted.abs().max())
            )
    assert not hasattr(model.config, "quantization_config")
    assert (record.method, record.check.result, record.scores.rows) == (method, "pass", 12)


def test_the_record_names_version_sums_and_scores_and_every_file(
    trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    record = export(source(trained("lora"), tiny_base, prepared), "merged", tmp_path / "out", CONFIG)
    assert read_json(tmp_path / "out/export.json") == msgspec.to_builtins(record)
    assert record.adapter_sha256 == adapter_sha256(trained("lora"))
    assert (record.version, record.commit, record.base.model) == ("v3", "c" * 40, "demo")
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"export.json"}
    assert record.files == {name: sha256_file(tmp_path / "out" / name) for name in written}
    assert {
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "config.json",
    } <= written
    assert abs(record.scores.difference["answer_nll"].mean) < 1e-5
    assert any("answer NLL" in line for line in tell(record, tmp_path))


def test_what_is_not_the_adapter_is_refused_and_nothing_is_left(
    trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    """Here by a tolerance that no float keeps."""
    strict = CONFIG.model_copy(update={"parity": ParityConfig(rows=12, tolerance=1e-12)})
    with pytest.raises(
        BaseModelError,
        match=r"(?s)what came out is not the adapter: .*the logits differ by up to.*nothing was written",
    ):
        export(source(trained("lora"), tiny_base, prepared), "merged", tmp_path / "out", strict)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "to"), [("prefix", "merged"), ("prefix", "gguf")])
def test_methods_that_do_not_merge_are_refused_with_the_reason(
    method: str, to: str, trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"`adapter.method: {method}` puts virtual tokens before every row"):
        export(source(trained(method), tiny_base, prepared), to, tmp_path / "out", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(
    trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(source(trained("lora"), tiny_base, prepared), "merged", tmp_path, CONFIG)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("method", "to", "taken", "said"),
    [("lora", "merged", True, "exists already"), ("prefix", "gguf", False, "virtual tokens")],
)
def test_an_export_is_refused_before_any_work(
    method: str,
    to: str,
    taken: bool,
    said: str,
    trained: Any,
    tiny_base: Path,
    prepared: Path,
    tmp_path: Path,
) -> None:
    made = source(trained(method), tiny_base, prepared)
    out = tmp_path if taken else tmp_path / "out"
    with pytest.raises(UserError, match=said):
        require_exportable(made, to, out)


def test_a_form_that_a_base_cannot_have_is_refused_by_its_config_alone(
    candidate: Path, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    require_exportable(source(candidate, base, prepared), "gguf", tmp_path / "out")
    config = json.loads((base / "config.json").read_text()) | {"attention_bias": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no GGUF: its linear layers have biases"):
        require_exportable(source(candidate, base, prepared), "gguf", tmp_path / "out")
    require_exportable(source(candidate, base, prepared), "merged", tmp_path / "out")


# --- GGUF ---


@pytest.mark.parametrize(
    ("to", "loss", "bits"), [("gguf", None, 16), ("int8", 0.01, 8.5), ("int4", 0.15, 5.5)]
)
def test_a_gguf_file_is_scored_beside_the_adapter(
    to: str, loss: float | None, bits: float, trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    record = export(source(trained("lora"), tiny_base, prepared), to, tmp_path / "out", CONFIG)
    assert set(record.files) == {FILE, "README.md"}
    weights = sum(weights.numel() for weights in load_gguf(tmp_path / "out").parameters() if weights.ndim > 1)
    assert (tmp_path / "out" / FILE).stat().st_size < weights * bits / 8 + 60_000, "weights, and a vocabulary"
    assert record.scores.adapter["answer_nll"] != record.scores.export["answer_nll"]
    if loss is None:
        assert record.check.result == "pass" and record.check.largest < 1e-3
    else:
        assert 0.001 < record.check.largest_loss < loss


def small_llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 520,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                **shape,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
                **settings,
            }
        )
    ).eval()


@pytest.mark.parametrize(
    "settings",
    [{"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"head_dim": 32}],
    ids=["untied", "tied", "wide heads"],
)
def test_another_reader_finds_the_same_model_in_the_file(
    settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    """Shared key heads, so that a wrong order of queries or keys would show."""
    model, tokenizer = small_llama(**settings), load_tokenizer(tiny_base)
    stop = ChatFormat(tokenizer).stop_id
    write_gguf(model, tokenizer, tmp_path / FILE, name="small", stop_id=stop, kind="gguf")
    ids = torch.randint(0, 500, (2, 30), generator=torch.Generator().manual_seed(1))
    loaded = load_gguf(tmp_path)
    with torch.inference_mode():
        assert (loaded(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 2e-3
    assert loaded.config.eos_token_id == stop


def test_the_file_holds_the_tokenizer_and_the_template(tiny_base: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokenizer = load_tokenizer(tiny_base)
    write_gguf(small_llama(), tokenizer, tmp_path / FILE, name="small", stop_id=4, kind="int8")
    fields = GGUFReader(tmp_path / FILE).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert tokens[4] == "<|end|>" and types[4] == 3, "a control token"
    assert (tokens[-1], types[-1]) == ("[PAD519]", 5), (
        "the model has more embeddings than the tokenizer has tokens"
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in ("def close(self): the file's 12 handlers", "  Zürich,\n\n\tnaïve — 東京", "<|end|>x"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(
            text, add_special_tokens=False
        )


def test_what_cannot_be_written_faithfully_is_refused_with_the_way_out(
    tiny_base: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_base)
    assert why_no_gguf(small_llama().config, tokenizer) == ""
    assert why_no_gguf(Qwen2Config(), tokenizer) == "the architecture is qwen2, only llama is written here"
    assert "biases" in why_no_gguf(LlamaConfig(attention_bias=True), tokenizer)
    scaled = small_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0})
    with pytest.raises(
        UserError, match=r"(?s)rotary positions are scaled \(linear\).*convert_hf_to_gguf\.py"
    ):
        write_gguf(scaled, tokenizer, tmp_path / FILE, name="small", stop_id=4, kind="gguf")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tiny_base: Path) -> None:
    """Each was tried in llama.cpp: it gave other ids."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import Whitespace

    config = small_llama().config

    def why(change: Any) -> str:
        tokenizer = load_tokenizer(tiny_base)
        change(tokenizer, tokenizer.backend_tokenizer.model)
        return why_no_gguf(config, tokenizer)

    assert why(lambda tokenizer, model: None) == ""
    assert "cuts text" in why(
        lambda tokenizer, model: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", Whitespace())
    )
    assert "cuts text" in why(lambda tokenizer, model: setattr(model, "ignore_merges", True)), (
        "a word of the vocabulary that no merges make"
    )
    assert "cuts text" in why(lambda tokenizer, model: setattr(model, "end_of_word_suffix", "</w>"))
    assert "drops blanks beside '<|sep|>'" in why(
        lambda tokenizer, model: tokenizer.add_tokens([AddedToken("<|sep|>", special=True, rstrip=True)])
    )
    assert "'seam'" in why(
        lambda tokenizer, model: tokenizer.add_tokens([AddedToken("seam", single_word=True)])
    )


def test_prompts_that_other_programs_would_tokenise_otherwise_are_counted(
    trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    """A word after `user:` and a blank takes the blank into its token when tokenized in one piece."""
    record = export(source(trained("lora"), tiny_base, prepared), "merged", tmp_path / "out", CONFIG)
    assert record.prompts == Prompts(rows=12, alike=12) and not any(
        "in one piece" in line for line in tell(record, tmp_path)
    )
    plain = tmp_path / "plain"
    shutil.copytree(trained("lora"), plain)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (plain / "chat_template.jinja").write_text(template)
    made = source(plain, tiny_base, prepared)
    asked = [
        Example(row.id, (Message("user", text), *row.messages[1:]), row.meta)
        for row, text in zip(made.rows, ["the file", "a module", "Which?"], strict=False)
    ]
    record = export(made._replace(rows=asked), "merged", tmp_path / "other", CONFIG)
    assert record.prompts == Prompts(rows=3, alike=1)
    assert any("2 of 3 prompts are other tokens" in line for line in tell(record, tmp_path))


# --- which version ---


@pytest.fixture(scope="module")
def checkout(
    tmp_path_factory: pytest.TempPathFactory, candidate: Path, tiny_base: Path, prepared: Path
) -> Path:
    """As a retraining leaves it, with v1 in charge."""
    place = tmp_path_factory.mktemp("checkout")
    root, made = make_repository(place / "repository"), place / "made"
    shutil.copytree(tiny_base, made / "base")
    shutil.copytree(candidate, made / "candidate")
    write_bytes(
        made / "prepared/test.jsonl", map(encode_line, list(read_examples(prepared / "test.jsonl"))[:5])
    )
    write_json(made / "evaluation/metrics.json", METRICS)
    outs = {
        "base": "models/base",
        "candidate": "models/candidate",
        "prepared": "data/prepared",
        "evaluation": "reports/evaluation",
    }
    stages = "".join(
        f"  {name}: {{cmd: cp -r ../made/{name} {out}, outs: [{out}]}}\n" for name, out in outs.items()
    )
    judged = Candidate("key", adapter_sha256(candidate))
    gate = msgspec.to_builtins(msgspec.structs.replace(DECISION, candidate=judged))
    folders = {f"{folder}/.gitignore": "" for folder in ("models", "data", "reports")}
    write_files(
        root,
        {
            "dvc.yaml": f"stages:\n{stages}",
            "params.yaml": "evaluate:\n  max_new_tokens: 6\n",
            "reports/gate.json": json.dumps(gate),
            **folders,
        },
    )
    dvc(root, "repro", "--quiet")
    made_at = commit(root, "Train")
    facts = {
        "run_key": "k",
        "run_id": "r",
        "batches": [],
        "data": {},
        "gate": {"verdict": "promote", "rival": None},
        "at": "2026-01-01T00:00:00Z",
        "by": "Ana",
        "why": "",
        "move": "promote",
    }
    write_champion(
        root,
        Champion(
            name="small",
            version=1,
            previous=None,
            commit=made_at,
            adapter_sha256=adapter_sha256(candidate),
            replaced=None,
            **facts,
        ),
    )
    commit(root, "Promote v1")
    for folder in ("models", "data/prepared", "reports/evaluation"):
        shutil.rmtree(root / folder)
    git(root, "checkout", "--quiet", "models")
    return root


@pytest.mark.parametrize(("which", "label"), [("candidate", "candidate"), ("1", "v1")])
def test_a_version_comes_whole_from_its_own_commit(
    which: str, label: str, checkout: Path, candidate: Path
) -> None:
    found = find_source(checkout, "small", which)
    assert (found.label, len(found.rows), found.metrics, found.decision.verdict) == (
        label,
        5,
        METRICS,
        "promote",
    )
    assert adapter_sha256(found.bundle.adapter) == adapter_sha256(candidate)
    assert found.bundle.generation.max_new_tokens == 6
    assert git(checkout, "status", "--porcelain").strip() == "", "the checkout is as it was"


def test_versions_that_are_not_there_are_told(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_mlflow(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="small has no v7"):
        find_source(checkout, "small", "v7")
    with pytest.raises(UserError, match="'newest' is no version"):
        find_source(checkout, "small", "newest")
    empty = make_repository(tmp_path / "empty")
    for which, words in (("candidate", "no candidate yet"), ("champion", "no champion yet")):
        with pytest.raises(UserError, match=words):
            find_source(empty, "small", which)


def test_a_version_that_was_in_charge_becomes_a_base_merged(
    checkout: Path, tiny_base: Path, candidate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    config = Config.model_validate({"base": {"model": "registered:small/v1"}})
    manifest = make_base(tmp_path / "base", config)
    assert manifest["model"] == f"sha256:{sha256_file(tmp_path / 'base/model.safetensors')}"
    assert (manifest["name"], manifest["revision"]) == ("small v1", None)
    ids = torch.arange(5, 30)[None]
    with torch.inference_mode():
        ours, theirs = load_base(tmp_path / "base"), load_merged(tiny_base, candidate)
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert not torch.equal(ours(ids).logits, load_base(tiny_base)(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"], "nothing half-made is left"
    assert git(checkout, "status", "--porcelain").strip() == ""


@pytest.mark.parametrize("model", ["v7", "registered:other/v1"])
def test_a_version_that_was_never_in_charge_is_no_base(
    model: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    config = Config.model_validate({"base": {"model": model}})
    with pytest.raises(BaseModelError, match=r"(?s)no such version.*ratchet export vN --to merged"):
        make_base(tmp_path / "base", config)


# --- the card ---


MANIFEST = TrainedManifest(AdapterRecord("qlora"), BaseName("org/base", "f" * 40))


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [
        ("adapter", "peft", "adapter"),
        ("merged", "transformers", "finetune"),
        ("gguf", "gguf", "finetune"),
        ("int4", "gguf", "quantized"),
    ],
)
def test_the_hub_reads_base_library_and_results_with_their_intervals(
    kind: str, library: str, relation: str
) -> None:
    card = ModelCard(
        hub_card("claims", "v3", kind, MANIFEST, decode_metrics(METRICS), DECISION, {"git commit": "abc"})
    )
    assert (card.data.base_model, card.data.library_name, card.data.base_model_relation) == (
        "org/base",
        library,
        relation,
    )
    assert {"ratchet", "qlora"} <= set(card.data.tags)
    assert card.data.license is None, "nobody told us"
    found = {result.metric_type: result for result in card.data.eval_results}
    assert set(found) == {"exact_match", "answer_nll"}
    assert (found["exact_match"].metric_value, found["exact_match"].metric_args) == (
        0.5,
        {"low": 0.4, "high": 0.6, "confidence": 0.95},
    )
    assert "## ✅ promote" in card.text and "- git commit: abc" in card.text


def test_a_base_that_is_on_no_hub_is_not_named_as_if_it_were() -> None:
    card = ModelCard(
        hub_card(
            "claims",
            "v3",
            "adapter",
            msgspec.structs.replace(MANIFEST, base=BaseName("demo")),
            decode_metrics(METRICS),
            DECISION,
            {},
        )
    )
    assert card.data.base_model is None
    assert "a small base that was made for it" in card.text


def test_the_card_tells_the_base_of_a_version_that_is_on_no_hub() -> None:
    base = BaseName(f"sha256:{'a' * 64}", name="Small One", licence="mit", dequantised="Q4_K_M")
    manifest = msgspec.structs.replace(MANIFEST, base=base)
    card = ModelCard(hub_card("claims", "v3", "adapter", manifest, decode_metrics(METRICS), DECISION, {}))
    assert card.data.base_model is None, "a sum is no hub id"
    for word in ("Small One", "a" * 64, "licence mit", "dequantised from Q4_K_M"):
        assert word in card.text


def test_the_card_of_an_export_tells_the_files_own_scores(
    trained: Any, tiny_base: Path, prepared: Path, tmp_path: Path
) -> None:
    record = export(source(trained("lora"), tiny_base, prepared), "int4", tmp_path / "out", CONFIG)
    card = ModelCard.load(tmp_path / "out/README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["answer_nll"] == pytest.approx(record.scores.export["answer_nll"].mean, abs=1e-6)
    assert "| | adapter | int4 | difference |" in card.text
