"""Files and folders are there whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from ratchet.errors import DiskSpaceError, RatchetError
from ratchet.files import (
    own_files,
    read_json,
    require_space,
    sha256_file,
    sha256_json,
    whole_folder,
    write_bytes,
    write_json,
    write_text,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing_chunks() -> Iterator[bytes]:
    yield b"new, but only half of it"
    raise ValueError("no more chunks")


def test_a_write_makes_its_folders_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "deep/down/file.txt"
    write_text(path, "grün\n")
    write_text(path, "blau\n")
    assert path.read_bytes() == b"blau\n"
    assert names(path.parent) == ["file.txt"]


def test_a_write_never_reaches_through_a_link(tmp_path):
    """DVC links a checkout's files to its cache: writing in place would spoil the cache."""
    cached = tmp_path / "cached"
    cached.write_bytes(b"old")
    (tmp_path / "hard").hardlink_to(cached)
    (tmp_path / "soft").symlink_to(cached)
    for name in ("hard", "soft"):
        write_bytes(tmp_path / name, [b"new"])
        assert (tmp_path / name).read_bytes() == b"new"
        assert cached.read_bytes() == b"old"


def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.bin"
    write_bytes(path, [b"old"])
    with pytest.raises(ValueError, match="no more chunks"):
        write_bytes(path, failing_chunks())
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_first_write_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no more chunks"):
        write_bytes(tmp_path / "file.bin", failing_chunks())
    assert names(tmp_path) == []


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(DiskSpaceError, match=r"cannot write .*taken"):
        write_bytes(tmp_path / "taken", [b"x"])
    assert names(tmp_path) == ["taken"]


def test_a_folder_takes_its_place_when_the_block_ends_well(tmp_path):
    for content in ("one", "two"):
        with whole_folder(tmp_path / "models/base") as filling:
            (filling / content).write_text(content)
            assert not (tmp_path / "models/base" / content).exists()
        assert names(tmp_path / "models/base") == [content]
    assert names(tmp_path / "models") == ["base"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_whose_block_fails_leaves_the_old_one(tmp_path, error):
    with whole_folder(tmp_path / "base") as filling:
        (filling / "old").write_text("old")
    with pytest.raises(error), whole_folder(tmp_path / "base") as filling:
        (filling / "new").write_text("half")
        raise error
    assert names(tmp_path / "base") == ["old"]
    assert names(tmp_path) == ["base"]


def test_links_out_of_a_folder_become_files_of_their_own_and_those_that_lead_nowhere_stay(tmp_path):
    (tmp_path / "cache").write_text("bytes")
    folder = tmp_path / "kept"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/link").symlink_to(tmp_path / "cache")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    own_files(folder)
    (tmp_path / "cache").unlink()
    assert (folder / "inner/link").read_text() == "bytes" and not (folder / "inner/link").is_symlink()
    assert (folder / "gone").is_symlink() and names(folder) == ["gone", "inner"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_that_is_not_finite_is_refused_and_the_old_file_stays(tmp_path, number):
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": number})
    assert read_json(path) == {"loss": 1.0}


def test_equal_values_are_equal_bytes(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": "ü"})
    write_json(tmp_path / "b.json", {"a": "ü", "b": 1})
    assert sha256_file(tmp_path / "a.json") == sha256_file(tmp_path / "b.json")
    assert (
        sha256_json({"b": 1, "a": "ü"}) == sha256_json({"a": "ü", "b": 1}) != sha256_json({"a": "u", "b": 1})
    )


def test_the_hash_of_a_file_is_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert (
        sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )  # FIPS 180-4, appendix


def test_a_json_file_that_is_missing_or_cut_is_named(tmp_path):
    with pytest.raises(RatchetError, match=r"(?s)gate\.json does not exist.*has not run"):
        read_json(tmp_path / "gate.json")
    (tmp_path / "gate.json").write_text('{"verdict": "prom')
    with pytest.raises(RatchetError, match=r"gate\.json is no valid JSON"):
        read_json(tmp_path / "gate.json")


def test_too_little_room_is_said_with_both_numbers_before_anything_is_written(tmp_path):
    with pytest.raises(
        DiskSpaceError,
        match=r"(?s)the adapter needs about 1,099,511,627,776 MiB at .*models, [\d,]+ MiB are free.*dvc gc",
    ) as caught:
        require_space(tmp_path / "models", 2**60, "the adapter")
    assert caught.value.exit_code == 2
    assert names(tmp_path / "models") == []


def test_enough_room_passes(tmp_path):
    require_space(tmp_path / "models", 1, "a byte")
    assert (tmp_path / "models").is_dir()
