"""Manifests: older ones and ones with more fields are read, what is no manifest is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from ratchet.config.training import AdapterConfig
from ratchet.errors import BaseModelError
from ratchet.files import write_json
from ratchet.models.adapters import base_settings, check_start, virtual_tokens
from ratchet.models.manifests import (
    MANIFEST,
    AdapterRecord,
    BaseManifest,
    NewToken,
    read_base_manifest,
    read_trained_manifest,
)


def test_what_a_manifest_lacks_is_what_the_config_had_by_default() -> None:
    assert msgspec.structs.asdict(AdapterRecord()) == AdapterConfig().model_dump(mode="json")


def test_unknown_fields_are_ignored_and_missing_ones_have_defaults(tmp_path: Path) -> None:
    token = {"token": "word", "id": 5, "pieces": [1, 2]}
    write_json(tmp_path / MANIFEST, {"model": "demo", "vocab_size": 9, "new_tokens": [token]})
    assert read_base_manifest(tmp_path) == BaseManifest("demo", new_tokens=[NewToken(5, [1, 2])])
    write_json(tmp_path / MANIFEST, {"version": None, "batches": []})
    assert read_trained_manifest(tmp_path).adapter == AdapterRecord()


@pytest.mark.parametrize("content", [[], {"context": "long", "files": 3}])
def test_what_is_no_manifest_is_refused_with_its_path(tmp_path: Path, content: Any) -> None:
    write_json(tmp_path / MANIFEST, content)
    for read in (read_base_manifest, read_trained_manifest):
        with pytest.raises(BaseModelError, match=MANIFEST):
            read(tmp_path)


def test_the_adapter_of_a_manifest_decides_how_its_base_is_loaded(tmp_path: Path) -> None:
    assert base_settings(tmp_path) == ("lora", "nf4"), "there is no manifest"
    write_json(tmp_path / MANIFEST, {"adapter": {"method": "qlora", "quantisation": "int8"}})
    assert base_settings(tmp_path) == ("qlora", "int8")
    write_json(tmp_path / MANIFEST, {"adapter": {"method": "prompt", "virtual_tokens": 7}})
    assert (base_settings(tmp_path), virtual_tokens(tmp_path)) == (("lora", "nf4"), 7)


def test_a_champion_of_another_shape_is_no_start(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, {"adapter": {"method": "lora", "rank": 8}})
    check_start(tmp_path, AdapterConfig(method="qlora", rank=8))
    with pytest.raises(BaseModelError, match=r"rank.* 8, wanted 16"):
        check_start(tmp_path, AdapterConfig(rank=16))
