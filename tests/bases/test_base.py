"""Base models: a hub's from its cache without network, and the demo's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.data.dedup import split_by_hash
from ratchet.data.examples import read_examples
from ratchet.demo.tokenizer import CHAT_TEMPLATE
from ratchet.errors import BaseModelError, DataError
from ratchet.files import read_json, sha256_file
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import write_gguf
from ratchet.models.loading import load_base, load_tokenizer
from ratchet.models.manifests import describe_base, read_base_manifest
from tasks.base import make_base, reading

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(hub_cache, tiny_base) -> Path:
    """The files of `tiny/llama` at REVISION, laid out as huggingface_hub lays them out; a test may spoil
    them."""
    repository = hub_cache / "models--tiny--llama"
    files = repository / "snapshots" / REVISION
    shutil.copytree(tiny_base, files, ignore=shutil.ignore_patterns("manifest.json", "seen.txt"))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    yield files
    shutil.rmtree(repository)


def hub_config(**settings) -> Config:
    return Config(base=BaseConfig(**{"model": "tiny/llama", "revision": REVISION, **settings}))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(5, 30)[None]).logits


# --- a hub's model ---


def test_a_hub_model_in_the_cache_loads_without_network(tmp_path, snapshot, tiny_base):
    manifest = make_base(tmp_path / "base", hub_config())
    assert (manifest["model"], manifest["revision"], manifest["context"], manifest["vocab_size"]) == (
        "tiny/llama",
        REVISION,
        256,
        512,
    )
    assert manifest["weights"] == {"model.safetensors": sha256_file(snapshot / "model.safetensors")}
    torch.testing.assert_close(
        logits(load_base(tmp_path / "base")), logits(load_base(tiny_base)), rtol=0, atol=0
    )


def test_a_hub_models_weights_stay_in_the_cache_and_no_path_is_kept(tmp_path, snapshot):
    make_base(tmp_path / "base", hub_config())
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == [
        "chat_template.jinja",
        "generation_config.json",
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = "".join(path.read_text() for path in (tmp_path / "base").iterdir())
    assert str(snapshot.parents[2]) not in written
    assert str(tmp_path) not in written
    assert load_tokenizer(tmp_path / "base").chat_template == CHAT_TEMPLATE


def test_what_is_not_in_the_cache_is_named_with_the_command_that_fetches_it(tmp_path):
    (tmp_path / "params.yaml").write_text(
        render_params(Config(base=BaseConfig(model="tiny/absent", revision=REVISION)))
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tasks.base", "--out", "models/base", "--proof", "reports/base.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"BaseModelError: tiny/absent@{REVISION} is not in the hub's cache")
    assert f"hf download tiny/absent --revision {REVISION}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "models/base").exists()


def test_weights_that_went_from_the_cache_later_are_named(tmp_path, snapshot):
    make_base(tmp_path / "base", hub_config())
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=rf"weights of tiny/llama@{REVISION} are not on this machine"):
        load_base(tmp_path / "base")


def test_a_model_that_brings_pickles_alone_is_refused(tmp_path, snapshot):
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"holds no safetensors \(found \['pytorch_model.bin'\]\)"):
        make_base(tmp_path / "base", hub_config())
    assert not (tmp_path / "base").exists()


def test_a_model_that_is_cached_in_part_is_refused_with_what_is_missing(tmp_path, snapshot):
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        BaseModelError,
        match=r"(?s)1 of its weight files are missing, the first model-00002-of-00002.safetensors.*"
        "hf download",
    ):
        make_base(tmp_path / "base", hub_config())


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_wants_to_run_its_own_code_is_refused(tmp_path, snapshot, file):
    change_json(snapshot / file, auto_map={"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]})
    (snapshot / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(BaseModelError, match=rf"its own code \(auto_map in {file}\)"):
        make_base(tmp_path / "base", hub_config())


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path, snapshot):
    change_json(snapshot / "config.json", model_type="of-tomorrow")
    with pytest.raises(BaseModelError, match=r"(?s)cannot read.*of-tomorrow"):
        make_base(tmp_path / "base", hub_config())


def test_a_base_without_a_chat_template_needs_one_named(tmp_path, snapshot):
    (snapshot / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match=r"(?s)no chat template.*base\.chat_template"):
        make_base(tmp_path / "base", hub_config())
    with pytest.raises(BaseModelError, match=r"mine\.jinja, which does not exist"):
        make_base(tmp_path / "base", hub_config(chat_template=str(tmp_path / "mine.jinja")))
    (tmp_path / "mine.jinja").write_text(CHAT_TEMPLATE)
    make_base(tmp_path / "base", hub_config(chat_template=str(tmp_path / "mine.jinja")))
    assert load_tokenizer(tmp_path / "base").chat_template == CHAT_TEMPLATE


def test_a_hub_models_licence_is_told_beside_its_commit(tmp_path, snapshot):
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    make_base(tmp_path / "base", hub_config())
    told = describe_base(read_base_manifest(tmp_path / "base"))
    assert told == f"tiny/llama@{REVISION}, licence apache-2.0"


def test_a_hub_model_that_is_quantised_already_is_refused(tmp_path, snapshot):
    change_json(snapshot / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BaseModelError, match=r"(?s)quantised already \(by gptq.*qlora"):
        make_base(tmp_path / "base", hub_config())


def test_weights_that_a_hub_model_lacks_are_named_and_never_random(tmp_path, snapshot):
    weights = load_file(snapshot / "model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    make_base(tmp_path / "base", hub_config())
    save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    for act in (lambda: make_base(tmp_path / "again", hub_config()), lambda: load_base(tmp_path / "base")):
        with pytest.raises(
            BaseModelError,
            match=r"lacks 1 of its weights, or has them in another shape: model.layers.0.self_attn.q_proj",
        ):
            act()


def test_a_gguf_file_of_the_hub_is_taken_by_its_name(tmp_path, snapshot, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    path, stop = snapshot / "tiny-q8.gguf", ChatFormat(tokenizer).stop_id
    write_gguf(load_base(tiny_base), tokenizer, path, name="Tiny", stop_id=stop, kind="int8")
    manifest = make_base(tmp_path / "base", hub_config(model="tiny/llama:tiny-q8.gguf"))
    assert (manifest["model"], manifest["dequantised"]) == (f"sha256:{sha256_file(path)}", "Q8_0")
    apart = logits(load_base(tmp_path / "base")) - logits(load_base(tiny_base))
    assert 0 < apart.abs().max() < 0.1
    with pytest.raises(BaseModelError, match=r"other\.gguf"):
        make_base(tmp_path / "other", hub_config(model="tiny/llama:other.gguf"))


# --- the demo's own ---


def test_the_demos_base_read_no_row_that_preparation_holds_out(tiny_base, prepared):
    seen = set((tiny_base / "seen.txt").read_text().split())
    split = {
        name: {example.id for example in read_examples(prepared / f"{name}.jsonl")}
        for name in ("train", "validation", "test")
    }
    assert not seen & (split["test"] | split["validation"])
    assert (
        0.9 * len(seen) < len(seen & split["train"]) < len(split["train"])
    )  # the others contradict a row that came before


def test_the_demos_base_reads_no_row_that_may_become_golden(tiny_config):
    """The golden set is chosen by a row's own hash, whatever its neighbours are."""
    rows = reading(tiny_config.base.demo, tiny_config.prepare)
    assert {split_by_hash(row.id, tiny_config.prepare) for row in rows} == {"train"}


def test_the_demos_base_leaves_modules_to_the_adapter(tiny_base, prepared):
    read = set(read_json(tiny_base / "manifest.json")["modules"])
    there = {str(example.meta["module"]) for example in read_examples(prepared / "train.jsonl")}
    assert read < there


def test_the_same_settings_make_the_same_base(tmp_path, tiny_base, tiny_config):
    make_base(tmp_path / "again", tiny_config)
    assert read_json(tmp_path / "again/manifest.json") == read_json(tiny_base / "manifest.json")


def test_the_manifest_lists_every_file_with_its_hash(tiny_base):
    files = read_json(tiny_base / "manifest.json")["files"]
    assert files == {
        path.name: sha256_file(path) for path in tiny_base.iterdir() if path.name != "manifest.json"
    }


def test_a_demo_base_loads_as_any_model_does(tiny_base):
    torch.testing.assert_close(
        logits(load_base(tiny_base)), logits(AutoModelForCausalLM.from_pretrained(tiny_base)), rtol=0, atol=0
    )


def test_packages_without_documented_modules_are_named(tiny_config):
    demo = tiny_config.base.demo.model_copy(update={"packages": ["json"]})
    with pytest.raises(DataError, match=r"`base.demo.packages` \['json'\] gives no rows"):
        reading(demo, tiny_config.prepare)
