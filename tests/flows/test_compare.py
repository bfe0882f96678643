"""Methods are compared on the same rows by the project's own evaluation and engine; one that fails is a row
with its reason.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from flows.compare import measure, settings_of
from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.evaluation.statistics import Interval
from ratchet.files import read_json, write_json
from ratchet.models.loading import WEIGHTS
from ratchet.promotion.verdict import Speed
from ratchet.reporting.comparison import HEAD, Comparison, Failed, Measured, markdown, text
from ratchet.training.launch import Material
from tasks.latency import measure as measure_latency

ROOT = Path(__file__).parents[2]


FULL = Measured(
    "full",
    {"adapter.method": "full"},
    quality=Interval(0.5, 0.4, 0.6),
    test_rows=75,
    validation_loss=1.23456,
    seconds=12.34,
    peak_mib=1234.5,
    saved_mib=0.5,
    latency=Speed(40, {"mean": 20.0, "low": 19.0, "high": 21.0}, 3.0, 150.0),
    figures={},  # type: ignore[typeddict-item]  # no table shows them
)
LORA = Failed("lora", {"adapter.method": "lora"}, "training failed: a|b")
FOUND = Comparison("exact_match", 75, 17, "c" * 40, "2 cores", [FULL, LORA])


def test_the_table_has_every_figure_and_the_reason_of_a_method_that_failed() -> None:
    assert FULL.cells == (
        "full",
        "0.500 [0.400, 0.600]",
        "1.2346",
        "12.3",
        "1,234",
        "0.50",
        "20.0 [19.0, 21.0]",
        "3.0",
    )
    assert LORA.cells[:2] == ("lora", "failed: training failed: a/b") and len(LORA.cells) == len(HEAD)
    assert [line.count("|") for line in markdown(FOUND).splitlines() if line.startswith("|")] == [
        len(HEAD) + 1
    ] * 4
    assert (
        len(
            {line.index("1.2346") for line in text(FOUND) if "1.2346" in line}
            | {text(FOUND)[0].index("validation loss")}
        )
        == 1
    ), "columns stand under their heads"


def test_a_method_has_its_own_settings_and_all_start_from_the_base() -> None:
    config = Config.model_validate({"compare": {"settings": {"full": {"train.learning_rate": 1e-4}}}})
    assert settings_of(config, "full") == {
        "adapter.method": "full",
        "train.start_from": "base",
        "train.learning_rate": 1e-4,
    }
    assert settings_of(config, "lora") == {"adapter.method": "lora", "train.start_from": "base"}
    with pytest.raises(UserError, match=r"'lara' is no method\n.*known: lora, qlora"):
        settings_of(config, "lara")


def test_an_answers_latency_has_an_interval(
    prepared: Path, tiny_base: Path, candidate: Path, tiny_config: Config
) -> None:
    found = measure_latency(prepared, tiny_base, candidate, tiny_config)
    times = found.milliseconds
    assert 0 < times["low"] <= times["mean"] <= times["high"]
    assert 10 < found.answers <= 40 and 0 < found.tokens <= tiny_config.evaluate.max_new_tokens


@pytest.mark.e2e
def test_a_method_is_trained_scored_and_asked_and_one_that_fails_says_why(
    tokens: Path, tiny_base: Path, nobody: Path, prepared: Path, tiny_config: Config, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(prepared, place / "data/prepared")
    shutil.copytree(ROOT / "metrics", place / "metrics")
    write_json(place / "data/region.json", {"topics": []})
    material = Material(tokens, tiny_base, nobody)
    said: list[str] = []
    good = measure(place, material, tiny_config, "lora", settings_of(tiny_config, "lora"), said.append)
    bad = measure(
        place,
        material,
        tiny_config,
        "full",
        {**settings_of(tiny_config, "full"), "train.learning_rate": 1e30},
        said.append,
    )
    assert isinstance(good, Measured), said
    folder = place / ".ratchet/compare/lora"
    assert good.validation_loss == read_json(folder / "reports/figures.json")["best_validation_loss"]
    assert (
        msgspec.structs.asdict(good.quality)
        == read_json(folder / "evaluation/metrics.json")["slices"]["test"]["candidate"]["exact_match"]
    )
    assert good.saved_mib == (folder / "candidate" / WEIGHTS).stat().st_size / 2**20
    assert good.seconds > 0 and good.peak_mib > 100 and good.latency.milliseconds["low"] > 0
    assert bad.failed.startswith("training failed: DivergenceError: ")
