"""A kill costs what was done since the newest checkpoint, and changes nothing in what comes out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import scaled

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.errors import StoppedError
from ratchet.files import read_json, sha256_file
from ratchet.models.adapters import load_trainable
from ratchet.tracking.curve import read_history
from ratchet.training.checkpoints import FOLDER, MANIFEST, STATE, TENSORS, Checkpoints, join, split
from ratchet.training.loss import AnswerLoss, PreferenceLoss
from ratchet.training.packing import Role, Window, read_windows, rows_of
from ratchet.training.schedule import Schedule
from ratchet.training.state import trainable
from ratchet.training.trainer import Loss, fit
from tasks.train import train

ROOT = Path(__file__).parents[2]


# --- by the command, in processes of their own ---


class Acts:
    """`python -m tasks.train` in a workspace of a checkout: killed, stopped, and let go; beside the other
    tests."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.ends: list[tuple[int, str, str]] = []
        self.candidates: list[bool] = []
        self.faults: list[str] = []
        self._running: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self._play)
        self.thread.start()

    def _play(self) -> None:
        for act in (
            lambda process: (self._wait_for(5, process), process.kill()),
            lambda process: (self._wait_for(12, process), process.terminate()),
            lambda process: None,
        ):
            self._running = process = self._start()
            act(process)
            said, error = process.communicate(timeout=scaled(100))
            self.ends.append((process.returncode, said, error))
            self.candidates.append((self.checkout / "workspace/models/candidate").exists())
            if self.faults:
                return

    def _start(self) -> subprocess.Popen[str]:
        arguments = [
            "--tokens",
            "data/tokenized",
            "--base",
            "models/base",
            "--incumbent",
            "models/incumbent",
            "--out",
            "models/candidate",
            "--reports",
            "reports/train",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RATCHET_ROOT": str(self.checkout)}
        workspace = self.checkout / "workspace"
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.train", *arguments],
            cwd=workspace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _wait_for(self, step: int, process: subprocess.Popen[str]) -> None:
        until = time.monotonic() + scaled(100)
        while (
            max(
                (int(path.parent.name[5:]) for path in (self.checkout / FOLDER).glob(f"*/step-*/{MANIFEST}")),
                default=0,
            )
            < step
        ):
            if process.poll() is not None or time.monotonic() > until:
                self.faults.append(f"no step {step} came")
                return
            time.sleep(0.02)

    def close(self) -> None:
        self.faults.append("closed")
        if self._running:
            self._running.kill()
        self.thread.join()


@pytest.fixture(scope="module", autouse=True)
def acts(
    tmp_path_factory: pytest.TempPathFactory, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> Iterator[Acts]:
    checkout = tmp_path_factory.mktemp("checkout")
    for source, target in (
        (tokens, "data/tokenized"),
        (tiny_base, "models/base"),
        (nobody, "models/incumbent"),
    ):
        shutil.copytree(source, checkout / "workspace" / target)
    (checkout / "workspace/params.yaml").write_text(render_params(patient(tiny_config)))
    acts = Acts(checkout)
    yield acts
    acts.close()


def patient(config: Config) -> Config:
    """A checkpoint a step, and steps enough for a kill to find them."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"checkpoint_minutes": 0.0, "epochs": 3.0})}
    )


# --- in this process ---

# Two windows a forward pass, two passes a step, five steps an epoch: 12 steps end in the third epoch.
SCHEDULE = Schedule(
    steps=12,
    batch_windows=2,
    accumulate=2,
    learning_rate=1e-2,
    kind="cosine",
    warmup_share=0.1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    evaluations=4,
    patience=9,
    seed=7,
)
STEPS = 12


class Killed(BaseException):
    """In place of a kill: nothing of ours may catch it and tidy up."""


@pytest.fixture(scope="module")
def windows(tokens: Path) -> list[Window]:
    return read_windows(tokens / "train.arrow")[:20]


@pytest.fixture(scope="module")
def validation(tokens: Path) -> list[Window]:
    return read_windows(tokens / "validation.arrow")[:4]


class Curve:
    """What History is to a training."""

    def __init__(self, die_at: int | None = None) -> None:
        self.points: list[dict[str, Any]] = []
        self._die_at = die_at

    def add(self, step: int, values: dict[str, float]) -> None:
        if step == self._die_at:
            raise Killed
        self.points.append({"step": step, **values})

    def restore(self, points: list[dict[str, Any]]) -> None:
        self.points = list(points)


class Made:
    """The three methods' models, trained without and with a kill."""

    def __init__(
        self, base: Path, windows: list[Window], validation: list[Window], loss: Loss | None = None
    ) -> None:
        self._base, self._windows, self._validation = base, windows, validation
        self._loss = loss or AnswerLoss()
        self._whole: dict[Any, Any] = {}

    def whole(self, config: AdapterConfig, **settings: Any) -> Any:
        key = repr((config, settings))
        if key not in self._whole:
            self._whole[key] = self.go(config, None, Curve(), **settings)
        return self._whole[key]

    def go(
        self, config: AdapterConfig, checkpoints: Checkpoints | None, curve: Curve, **settings: Any
    ) -> Any:
        model = load_trainable(self._base, None, config, seed=1)
        saved = checkpoints.newest(curve.restore) if checkpoints else None
        schedule = SCHEDULE._replace(**settings)
        outcome = fit(
            model,
            self._windows,
            self._validation,
            schedule,
            loss=self._loss,
            pad_id=0,
            report=curve.add,
            apart=True if config.method in ("prefix", "prompt") else None,
            checkpoints=checkpoints,
            saved=saved,
        )
        return (
            {name: weight.clone() for name, weight in trainable(model).items()},
            outcome._replace(seconds=0),
            curve.points,
            saved.step if saved else 0,
        )


@pytest.fixture(scope="module")
def made(tiny_base: Path, windows: list[Window], validation: list[Window]) -> Made:
    return Made(tiny_base, windows, validation)


def checkpoints(
    home: Path, curve: Curve, key: str = "key", minutes: float = 0.0, **facts: Any
) -> Checkpoints:
    return Checkpoints(home, key, facts, minutes=minutes, curve=lambda: curve.points)


def kill_and_go_on(home: Path, made: Made, config: AdapterConfig, die_at: int, **settings: Any) -> Any:
    curve = Curve(die_at)
    with pytest.raises(Killed):
        made.go(config, checkpoints(home, curve), curve, **settings)
    again = Curve()
    return made.go(config, checkpoints(home, again), again, **settings)


def same(left: Any, right: Any) -> None:
    assert left[0].keys() == right[0].keys()
    for name, weight in left[0].items():
        assert torch.equal(weight, right[0][name]), name
    assert left[1] == right[1]
    assert left[2] == right[2]


CONFIGS = {
    "lora": AdapterConfig(rank=4, alpha=8.0, dropout=0.1),  # dropout draws from the random generators
    "qlora": AdapterConfig(method="qlora", rank=4, alpha=8.0),
    "full": AdapterConfig(method="full"),
    "prompt": AdapterConfig(method="prompt", virtual_tokens=4),
}


# The first step, the middle, the first of the second epoch and the one before it, the last. A kill in step 6
# is one in the middle of its accumulation.
@pytest.mark.parametrize("die_at", [2, 5, 6, 7, STEPS])
def test_a_training_that_was_killed_ends_in_the_same_weights_and_the_same_curve(
    tmp_path: Path, made: Made, die_at: int
) -> None:
    found = kill_and_go_on(tmp_path, made, CONFIGS["lora"], die_at)
    assert found[3] == die_at - 1
    same(found, made.whole(CONFIGS["lora"]))


def as_pairs(windows: list[Window]) -> list[Window]:
    """One pair a window, of neighbouring rows."""
    rows = [row for window in windows for row in rows_of(window)]
    return [
        Window(
            better.input_ids + worse.input_ids,
            better.labels + worse.labels,
            better.position_ids + worse.position_ids,
            [Role.CHOSEN, Role.REJECTED],
        )
        for better, worse in zip(rows[::2], rows[1::2], strict=False)
    ]


def test_so_it_is_with_preferences_whose_references_are_measured_again(
    tmp_path: Path, tiny_base: Path, windows: list[Window], validation: list[Window]
) -> None:
    loss = PreferenceLoss(beta=0.5, chosen_weight=1.0, undesirable_weight=1.0)
    made = Made(tiny_base, as_pairs(windows)[:12], as_pairs(validation)[:4], loss)
    found = kill_and_go_on(tmp_path, made, CONFIGS["lora"], 5)
    same(found, made.whole(CONFIGS["lora"]))
    assert found[-1] == 5 - 1, "it went on, and did not start anew"


@pytest.mark.parametrize("method", ["qlora", "full", "prompt"])
def test_so_it_is_with_every_other_kind_of_method(tmp_path: Path, made: Made, method: str) -> None:
    same(kill_and_go_on(tmp_path, made, CONFIGS[method], 8), made.whole(CONFIGS[method]))


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adafactor"}, {"optimizer": "sgd"}, {"neftune_alpha": 5.0}, {"proximal": 1.0}],
    ids=["adafactor", "sgd", "neftune", "proximal"],
)
def test_so_it_is_with_other_optimizers_with_noise_and_near_the_start(
    tmp_path: Path, made: Made, settings: dict[str, Any]
) -> None:
    same(
        kill_and_go_on(tmp_path, made, CONFIGS["lora"], 8, **settings),
        made.whole(CONFIGS["lora"], **settings),
    )


@pytest.mark.parametrize("die_at", [5, 6])
def test_so_it_is_where_the_last_step_of_an_epoch_is_a_short_one(
    tmp_path: Path, made: Made, die_at: int
) -> None:
    """Ten batches, three to a step: an epoch has four steps, and a kill comes in the first or the second one
    of the next."""
    same(
        kill_and_go_on(tmp_path, made, CONFIGS["lora"], die_at, accumulate=3),
        made.whole(CONFIGS["lora"], accumulate=3),
    )


def test_the_best_weights_and_the_patience_survive(tmp_path: Path, made: Made) -> None:
    """A learning rate at which the validation loss soon rises: the best step lies before the kill."""
    settings = {"learning_rate": 0.3, "kind": "constant", "evaluations": 12, "patience": 4}
    whole = made.whole(CONFIGS["full"], **settings)
    best, stopped = whole[1].best_step, whole[1].steps
    assert best + 4 == stopped <= STEPS, "or the test would tell nothing"
    same(kill_and_go_on(tmp_path, made, CONFIGS["full"], best + 3, **settings), whole)


def test_two_kills_are_no_worse_than_one(tmp_path: Path, made: Made) -> None:
    for die_at in (3, 9):
        curve = Curve(die_at)
        with pytest.raises(Killed):
            made.go(CONFIGS["lora"], checkpoints(tmp_path, curve), curve)
    curve = Curve()
    same(made.go(CONFIGS["lora"], checkpoints(tmp_path, curve), curve), made.whole(CONFIGS["lora"]))


# --- checkpoints that are no good ---


@pytest.fixture(scope="module")
def left_by_a_kill(tmp_path_factory: pytest.TempPathFactory, made: Made) -> Path:
    """Checkpoints of steps 6 and 7."""
    home, curve = tmp_path_factory.mktemp("home"), Curve(8)
    with pytest.raises(Killed):
        made.go(CONFIGS["lora"], checkpoints(home, curve), curve)
    return home


@pytest.fixture
def home(tmp_path: Path, left_by_a_kill: Path) -> Path:
    shutil.copytree(left_by_a_kill, tmp_path / "home")
    return tmp_path / "home"


def newest(home: Path, **settings: Any) -> int | None:
    curve = Curve()
    saved = checkpoints(home, curve, **settings).newest(curve.restore)
    assert (saved is None) == (curve.points == [])
    return saved.step if saved else None


def test_the_two_newest_are_kept_and_the_newest_is_taken(home: Path) -> None:
    assert sorted(path.name for path in (home / FOLDER / "key").iterdir()) == [
        "step-00000006",
        "step-00000007",
    ]
    assert newest(home) == 7
    os.utime(home / FOLDER / "key/step-00000006", (2**31, 2**31))  # a clock that was set back
    assert newest(home) == 7


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAKAGES: dict[str, Any] = {
    "a flipped bit": (lambda folder: flip(folder / TENSORS), f"{TENSORS} is not what its manifest says"),
    "half a file": (
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:1000]),
        f"{TENSORS} is not what its manifest says",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest"),
    "no state": (lambda folder: (folder / STATE).unlink(), f"{STATE} is not what its manifest says"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"step": 7'), "no valid JSON"),
    "a manifest of something else": (lambda folder: (folder / MANIFEST).write_text("[]"), "passed over"),
    "another's name": (
        lambda folder: folder.rename(folder.with_name("step-00000009")),
        "its manifest is of step 7",
    ),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_is_passed_over_and_said(
    home: Path, breakage: str, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, told = BREAKAGES[breakage]
    spoil(home / FOLDER / "key/step-00000007")
    assert newest(home) == 6
    assert told in capfd.readouterr().err


def test_a_training_goes_on_from_the_one_before_a_broken_one(home: Path, made: Made) -> None:
    flip(home / FOLDER / "key/step-00000007" / TENSORS)
    curve = Curve()
    found = made.go(CONFIGS["lora"], checkpoints(home, curve), curve)
    assert found[3] == 6
    same(found, made.whole(CONFIGS["lora"]))


def test_what_a_kill_left_half_written_is_removed(home: Path) -> None:
    (half := home / FOLDER / "key/.step-00000008.123.tmp").mkdir()
    (half / TENSORS).write_bytes(b"half")
    assert newest(home) == 7 and not half.exists()


def test_another_training_does_not_go_on_from_it_and_says_what_differs(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = home / FOLDER / "key/step-00000007" / MANIFEST
    manifest.write_text(json.dumps({**read_json(manifest), "facts": {"tokens": "1", "torch": "2"}}))
    assert newest(home, key="another", tokens="1", torch="3") is None
    assert (
        "of other data, params or code (tokens, torch 2 → 3)" in capfd.readouterr().out
    )  # step 6 has no facts at all
    assert newest(home, tokens="1", torch="3") is None
    assert "torch was 2, is 3" in capfd.readouterr().err


def test_nothing_in_a_checkpoint_is_a_pickle(home: Path) -> None:
    names = {path.name for path in (home / FOLDER).rglob("*") if path.is_file()}
    assert names == {TENSORS, STATE, MANIFEST, "trainer_state.json"}


def test_what_is_split_joins_again() -> None:
    value = {
        "state": {0: {"step": torch.tensor(3.0), "m": torch.ones(2, dtype=torch.bfloat16)}, 1: {}},
        "groups": [{"lr": 0.1, "params": [0, 1], "betas": [0.9, None]}],
    }
    tensors: dict[str, torch.Tensor] = {}
    again = join(json.loads(json.dumps(split(value, tensors))), tensors)
    assert repr(again) == repr(value)


# --- where none can be written ---


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_training(
    tmp_path: Path, made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".ratchet").write_text("a file in the way")
    curve = Curve()
    same(made.go(CONFIGS["lora"], checkpoints(tmp_path, curve), curve), made.whole(CONFIGS["lora"]))
    assert "train: no checkpoint at step 1: " in capfd.readouterr().err


def test_a_disk_that_is_full_leaves_no_half_checkpoint(
    home: Path, made: Made, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fill(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ratchet.training.checkpoints.save_file", fill)
    curve = Curve()
    same(made.go(CONFIGS["lora"], checkpoints(home, curve), curve), made.whole(CONFIGS["lora"]))
    assert "No space left on device; the training goes on" in capfd.readouterr().err
    assert sorted(path.name for path in (home / FOLDER / "key").iterdir()) == [
        "step-00000006",
        "step-00000007",
    ]


def test_checkpoints_come_no_oftener_than_asked(tmp_path: Path, made: Made) -> None:
    curve = Curve()
    made.go(CONFIGS["lora"], checkpoints(tmp_path, curve, minutes=10), curve)
    assert not (tmp_path / FOLDER).exists()


# --- asked to stop ---


def test_a_training_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_later(
    tmp_path: Path, made: Made
) -> None:
    curve = Curve()
    kept = checkpoints(tmp_path, curve, minutes=10)
    report = curve.add

    def ask(step: int, values: dict[str, float]) -> None:
        report(step, values)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    curve.add = ask  # type: ignore[method-assign]
    with kept.asked_by_sigterm(), pytest.raises(StoppedError, match="asked to stop at step 5 of 12"):
        made.go(CONFIGS["lora"], kept, curve)
    again = Curve()
    found = made.go(CONFIGS["lora"], checkpoints(tmp_path, again), again)
    assert found[3] == 5
    same(found, made.whole(CONFIGS["lora"]))


def test_a_line_that_nobody_reads_ends_no_training() -> None:
    """A flow that is stopped closes the pipe and passes the signal on at the same moment."""
    reads, writes = os.pipe()
    os.close(reads)
    program = "from ratchet.pipeline.stage import say; say('one'); say('two'); raise SystemExit(143)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (143, "")


# --- the command itself, which began when the first test of this file did ---


def test_a_command_that_was_killed_goes_on_and_gives_the_same_bytes(
    acts: Acts,
    tmp_path: Path,
    tokens: Path,
    tiny_base: Path,
    nobody: Path,
    tiny_config: Config,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kill -9, then SIGTERM, then to the end; and the same in one go, here."""
    acts.thread.join(timeout=scaled(150))
    assert not acts.faults and len(acts.ends) == 3
    (killed, _, _), (stopped, said, error), (done, said_last, error_last) = acts.ends
    assert killed == -signal.SIGKILL and acts.candidates == [False, False, True]
    assert (
        stopped == 143
        and "goes on from the checkpoint of step" in said
        and "StoppedError: asked to stop at step" in error
        and "Traceback" not in error
    )
    assert done == 0 and "goes on from the checkpoint of step" in said_last, error_last
    assert not (acts.checkout / FOLDER).exists()

    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path / "elsewhere"))
    train(tokens, tiny_base, nobody, tmp_path / "whole", tmp_path / "reports", patient(tiny_config))
    workspace = acts.checkout / "workspace"
    assert {path.name: sha256_file(path) for path in (workspace / "models/candidate").iterdir()} == {
        path.name: sha256_file(path) for path in (tmp_path / "whole").iterdir()
    }
    curves = [
        [{**point, "time_ms": 0} for point in read_history(folder / "history.jsonl")]
        for folder in (workspace / "reports/train", tmp_path / "reports")
    ]
    assert curves[0] == curves[1]
