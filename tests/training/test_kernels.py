"""`train.compile`: the same training, computed otherwise."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from ratchet.config.params import Config
from ratchet.errors import ConfigError
from ratchet.files import sha256_file
from ratchet.tracking.curve import read_history
from ratchet.training.kernels import check_compiler
from tests.training.test_distributed import start


@pytest.mark.e2e
def test_a_compiled_training_learns_the_same_and_is_gone_on_from_in_the_same_bytes(
    tmp_path, tokens, tiny_base, nobody, tiny_config, monkeypatch
):
    """Killed and gone on with in another process, which meets other shapes first; the one that was let go
    compiles for itself."""
    train = tiny_config.train.model_copy(
        update={"checkpoint_minutes": 0.0, "epochs": 2.0, "learning_rate": 1e-3, "batch_windows": 2}
    )
    plain = tiny_config.model_copy(update={"train": train})
    compiled = plain.model_copy(update={"train": train.model_copy(update={"compile": True})})

    def run(name: str, config: Config, *, kill_at: int | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"compiled-{name}"))
        process = start(folder, tokens, tiny_base, nobody, config)
        while kill_at and not list(folder.glob(f".ratchet/checkpoints/*/step-{kill_at:08d}/manifest.json")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.002)
        if kill_at:
            process.kill()
        said, error = process.communicate()
        assert bool(kill_at) == bool(process.returncode), error
        assert ("goes on from the checkpoint" in said) == (name == "killed" and not kill_at)
        return folder

    run("killed", compiled, kill_at=23)
    folders = [run("killed", compiled), run("whole", compiled), run("plain", plain)]
    curves = [read_history(folder / "reports/train/history.jsonl") for folder in folders]
    assert len(curves[0]) == len(curves[2]) > 30
    losses = [[point["train_loss"] for point in curve if "train_loss" in point] for curve in curves]
    assert losses[0] == pytest.approx(losses[2], rel=1e-3)
    sums = [
        {path.name: sha256_file(path) for path in (folder / "models/candidate").iterdir()}
        for folder in folders
    ]
    assert sums[0] == sums[1]
    assert sums[0]["adapter_model.safetensors"] != sums[2]["adapter_model.safetensors"], (
        "or nothing was compiled"
    )


def test_without_a_compiler_it_is_said(monkeypatch):
    if shutil.which("g++"):
        check_compiler()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"`train\.compile` needs a C\+\+ compiler"):
        check_compiler()
