"""Versions made ready from git and the DVC cache of a real repository; no model is loaded here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from places import commit, flip, make_repository, write_files
from safetensors.torch import save_file

from ratchet.errors import BaseModelError, CheckoutError, CommandError, DamagedError
from ratchet.files import sha256_file, write_json
from ratchet.models.loading import WEIGHTS, adapter_sha256
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.dvc import share_cache
from ratchet.serving.bundle import SERVING, Bundle, check_adapter, forget_bundles, make_bundle

PIPELINE = """
stages:
  base: {cmd: cp -r ../made/base models/base, outs: [models/base]}
  train: {cmd: cp -r ../made/candidate models/candidate, deps: [strength], outs: [models/candidate]}
"""


class Made:
    """A repository with two trained versions, as a retraining leaves them, and the bundles of both."""

    def __init__(self, place: Path) -> None:
        self.root, self._made = make_repository(place / "repository"), place / "made"
        self.commits: dict[int, str] = {}
        self.hashes: dict[int, str] = {}
        for version in (1, 2):
            self._train(version)
        self.bundles = {version: self.bundle(version) for version in (1, 2)}

    def _train(self, version: int) -> None:
        write_files(self._made, {"base/weights": "numbers"})
        described = {"model": "demo", "revision": None, "context": 256}
        files = {"weights": sha256_file(self._made / "base/weights")}
        write_json(self._made / "base/manifest.json", described | {"files": files})
        make_adapter(self._made / "candidate", strength=version)
        params = f"evaluate:\n  max_new_tokens: {4 + version}\nan_older_key: 1\n"
        write_files(
            self.root,
            {"dvc.yaml": PIPELINE, "params.yaml": params, "strength": str(version), "models/.gitignore": ""},
        )
        dvc(self.root, "repro", "--quiet")
        self.commits[version] = commit(self.root, f"Train v{version}")
        self.hashes[version] = adapter_sha256(self.root / "models/candidate")

    def bundle(self, version: int, **changed: Any) -> Bundle:
        return make_bundle(
            self.root,
            **{
                "name": "small",
                "version": version,
                "commit": self.commits[version],
                "adapter_sha256": self.hashes[version],
            }
            | changed,
        )


def make_adapter(folder: Path, *, strength: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"layer.lora_A.weight": torch.full((2, 2), strength)}, folder / WEIGHTS)
    write_json(folder / "adapter_config.json", {"r": 2})
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def made(original: Made, tmp_path: Path) -> Made:
    copy = object.__new__(Made)
    copy.__dict__ = original.__dict__ | {"root": tmp_path / "repository"}
    shutil.copytree(original.root, copy.root, symlinks=True)
    return copy


def test_a_bundle_holds_the_adapter_its_base_and_the_settings_of_its_own_commit(original: Made) -> None:
    found = original.bundles
    assert {version: adapter_sha256(bundle.adapter) for version, bundle in found.items()} == original.hashes
    assert [found[version].generation.max_new_tokens for version in (1, 2)] == [5, 6]
    assert found[1].base == found[2].base and (found[1].base / "manifest.json").exists(), "one base for both"
    assert found[1].max_length == 256, "the context of the base"
    assert git(original.root, "status", "--porcelain").strip() == "", "the checkout is as it was"


def test_a_bundle_that_is_there_asks_neither_git_nor_dvc(made: Made) -> None:
    shutil.rmtree(made.root / ".git")
    assert made.bundle(1).generation.max_new_tokens == 5


def test_an_adapter_with_other_bytes_than_the_ledgers_leaves_nothing_behind(made: Made) -> None:
    forget_bundles(made.root, keep={2}, older_than=0)
    with pytest.raises(BaseModelError, match="the ledger says ffffffffffff"):
        made.bundle(1, adapter_sha256="f" * 64)
    with pytest.raises(CheckoutError, match="the commit 00000000 cannot be read"):
        made.bundle(1, commit="0" * 40, adapter_sha256="f" * 64)
    assert not list((made.root / SERVING).glob("*v1*"))


def test_a_bundle_that_lost_its_base_is_fetched_again(made: Made) -> None:
    shutil.rmtree(made.root / SERVING / "bases")
    assert (made.bundle(1).base / "manifest.json").exists()


def test_a_clone_that_is_behind_fetches_the_commit_of_a_new_version(made: Made, tmp_path: Path) -> None:
    git(made.root, "branch", "old", made.commits[1])
    clone, url = tmp_path / "clone", f"file://{made.root}"
    git(tmp_path, "clone", "--quiet", "--single-branch", "--branch", "old", url, str(clone))
    git(clone, "remote", "set-branches", "origin", "*")
    share_cache(made.root, clone)
    origin, made.root = made.root, clone
    with pytest.raises(CommandError):
        git(clone, "cat-file", "-e", made.commits[2])
    assert adapter_sha256(made.bundle(2).adapter) == made.hashes[2]
    assert git(clone, "rev-parse", "HEAD").strip() == made.commits[1] != git(origin, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("training_args.bin", "x", "pickled files"),
        ("inner/model.PKL", "x", "pickled files"),
        ("config.json", '{"auto_map": {"AutoModel": "evil.Model"}}', "code of its own"),
    ],
)
def test_pickled_files_and_code_of_a_models_own_are_refused(
    name: str, text: str, words: str, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapter")
    write_files(folder, {name: text})
    with pytest.raises(BaseModelError, match=words):
        check_adapter(folder, adapter_sha256(folder))


def test_an_adapter_without_weights_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (make_adapter(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(BaseModelError, match=r"holds adapter_config\.json; wanted one of"):
        check_adapter(tmp_path, "f" * 64)


def test_old_bundles_and_half_ones_are_forgotten_and_the_base_of_the_others_stays(made: Made) -> None:
    (made.root / SERVING / ".v3-abc.999.tmp").mkdir()
    forget_bundles(made.root, keep=set())
    assert len(list((made.root / SERVING).iterdir())) == 4, "young ones stay"
    forget_bundles(made.root, keep={2}, older_than=0)
    shutil.rmtree(made.root / ".git")
    assert sorted(path.name[:3] for path in (made.root / SERVING).iterdir()) == ["bas", "v2-"]
    assert made.bundle(2).base.exists()
    forget_bundles(made.root, keep=set(), older_than=0)
    assert [path.name for path in (made.root / SERVING).rglob("*")] == ["bases"]


@pytest.mark.parametrize("part", ["adapter", "base"])
def test_a_damaged_copy_is_fetched_again_and_refused_where_the_cache_is_damaged_too(
    made: Made, part: str
) -> None:
    """Its bytes are read at each load: a flipped bit changes neither time nor size nor mode."""
    weights = {"adapter": made.bundle(1).adapter / WEIGHTS, "base": made.bundle(1).base / "weights"}[part]
    good = weights.read_bytes()
    flip(weights)
    assert {"adapter": made.bundle(1).adapter / WEIGHTS, "base": made.bundle(1).base / "weights"}[
        part
    ].read_bytes() == good
    flip(weights)
    for stored in (made.root / ".dvc/cache/files/md5").rglob("*"):
        if stored.is_file() and stored.read_bytes() == good:
            flip(stored)
    with pytest.raises(DamagedError, match="rm -f"):
        made.bundle(1)


def test_a_bundle_has_files_of_its_own_so_it_serves_without_the_cache_and_elsewhere(
    made: Made, tmp_path: Path
) -> None:
    """DVC links to its cache where the configuration says so, as that of this repository does."""
    forget_bundles(made.root, keep=set(), older_than=0)
    dvc(made.root, "config", "--local", "cache.type", "symlink")
    made.bundle(1)
    assert not [path for path in (made.root / SERVING).rglob("*") if path.is_symlink()]
    for folder in (".dvc/cache", ".git"):
        shutil.rmtree(made.root / folder)
    made.root = made.root.rename(tmp_path / "elsewhere")
    assert adapter_sha256(made.bundle(1).adapter) == made.hashes[1]


def test_links_of_an_earlier_release_become_files_and_those_that_lead_nowhere_are_fetched_again(
    made: Made, tmp_path: Path
) -> None:
    for bundle in made.bundles.values():
        for path in (made.root / SERVING / bundle.adapter.parent.name / "adapter").iterdir():
            path.rename(tmp_path / f"{bundle.version}-{path.name}")
            path.symlink_to(tmp_path / f"{bundle.version}-{path.name}")
    (tmp_path / "2-adapter_config.json").unlink()
    for version in (1, 2):
        adapter = made.bundle(version).adapter
        assert adapter_sha256(adapter) == made.hashes[version] and (adapter / "adapter_config.json").exists()
        assert not any(path.is_symlink() for path in adapter.iterdir())
