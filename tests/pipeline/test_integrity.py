"""Bytes that are not those that were stored are found before anything is computed from them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from places import commit, flip, make_repository, write_files

from ratchet.errors import DamagedError, StageError
from ratchet.files import sha256_file, write_json
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.dvc import check_out, run_stage
from ratchet.pipeline.integrity import (
    GONE,
    check_inputs,
    check_manifest,
    find_damage,
    is_whole,
    object_path,
    tracked_hashes,
)
from ratchet.pipeline.workspace import get_output, open_workspace

ROOT = Path(__file__).parents[2]
# `use.py` stands for a stage of ours: it goes through the same `run_stage` as all of them.
PIPELINE = f"""
stages:
  tokenize: {{cmd: cp -r made/tokens tokens, deps: [strength], outs: [tokens]}}
  train:
    cmd: PYTHONPATH={ROOT} python use.py --raw raw --tokens tokens --out out
    deps: [tokens, raw]
    outs: [out]
"""
USE = """
from pathlib import Path
from ratchet.pipeline.stage import run_stage

def use(config, arguments):
    arguments.out.write_bytes((arguments.tokens / "train.arrow").read_bytes())

run_stage("", ["raw", "tokens", "out"], use)
"""


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    root = make_repository(tmp_path_factory.mktemp("integrity") / "checkout")
    files = {"dvc.yaml": PIPELINE, "strength": "1", "use.py": USE, ".gitignore": "/tokens\n/out\n/raw\n"}
    files |= {
        "made/tokens/train.arrow": "windows " * 99,
        "made/tokens/inner/more.txt": "more",
        "raw/a": "rows",
    }
    write_files(root, files)
    dvc(root, "config", "cache.type", "symlink")  # as in a project's .dvc/config, where there are no reflinks
    dvc(root, "add", "--quiet", "raw")
    dvc(root, "repro", "--quiet", "tokenize")
    commit(root, "Tokenize")
    return root


@pytest.fixture
def root(original, tmp_path) -> Path:
    """A checkout of its own; its links are made anew, since they name the first one's cache."""
    root = tmp_path / "checkout"
    shutil.copytree(original, root, symlinks=True, ignore=shutil.ignore_patterns("tokens", "raw"))
    shutil.copytree(original / "made", root / "made", dirs_exist_ok=True)
    dvc(root, "checkout", "--quiet", "--allow-missing")
    return root


def hashes_of(root: Path, name: str) -> dict[str, str]:
    found = tracked_hashes(
        root, Path(name), lambda file: (root / file).read_text() if (root / file).exists() else None
    )
    assert found is not None
    return found


def stored(root: Path, name: str, file: str) -> Path:
    return object_path(root, hashes_of(root, name)[file].removeprefix("md5:"))


def test_dvcs_hashes_are_found_for_a_folder_a_file_in_it_and_data_added_by_hand(root):
    assert hashes_of(root, "tokens").keys() == {"train.arrow", "inner/more.txt"}
    assert hashes_of(root, "tokens/inner") == {"more.txt": hashes_of(root, "tokens")["inner/more.txt"]}
    assert hashes_of(root, "tokens/train.arrow") == {"": hashes_of(root, "tokens")["train.arrow"]}
    assert hashes_of(root, "raw").keys() == {"a"}
    assert tracked_hashes(root, Path("strength"), lambda name: None) is None


def test_good_bytes_pass(root):
    check_inputs(root, ["tokens", "raw", "strength", "./tokens/train.arrow"])


@pytest.mark.parametrize(
    ("name", "file"), [("tokens", "train.arrow"), ("tokens", "inner/more.txt"), ("raw", "a")]
)
def test_a_flipped_bit_is_refused_with_its_file_and_the_object_to_remove(root, name, file):
    damaged = stored(root, name, file)
    flip(damaged)
    with pytest.raises(DamagedError) as caught:
        check_inputs(root, ["strength", name])
    assert str(root / name / file) in str(caught.value) and f"rm -f {damaged}" in str(caught.value)


def test_a_damaged_copy_beside_a_good_object_is_told_apart(root):
    good, here = stored(root, "tokens", "train.arrow"), root / "tokens/train.arrow"
    here.unlink()
    shutil.copy(good, here)
    flip(here)
    with pytest.raises(DamagedError, match=f"cache holds good ones: rm -f {here}"):
        check_inputs(root, ["tokens"])
    good.unlink()
    with pytest.raises(DamagedError, match=f"rm -f {here}; DVC's cache holds no other copy"):
        check_inputs(root, ["tokens"])


def test_a_missing_file_and_a_damaged_list_of_files_are_refused(root):
    (root / "tokens/train.arrow").unlink()
    with pytest.raises(DamagedError, match=f"{GONE}…, wanted md5:"):
        check_inputs(root, ["tokens"])
    listing = next((root / ".dvc/cache/files/md5").rglob("*.dir"))
    flip(listing)
    with pytest.raises(DamagedError, match=listing.name):
        check_inputs(root, ["tokens", "raw"])


def test_a_stage_refuses_a_flipped_input_and_makes_it_again_once_the_object_is_removed(root, monkeypatch):
    """The stage that made the tokens makes them again, so what follows has the bytes of an undamaged run."""
    damaged = stored(root, "tokens", "train.arrow")
    flip(damaged)
    with pytest.raises(StageError) as caught, open_workspace(root, "test", quiet) as workspace:
        check_out(workspace)
        run_stage(workspace, "train", quiet)
    assert "tokens/train.arrow" in str(caught.value) and f"rm -f {damaged}" in str(caught.value)
    assert caught.value.exit_code == 2
    damaged.unlink()
    with open_workspace(root, "test", quiet) as workspace:
        check_out(workspace)
        run_stage(workspace, "tokenize", quiet)
        run_stage(workspace, "train", quiet)
        assert (workspace.path / "out").read_text() == "windows " * 99
        assert damaged.read_text() == "windows " * 99


def test_what_is_fetched_of_a_commit_is_checked_and_a_damaged_copy_is_not_left(root, tmp_path):
    head = git(root, "rev-parse", "HEAD").strip()
    get_output(root, head, "tokens", tmp_path / "good")
    assert (tmp_path / "good/train.arrow").read_text() == "windows " * 99
    flip(stored(root, "tokens", "train.arrow"))
    for path, out in (("tokens", "folder"), ("tokens/train.arrow", "file")):
        with pytest.raises(DamagedError, match="rm -f"):
            get_output(root, head, path, tmp_path / out)
        assert not (tmp_path / out).exists()
    get_output(root, head, "tokens/inner/more.txt", tmp_path / "more")
    assert (tmp_path / "more").read_text() == "more"


def test_a_folder_is_checked_against_its_own_manifest_where_dvc_knows_nothing(tmp_path):
    write_files(tmp_path, {"weights": "numbers", "train.arrow": "windows"})
    write_json(tmp_path / "manifest.json", {"files": {"weights": sha256_file(tmp_path / "weights")}})
    write_json(tmp_path / "profile.json", {"sha256": {"train": sha256_file(tmp_path / "train.arrow")}})
    check_manifest(tmp_path, "none")
    for name in ("weights", "train.arrow"):
        flip(tmp_path / name)
        with pytest.raises(DamagedError, match=name):
            check_manifest(tmp_path, "none")
        flip(tmp_path / name)
    check_manifest(tmp_path / "nowhere", "none")


def test_all_damage_is_told_in_one_pass(tmp_path):
    write_files(tmp_path, {name: name for name in "abcd"})
    wanted = {name: f"sha256:{sha256_file(tmp_path / name)}" for name in "abcd"}
    assert find_damage(tmp_path, wanted) == []
    for name in "ac":
        flip(tmp_path / name, at=0)
    assert [one.path.name for one in find_damage(tmp_path, wanted)] == ["a", "c"]


def test_weights_in_the_hubs_cache_are_checked_against_the_bases_manifest(tmp_path, monkeypatch):
    revision = "0" * 39 + "1"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub/models--org--name"
    write_files(place, {f"snapshots/{revision}/model.safetensors": "numbers", f"refs/{revision}": revision})
    weights = place / f"snapshots/{revision}/model.safetensors"
    manifest = {"model": "org/name", "revision": revision, "files": {}}
    write_json(tmp_path / "base/manifest.json", {**manifest, "weights": {weights.name: sha256_file(weights)}})
    check_inputs(tmp_path, ["base"])
    flip(weights)
    with pytest.raises(DamagedError, match=r"(?s)model\.safetensors.*rm -f .*hub's cache"):
        check_inputs(tmp_path, ["base"])
    weights.unlink()
    check_inputs(tmp_path, ["base"])  # what is missing is told by the loading


def test_a_kept_folder_is_whole_with_its_manifest_and_its_bytes_alone(tmp_path):
    write_files(tmp_path, {"model.gguf": "numbers"})
    assert not is_whole(tmp_path)
    write_json(tmp_path / "manifest.json", {"files": {"model.gguf": sha256_file(tmp_path / "model.gguf")}})
    assert is_whole(tmp_path)
    flip(tmp_path / "model.gguf")
    assert not is_whole(tmp_path)
