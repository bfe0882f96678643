"""What is said of a training before it runs is what then happens; without tokens the way to them is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command import ratchet
from patience import patience
from places import make_repository

from ratchet.cli.training import describe
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.errors import StageError, UserError
from ratchet.training.collation import count_batches
from ratchet.training.estimate import (
    Plan,
    choose_windows,
    extrapolate,
    free_mib,
    plan_training,
    shapes,
    shortened,
)
from ratchet.training.launch import Material, read_figures, run_training
from ratchet.training.packing import read_windows, rows_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def material(tokens: Path, tiny_base: Path, nobody: Path) -> Material:
    return Material(tokens, tiny_base, nobody)


def quiet(line: str) -> None:
    del line


def long_config(config: Config, method: str) -> Config:
    """Some fifteen seconds on one core; patience would end it when it likes."""
    train = TrainConfig(
        epochs=40, batch_windows=8, accumulate=2, learning_rate=1e-4, evaluations=6, patience=100
    )
    return config.model_copy(
        update={"train": train, "adapter": AdapterConfig(method=method, rank=4, alpha=8.0)}
    )


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_training_takes_what_the_plan_said_within_a_quarter(
    method: str, material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    config = long_config(tiny_config, method)
    for number in range(1 if patience() == 1 else 3):  # the pace of a busy machine may change while it trains
        before = plan_training(material, config, quiet)
        ended = run_training(tmp_path / str(number), material, config)
        figures = read_figures(tmp_path / str(number))
        print(
            f"planned {before.seconds:.1f} s, {before.peak_mib:.0f} MiB; took {figures['seconds']:.1f} s,"
            f" {figures['peak_mib']:.0f} MiB"
        )
        assert (ended.code, before.steps) == (0, figures["steps"])
        assert figures["seconds"] > 4, "or it would say little"
        assert before.peak_mib == pytest.approx(figures["peak_mib"], rel=0.25)
        assert before.fits
        if is_within_a_quarter(figures["seconds"], before.seconds):
            return
        # When the pace changed meanwhile, the plan before and one after it hold the training between them.
        after = plan_training(material, config, quiet)
        print(f"planned after it {after.seconds:.1f} s")
        if is_within_a_quarter(figures["seconds"], before.seconds, after.seconds):
            return
    pytest.fail("no plan held")


def is_within_a_quarter(seconds: float, *planned: float) -> bool:
    return 0.75 * min(planned) <= seconds <= 1.25 * max(planned)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"epochs": 0.5, "evaluations": 3}, "lora"),
        ({"epochs": 0.9, "batch_windows": 3, "accumulate": 2, "evaluations": 4}, "prompt"),
    ],
)
def test_a_plan_counts_the_steps_and_evaluations_that_the_training_makes(
    settings: dict[str, Any], method: str, material: Material, tiny_config: Config, tmp_path: Path
) -> None:
    windows = read_windows(material.tokens / "train.arrow")
    config = tiny_config.model_copy(
        update={
            "train": TrainConfig(patience=99, learning_rate=1e-3, **settings),
            "adapter": AdapterConfig(method=method, rank=4),
        }
    )  # type: ignore[arg-type]
    seen: list[dict[str, Any]] = []
    assert (
        run_training(
            tmp_path, material, config, lambda points: bool(seen.__setitem__(slice(None), points))
        ).code
        == 0
    )
    points = [json.loads(line) for line in (tmp_path / "reports/history.jsonl").read_text().splitlines()]
    found = extrapolate(points, read_figures(tmp_path), 9.0, config, windows, windows)
    assert found.steps == read_figures(tmp_path)["steps"]
    assert found.evaluations == sum("validation_loss" in point for point in points)
    assert seen and all(point in points for point in seen), "the curve is seen as it grows"


def test_passes_are_counted_as_training_counts_them(material: Material) -> None:
    windows = read_windows(material.tokens / "train.arrow")
    assert len(windows) > 20
    for batch_windows in (1, 3, 8):
        for apart in (True, False):
            assert len(shapes(windows, batch_windows, apart=apart)) == count_batches(
                windows, batch_windows, apart=apart
            )


def test_the_probe_has_the_pass_that_takes_most_room(material: Material) -> None:
    windows = read_windows(material.tokens / "train.arrow")
    longest = max(row.position_ids[-1] for window in windows for row in rows_of(window))
    chosen = choose_windows(windows, 8)
    assert (
        len(chosen) == 8
        and max(row.position_ids[-1] for window in chosen for row in rows_of(window)) == longest
    )
    assert choose_windows(windows, 1000) == windows
    assert len({tuple(window.input_ids) for window in chosen}) == 8


def test_the_probe_is_the_same_training_with_fewer_passes(tiny_config: Config) -> None:
    config = tiny_config.model_copy(update={"train": TrainConfig(batch_windows=3, accumulate=2, epochs=50)})
    short = shortened(config, 1.0)
    assert {
        key for key, value in config.train.model_dump().items() if short.train.model_dump()[key] != value
    } == {"epochs", "evaluations", "patience", "checkpoint_minutes"}
    assert short.adapter == config.adapter


def test_it_fits_when_all_its_peaks_do() -> None:
    fitting = Plan(9, 1, 1.0, 1.0, 10.0, 12.0, 100, 900.0, 1000.0, None, None, 4)
    assert fitting.fits and not fitting._replace(free_mib=800.0).fits
    assert (
        fitting._replace(peak_gpu_mib=5.0, free_gpu_mib=6.0).fits
        and not fitting._replace(peak_gpu_mib=7.0, free_gpu_mib=6.0).fits
    )
    assert 0 < free_mib() < math.inf


def test_a_long_training_is_told_of_compiling() -> None:
    plan = Plan(100, 4, 1.0, 1.0, 601.0, 620.0, 1000, 1.0, 2.0, None, None, 8)
    assert any("train.compile" in line for line in describe(plan, Config()))
    assert not any("train.compile" in line for line in describe(plan._replace(seconds=599.0), Config()))
    assert not any(
        "train.compile" in line
        for line in describe(plan, Config.model_validate({"train": {"compile": True}}))
    )


def test_a_training_that_cannot_start_is_told_with_its_own_words(
    material: Material, tiny_config: Config
) -> None:
    config = tiny_config.model_copy(update={"adapter": AdapterConfig(target_modules=["q_prjo"])})
    with pytest.raises(
        StageError,
        match=r"(?s)a training of a few steps failed: ConfigError: `adapter` does not fit the base",
    ) as raised:
        plan_training(material, config, quiet)
    assert raised.value.exit_code == 2


def test_without_tokens_the_command_that_makes_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ratchet plan --prepare"):
        plan_training(Material(tmp_path, tmp_path, tmp_path), Config(), quiet)
    root = make_repository(tmp_path / "checkout")
    done = ratchet("-C", root, "plan")
    assert (done.returncode, done.stdout) == (2, "") and "ratchet plan --prepare" in done.stderr
