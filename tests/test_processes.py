"""Several processes of one training: what one alone would have learned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from ratchet.config import Config, TrainConfig
from ratchet.config_doc import render_params
from ratchet.errors import ConfigError
from ratchet.files import read_json
from ratchet.processes import check_size
from ratchet.tracking import read_history

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["--tokens", "data/tokenized", "--base", "models/base", "--incumbent", "models/incumbent", "--out", "models/candidate", "--reports", "reports/train"]


def start(folder: Path, tokens: Path, base: Path, nobody: Path, config: Config) -> subprocess.Popen[str]:
    for source, place in ((tokens, "data/tokenized"), (base, "models/base"), (nobody, "models/incumbent")):
        shutil.copytree(source, folder / place)
    (folder / "params.yaml").write_text(render_params(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "tasks.train", *ARGUMENTS], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def with_processes(config: Config, processes: int, method: str) -> Config:
    train = config.train.model_copy(update={"processes": processes, "accumulate": 2, "batch_windows": 1, "precision": "float32", "epochs": 1.0})
    return config.model_copy(update={"train": train, "adapter": config.adapter.model_copy(update={"method": method})})


@pytest.mark.parametrize("method", ["lora", *(pytest.param(method, marks=pytest.mark.e2e) for method in ("full", "qlora"))])
def test_two_processes_learn_what_one_does(tmp_path, tokens, tiny_base, nobody, tiny_config, method):
    """The same global batch: losses within 1e-4, on gloo."""
    started = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        started.append((folder, start(folder, tokens, tiny_base, nobody, with_processes(tiny_config, processes, method))))
    curves, weights = [], []
    for folder, process in started:
        said, error = process.communicate()
        assert process.returncode == 0, error
        assert said.count("best validation loss") == 1  # one process tells and writes
        curves.append(read_history(folder / "reports/train/history.jsonl"))
        weights.append(load_file(next((folder / "models/candidate").glob("*model.safetensors"))))
        assert not list(folder.rglob(".*.tmp"))
    alone, together = curves
    assert len(alone) > 3
    assert [point["step"] for point in alone] == [point["step"] for point in together]
    for left, right in zip(alone, together, strict=True):
        assert left.keys() == right.keys()
        assert {name: value for name, value in left.items() if "loss" in name} == pytest.approx(
            {name: value for name, value in right.items() if "loss" in name}, abs=1e-4 if method != "qlora" else 5e-3
        )
    if method != "qlora":
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert read_json(started[0][0] / "models/candidate/manifest.json")["run_key"] != read_json(started[1][0] / "models/candidate/manifest.json")["run_key"]


def test_fewer_processes_than_asked_for_are_no_training():
    with pytest.raises(ConfigError, match=r"`train\.processes` is 2, and 1 work"):
        check_size(2, 1)


def test_passes_that_cannot_be_shared_are_refused():
    with pytest.raises(ValidationError, match=r"`train\.accumulate` 3 .* `train\.processes` 2"):
        TrainConfig(processes=2, accumulate=3)
