"""Bases from folders, DVC, URLs and GGUF files: the same weights are the same base wherever they lay, and
what cannot be used is refused before anything is spent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from places import commit, make_repository, write_files
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ratchet.bases.files import find_licence
from ratchet.bases.source import DOWNLOADS
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.errors import BaseModelError
from ratchet.files import sha256_file
from ratchet.models.adapters import load_trained
from ratchet.models.chat_template import ChatFormat
from ratchet.models.gguf import load_gguf, write_gguf
from ratchet.models.loading import load_base, load_tokenizer
from ratchet.models.manifests import (
    BaseName,
    describe_base,
    read_base_manifest,
    read_trained_manifest,
)
from ratchet.models.merging import load_merged
from ratchet.pipeline.checkout import dvc
from ratchet.pipeline.workspace import open_workspace
from ratchet.serving.admission import check_adapter_fits
from ratchet.serving.bundle import Bundle, Generation
from tasks.base import make_base
from tasks.tokenize import tokenize
from tasks.train import Training, train

OURS = ("manifest.json", "seen.txt")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's root, as the working directory and as the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def model(project: Path, tiny_base: Path) -> Path:
    """A model's folder as others would bring it; a test may spoil it."""
    folder = project / "models-in/small"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns(*OURS))
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return make_gguf(path, tiny_base, "int4")


def make_gguf(path: Path, of: Path, kind: str) -> Path:
    tokenizer = load_tokenizer(of)
    stop = ChatFormat(tokenizer).stop_id
    write_gguf(load_base(of), tokenizer, path, name="Small One", stop_id=stop, kind=kind)
    return path


def config(model: str | Path, **settings: Any) -> Config:
    return Config(base=BaseConfig(model=str(model), **settings))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(5, 30)[None]).logits


def same_model(one: Path, other: Path) -> bool:
    return torch.equal(logits(load_base(one)), logits(load_base(other)))


def refused(model: str | Path, project: Path, **settings: Any) -> str:
    """The refusal; nothing is left behind."""
    with pytest.raises(BaseModelError) as raised:
        make_base(project / "out", config(model, **settings))
    assert not (project / "out").exists()
    assert raised.value.remedy
    return str(raised.value)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> list[str]:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


# --- folders ---


def test_a_folder_is_taken_as_the_model_that_it_is(project: Path, model: Path, tiny_base: Path) -> None:
    manifest = make_base(project / "base", config("./models-in/small"))
    sha256 = sha256_file(model / "model.safetensors")
    assert (manifest["model"], manifest["revision"]) == (f"sha256:{sha256}", None)
    assert (manifest["context"], manifest["vocab_size"]) == (256, 512)
    assert same_model(project / "base", tiny_base)
    shutil.rmtree(model)
    assert same_model(project / "base", tiny_base), "it needs the folder no more"


def test_the_same_files_elsewhere_are_the_same_base_to_the_byte(project: Path, model: Path) -> None:
    make_base(project / "one", config("./models-in/small"))
    moved = shutil.move(model, project / "other name")
    make_base(project / "two", config(moved))
    one, two = project / "one", project / "two"
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    assert all(path.read_bytes() == (two / path.name).read_bytes() for path in one.iterdir())
    assert not any(str(project).encode() in path.read_bytes() for path in one.iterdir())


def test_shards_are_one_base_under_one_sum(project: Path, model: Path, tiny_base: Path) -> None:
    names = shard(model)
    assert len(names) > 1
    manifest = make_base(project / "base", config("./models-in/small"))
    assert sorted(manifest["weights"]) == names
    lines = "".join(f"{sha256_file(model / name)}  {name}\n" for name in names)  # as sha256sum prints them
    assert manifest["model"] == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"
    assert same_model(project / "base", tiny_base)


def test_a_pinned_sum_holds_other_weights_off(project: Path, model: Path) -> None:
    sha256 = sha256_file(model / "model.safetensors")
    make_base(project / "base", config("./models-in/small", revision=sha256))
    message = refused("./models-in/small", project, revision="0" * 64)
    assert sha256 in message and "0" * 64 in message


def test_a_folder_in_the_hubs_own_cache_is_taken(project: Path, model: Path, tiny_base: Path) -> None:
    """Its files are links to blobs beside the snapshots."""
    snapshot, blobs = project / "models--a--b/snapshots/main", project / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(model, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    make_base(project / "base", config(snapshot))
    assert same_model(project / "base", tiny_base)


def test_the_default_of_named_templates_is_taken_alone(project: Path, model: Path) -> None:
    own = (model / "chat_template.jinja").read_text()
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    assert isinstance(load_tokenizer(model).chat_template, dict)
    make_base(project / "base", config("./models-in/small"))
    assert load_tokenizer(project / "base").chat_template == own
    assert all(path.is_file() for path in (project / "base").iterdir())


def test_named_templates_without_a_default_are_told(project: Path, model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (model / f"additional_chat_templates/{name}.jinja").write_text("{{ tools }}")
    message = refused("./models-in/small", project)
    assert "rag, tool_use" in message and "base.chat_template" in message


# --- licences ---


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"README.md": "---\ntags: [a]\nlicense: apache-2.0\n---\n# Small"}, "apache-2.0"),
        ({"README.md": "---\nlicense: other\nlicense_name: 'llama3.2'\n---\n"}, "llama3.2"),
        ({"README.md": "# Small\nlicense: mit\n", "LICENSE": "\n  BSD 3-Clause\nCopyright"}, "BSD 3-Clause"),
        ({"LICENCE.txt": "MIT License\n"}, "MIT License"),
        ({"README.md": "# Small\n"}, "unknown"),
    ],
)
def test_the_licence_is_what_the_folder_says(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    write_files(tmp_path, files)
    assert find_licence(tmp_path) == licence


def test_a_base_is_told_by_name_sum_and_licence(project: Path, model: Path) -> None:
    (model / "LICENSE").write_text("MIT License\n")
    make_base(project / "base", config("./models-in/small"))
    told = describe_base(read_base_manifest(project / "base"))
    assert sha256_file(model / "model.safetensors") in told and "MIT License" in told
    assert describe_base(BaseName("org/name", "f" * 40, licence="mit")) == f"org/name@{'f' * 40}, licence mit"


# --- what is refused ---


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_to_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def break_a_shard(folder: Path) -> None:
    (folder / shard(folder)[1]).unlink()


def break_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')


def break_by_code(folder: Path) -> None:
    change_json(folder / "config.json", auto_map={"AutoConfig": "evil.Evil"})


def break_by_link(folder: Path) -> None:
    (folder.parent / "secret.json").write_text("{}")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("../secret.json")


def break_to_a_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def break_in_half(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def break_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_shapes(folder: Path) -> None:
    change_json(folder / "config.json", intermediate_size=48)


def break_by_rounding(folder: Path) -> None:
    change_json(
        folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    )


def break_by_gptq(folder: Path) -> None:
    """Older programs say it in no config."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, dtype=torch.int32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def break_into_several(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_nothing_there, ["./models-in/small", "does not exist", "repository's root"]),
        (break_config, ["no config.json", "model.safetensors", "save_pretrained"]),
        (break_json, ["config.json is no JSON object"]),
        (break_to_pickle, ["no safetensors", "pytorch_model.bin", "pickles are never loaded"]),
        (break_to_adapter, ["an adapter", "whole model"]),
        (break_a_shard, ["in part", "1 of its weight files", "model-00002-of-"]),
        (break_the_index, ["'../../secret.safetensors'", "no file of its own folder"]),
        (break_by_code, ["its own code", "auto_map in config.json", "never run"]),
        (break_by_link, ["generation_config.json", "outside the folder", "cp -rL"]),
        (break_to_a_pointer, ["git LFS", "git lfs pull"]),
        (break_in_half, ["model.safetensors", "no whole safetensors file"]),
        (break_weights, ["lacks 1 of its weights", "model.layers.1.mlp.up_proj.weight", "random"]),
        (break_shapes, ["in another shape", "mlp.down_proj.weight"]),
        (break_by_rounding, ["quantised already", "bitsandbytes load_in_4bit", "merged", "qlora"]),
        (break_by_gptq, ["quantised already", "up_proj.qweight"]),
        (break_tokenizer, ["no tokenizer"]),
        (break_into_several, ["2 GGUF files", "a.gguf", "base.model: ./models-in/small/a.gguf"]),
    ],
    ids=lambda value: value.__name__.removeprefix("break_") if callable(value) else "",
)
def test_a_folder_that_cannot_be_used_is_refused(
    project: Path, model: Path, spoil: Any, words: list[str]
) -> None:
    spoil(model)
    message = refused("./models-in/small", project)
    assert [word for word in words if word not in message] == [], message


# --- GGUF files ---


def test_a_gguf_file_becomes_a_base_that_computes_what_the_file_says(project: Path, gguf: Path) -> None:
    manifest = make_base(project / "base", config(gguf))
    assert manifest["model"] == f"sha256:{sha256_file(gguf)}"
    assert (manifest["dequantised"], manifest["name"]) == ("Q4_0", "Small One")
    assert "dequantised from Q4_0" in describe_base(read_base_manifest(project / "base"))
    ours, theirs = logits(load_base(project / "base")), logits(load_gguf(gguf.parent))
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max(), "float16 rounds, by 2^-11"
    weights = load_file(project / "base/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_a_gguf_file_keeps_the_tokenizer_and_the_stop(project: Path, gguf: Path, tiny_base: Path) -> None:
    make_base(project / "base", config(gguf))
    ours, theirs = (ChatFormat(load_tokenizer(folder)) for folder in (project / "base", tiny_base))
    assert ours.stop_id == theirs.stop_id
    text = "def close(self): the file's 12 handlers\n\n  x  =  3"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)


def test_a_gguf_file_under_another_name_and_beside_others_files_is_the_same_base(
    project: Path, gguf: Path
) -> None:
    make_base(project / "one", config(gguf))
    (project / "there").mkdir()
    shutil.copy(gguf, project / "there/other.gguf")
    (project / "there/tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    make_base(project / "two", config("./there"))
    assert (project / "one/manifest.json").read_bytes() == (project / "two/manifest.json").read_bytes()


def test_a_gguf_file_of_floats_is_not_called_dequantised(project: Path, tiny_base: Path) -> None:
    manifest = make_base(project / "base", config(make_gguf(project / "f16.gguf", tiny_base, "gguf")))
    assert "dequantised" not in manifest


def rewrite(
    gguf: Path, out: Path, *, drop: str = "", add: dict[str, Any] | None = None, tensor: str = ""
) -> Path:
    """A copy with a field left out or changed, or with one more tensor."""
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(gguf)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    add = add or {}
    writer = GGUFWriter(out, add.get("general.architecture", "llama"))
    for name, field in fields.items():
        if name in (drop, "general.architecture"):
            continue
        value = add.get(name, field.contents())
        inner = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], inner)
    for name in set(add) - set(fields):
        writer.add_uint32(name, add[name])
    for part in reader.tensors:
        writer.add_tensor(part.name, part.data, raw_dtype=part.tensor_type)
    if tensor:
        writer.add_tensor(tensor, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"add": {"general.architecture": "of-tomorrow"}}, ["of-tomorrow", "own folder with safetensors"]),
        ({"tensor": "rope_freqs.weight"}, ["rope_freqs.weight", "something else"]),
        ({"add": {"tokenizer.ggml.pre": "of-tomorrow"}}, ["'of-tomorrow'", "other tokens"]),
        ({"drop": "tokenizer.chat_template"}, ["no chat template", "base.chat_template"]),
        ({"add": {"split.count": 3}}, ["one of 3 parts", "llama-gguf-split --merge"]),
    ],
    ids=["architecture", "tensor without a place", "splits of text", "no template", "parts"],
)
def test_a_gguf_file_that_cannot_be_read_faithfully_is_refused(
    project: Path, gguf: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refused(rewrite(gguf, project / "other.gguf", **changes), project)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, -1])
def test_a_gguf_file_that_was_cut_off_is_refused(project: Path, gguf: Path, keep: int) -> None:
    (project / "cut.gguf").write_bytes(gguf.read_bytes()[:keep])
    message = refused("./cut.gguf", project)
    assert "./cut.gguf" in message


def test_digits_are_cut_as_the_file_says(project: Path, gguf: Path) -> None:
    """transformers reads `smollm` as GPT-2, which puts the blank before a number into one piece with it."""
    path = rewrite(gguf, project / "digits.gguf", add={"tokenizer.ggml.pre": "smollm"})
    make_base(project / "base", config(path))
    backend = load_tokenizer(project / "base").backend_tokenizer
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


def test_a_training_knows_its_base_by_sum_wherever_the_file_lay(
    project: Path, gguf: Path, prepared: Path, nobody: Path, tiny_config: Config
) -> None:
    keys, elsewhere = [], project / "elsewhere.gguf"
    shutil.copy(gguf, elsewhere)
    for path in (gguf, elsewhere):
        settings = tiny_config.model_copy(update={"base": BaseConfig(model=str(path))})
        base, tokens = project / f"base-{path.stem}", project / f"tokens-{path.stem}"
        make_base(base, settings)
        tokenize(prepared, base, nobody, tokens, settings)
        keys.append(Training(tokens, base, nobody, project / "out", settings).run_key)
    assert keys[0] == keys[1]
    train(tokens, base, nobody, project / "out", project / "reports", settings)
    trained = read_trained_manifest(project / "out")
    assert (trained.base.model, trained.base.dequantised) == (f"sha256:{sha256_file(gguf)}", "Q4_0")
    bundle = Bundle("small", 1, project / "out", base, 256, Generation(8))
    check_adapter_fits(bundle)
    merged = load_merged(base, project / "out")
    adapter = load_trained(base, project / "out")
    assert (logits(merged) - logits(adapter)).abs().max() < 1e-4


# --- URLs ---


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A place that can be away."""
    files = fsspec.filesystem("memory")
    files.rm("/", recursive=True)
    yield files
    files.rm("/", recursive=True)


def upload(files: Any, folder: Path, to: str) -> None:
    for path in folder.iterdir():
        files.pipe_file(f"{to}/{path.name}", path.read_bytes())


def test_a_url_is_downloaded_once_and_works_without_the_place(
    project: Path, model: Path, tiny_base: Path, bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(bucket, model, "/small")
    bucket.pipe_file("/small/pytorch_model.bin", b"never fetched")
    manifest = make_base(project / "base", config("memory://small"))
    assert same_model(project / "base", tiny_base)
    assert not list(project.glob(f"{DOWNLOADS}/**/*.bin"))
    bucket.rm("/small", recursive=True)
    capsys.readouterr()
    assert make_base(project / "again", config("memory://small")) == manifest
    assert "downloaded before" in capsys.readouterr().out
    assert make_base(project / "local", config("./models-in/small"))["model"] == manifest["model"]


def test_what_changed_at_the_place_is_fetched_again(project: Path, model: Path, bucket: Any) -> None:
    upload(bucket, model, "/small")
    first = make_base(project / "base", config("memory://small"))
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    upload(bucket, model, "/small")
    second = make_base(project / "base", config("memory://small"))
    assert first["model"] != second["model"] == f"sha256:{sha256_file(model / 'model.safetensors')}"


def test_a_download_that_was_cut_goes_on_where_it_was(
    project: Path, model: Path, tiny_base: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bucket, model, "/small")
    fetched: list[str] = []
    whole = type(bucket).get_file

    def get_file(self: Any, path: str, local: str, **settings: Any) -> None:
        fetched.append(Path(path).name)
        if path.endswith("tokenizer.json") and fetched.count("tokenizer.json") == 1:
            Path(local).write_bytes(b"half")
            raise OSError("the line is cut")
        whole(self, path, local, **settings)

    monkeypatch.setattr(type(bucket), "get_file", get_file)
    assert "the line is cut" in refused("memory://small", project)
    make_base(project / "base", config("memory://small"))
    assert same_model(project / "base", tiny_base)
    assert fetched.count("model.safetensors") == 1 and fetched.count("tokenizer.json") == 2


def test_a_gguf_file_behind_a_url_is_taken(project: Path, gguf: Path, bucket: Any) -> None:
    bucket.pipe_file("/there/small.gguf", gguf.read_bytes())
    manifest = make_base(project / "base", config("memory://there/small.gguf"))
    assert manifest["model"] == f"sha256:{sha256_file(gguf)}"


def test_the_query_of_a_url_is_neither_a_files_name_nor_told(
    project: Path, gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may hold a signature. One request each, in order, so that nothing is left open."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(gguf.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/model.gguf?signature=hidden"
        manifest = make_base(project / "base", config(url))
        away = refused(url.replace("model.gguf", "other.gguf"), project)
        server.shutdown()
    assert manifest["model"] == f"sha256:{sha256_file(gguf)}"
    assert "hidden" not in capsys.readouterr().out + away
    assert make_base(project / "again", config(url)) == manifest, "and without the server"


def test_a_folder_behind_a_file_url_is_taken(project: Path, model: Path, tiny_base: Path) -> None:
    make_base(project / "base", config(model.as_uri()))
    assert same_model(project / "base", tiny_base)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("memory://nowhere", ["memory://nowhere", "cannot be read"]),
        ("memory://pickles", ["no safetensors", "model.bin", "never loaded"]),
        ("ossfs-of-tomorrow://b/m", ["no URL that fsspec reads", "s3://"]),
        ("tos://bucket/model", ["pip install tosfs"]),
    ],
)
def test_a_url_that_leads_to_no_model_is_refused(
    project: Path, bucket: Any, url: str, words: list[str]
) -> None:
    bucket.pipe_file("/pickles/model.bin", b"")
    message = refused(url, project)
    assert [word for word in words if word not in message] == [], message


# --- a workspace is a clone ---


def test_a_folder_that_git_ignores_is_read_from_the_checkout(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_repository(tmp_path / "repository", {".gitignore": "/models-in/\n.ratchet/\n"})
    shutil.copytree(tiny_base, root / "models-in/small", ignore=shutil.ignore_patterns(*OURS))
    monkeypatch.setenv("RATCHET_ROOT", str(root))
    with open_workspace(root, "test", print) as workspace:
        assert not (workspace.path / "models-in").exists()
        monkeypatch.chdir(workspace.path)
        make_base(workspace.path / "models/base", config("./models-in/small"))
        assert same_model(workspace.path / "models/base", tiny_base)
        monkeypatch.chdir(tmp_path)


def test_a_folder_that_dvc_tracks_comes_into_the_workspace(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_repository(tmp_path / "repository")
    shutil.copytree(tiny_base, root / "models-in/small", ignore=shutil.ignore_patterns(*OURS))
    dvc(root, "add", "--quiet", "models-in/small")
    commit(root, "Add a model")
    shutil.rmtree(root / "models-in/small")
    monkeypatch.setenv("RATCHET_ROOT", str(root))
    with open_workspace(root, "test", print) as workspace:
        monkeypatch.chdir(workspace.path)
        make_base(workspace.path / "models/base", config("./models-in/small"))
        assert same_model(workspace.path / "models/base", tiny_base)
        absolute = make_base(workspace.path / "models/again", config(root / "models-in/small"))
        assert absolute["model"] == read_base_manifest(workspace.path / "models/base").model
        monkeypatch.chdir(tmp_path)
    shutil.rmtree(root / ".dvc/cache")
    monkeypatch.chdir(root)
    message = refused("./models-in/small", tmp_path)
    assert "DVC tracks" in message and "dvc push" in message
