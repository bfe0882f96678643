"""Training with privacy: the promised noise, the same after a kill, and refused when over the budget."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.examples import encode_line, read_examples
from ratchet.errors import BaseModelError, ConfigError, DataError
from ratchet.federation.records import NODE, ledgers
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.adapters import load_trainable
from ratchet.privacy.accountant import Mechanism
from ratchet.privacy.ledger import read_spendings
from ratchet.training.checkpoints import FOLDER, Checkpoints
from ratchet.training.collation import Private, rows_apart
from ratchet.training.estimate import plan_training
from ratchet.training.launch import Material, refuse_private
from ratchet.training.loss import AnswerLoss
from ratchet.training.packing import Window, read_windows
from ratchet.training.schedule import Schedule
from ratchet.training.state import trainable
from ratchet.training.trainer import fit
from tasks.tokenize import tokenize
from tasks.train import train

KEY = bytes(range(32))
LORA = AdapterConfig(rank=4, alpha=8.0)
SCHEDULE = Schedule(
    steps=8,
    batch_windows=2,
    accumulate=1,
    learning_rate=1e-2,
    kind="constant",
    warmup_share=0.0,
    weight_decay=0.01,
    max_grad_norm=1.0,
    evaluations=4,
    patience=1,
    seed=7,
)


class Killed(BaseException):
    """In place of a kill: nothing of ours may catch it and tidy up."""


@pytest.fixture(scope="module")
def windows(tokens: Path) -> list[Window]:
    return read_windows(tokens / "train.arrow")[:8]


@pytest.fixture(scope="module")
def validation(tokens: Path) -> list[Window]:
    return read_windows(tokens / "validation.arrow")[:2]


def go(
    base: Path,
    windows: list[Window],
    validation: list[Window],
    *,
    key: bytes = KEY,
    noise: float = 1.0,
    rate: float = 0.25,
    config: AdapterConfig = LORA,
    die_at: int | None = None,
    checkpoints: Checkpoints | None = None,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], Any, list[tuple[int, dict[str, float]]]]:
    curve: list[tuple[int, dict[str, float]]] = []

    def report(step: int, values: dict[str, float]) -> None:
        if step == die_at:
            raise Killed
        curve.append((step, values))

    model = load_trainable(base, None, config, seed=1)
    schedule = SCHEDULE._replace(**settings)
    units = [[row] for row in rows_apart(windows)]
    outcome = fit(
        model,
        windows,
        validation,
        schedule,
        loss=AnswerLoss(),
        pad_id=0,
        report=report,
        apart=True,
        checkpoints=checkpoints,
        saved=checkpoints.newest(lambda points: None) if checkpoints else None,
        private=Private(Mechanism(noise, rate, schedule.steps), 1.0, key, units),
    )
    return {name: weight.clone() for name, weight in trainable(model).items()}, outcome, curve


def kept(home: Path) -> Checkpoints:
    return Checkpoints(home, "key", {}, minutes=0.0, curve=list)


@pytest.mark.parametrize(("method", "die_at"), [("lora", 2), ("lora", 5), ("lora", 8), ("qlora", 5)])
def test_a_private_training_that_was_killed_ends_in_the_same_weights(
    tmp_path: Path, tiny_base: Path, windows: list[Window], validation: list[Window], method: str, die_at: int
) -> None:
    config = AdapterConfig(method=method, rank=4, alpha=8.0)
    whole, outcome, _ = go(tiny_base, windows, validation, config=config)
    with pytest.raises(Killed):
        go(tiny_base, windows, validation, config=config, die_at=die_at, checkpoints=kept(tmp_path))
    found, again, curve = go(tiny_base, windows, validation, config=config, checkpoints=kept(tmp_path))
    assert curve[0][0] == die_at, "it went on, and did not start anew"
    assert again._replace(seconds=0) == outcome._replace(seconds=0)
    for name, weight in whole.items():
        assert torch.equal(weight, found[name]), name


def test_weights_depend_on_the_key_and_the_last_ones_are_kept(
    tiny_base: Path, windows: list[Window], validation: list[Window]
) -> None:
    """With much noise the validation loss rises at once, and neither patience nor the best step counts."""
    found, outcome, curve = go(tiny_base, windows, validation, noise=50.0, learning_rate=0.1)
    measured = [values["validation_loss"] for _, values in curve if "validation_loss" in values]
    assert outcome.steps == outcome.best_step == 8
    assert len(measured) == 4
    assert outcome.best_validation_loss == measured[-1] > min(measured)
    other, _, _ = go(tiny_base, windows, validation, noise=50.0, learning_rate=0.1, key=bytes(32))
    assert any(not torch.equal(weight, other[name]) for name, weight in found.items())


def test_steps_that_draw_no_row_get_noise_alone(
    tiny_base: Path, windows: list[Window], validation: list[Window]
) -> None:
    found, outcome, _ = go(tiny_base, windows, validation, rate=1e-9)
    other, _, _ = go(tiny_base, windows, validation, rate=1e-9, key=bytes(32))
    assert outcome.steps == 8
    assert any(not torch.equal(weight, other[name]) for name, weight in found.items()), "by its noise alone"


def test_without_noise_and_clipping_every_row_a_step_is_plain_full_batch_descent(
    tiny_base: Path, windows: list[Window]
) -> None:
    """The oracle: SGD on the mean of the rows' mean losses, in plain torch."""
    rows = rows_apart(windows)
    private = Private(Mechanism(0.0, 1.0, 3), 1e9, KEY, [[row] for row in rows])
    model = load_trainable(tiny_base, None, LORA, seed=1)
    schedule = SCHEDULE._replace(steps=3, optimizer="sgd", weight_decay=0.0, learning_rate=0.5)
    fit(model, windows, [], schedule, loss=AnswerLoss(), pad_id=0, report=lambda *_: None, private=private)
    oracle = load_trainable(tiny_base, None, LORA, seed=1).eval()
    weights = [weight for weight in oracle.parameters() if weight.requires_grad]
    for _ in range(3):
        oracle.zero_grad()
        for row in rows:
            logits = oracle(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[1:]))
            (loss / len(rows)).backward()
        with torch.no_grad():
            for weight in weights:
                weight -= 0.5 * weight.grad
    wanted = trainable(oracle)
    for name, weight in trainable(model).items():
        assert torch.allclose(weight, wanted[name], atol=2e-6), name
    assert any(float(weight.abs().max()) > 1e-3 for name, weight in wanted.items() if "lora_B" in name)


# --- by the stage ---


def private(config: Config, **privacy: Any) -> Config:
    raw = config.model_dump()
    raw["train"]["privacy"] |= {"epsilon": 3.0, "delta": 1e-4, "batch_rows": 10_000, **privacy}
    return Config.model_validate(raw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config) -> Path:
    folder = tmp_path_factory.mktemp("private")
    config = private(tiny_config, batch_rows=100)
    train(tokens, tiny_base, nobody, folder / "candidate", folder / "reports/train", config)
    return folder


def test_the_manifest_says_what_is_promised_and_the_ledger_what_was_spent(
    trained: Path, tokens: Path
) -> None:
    manifest = read_json(trained / "candidate/manifest.json")
    told = manifest["privacy"]
    assert (told["epsilon"], told["delta"], told["unit"]) == (3.0, 1e-4, "row")
    assert told["moved"] > 0
    assert 2.9 < told["epsilon_together"] <= 3.0
    rows = rows_apart(read_windows(tokens / "train.arrow"))
    assert told["units"] == len(rows)
    assert told["mechanism"]["sampling_rate"] == pytest.approx(100 / len(rows))
    (entry,) = read_spendings(trained / "reports/privacy.json")
    assert entry.adapter_sha256 == manifest["adapter_sha256"]
    assert entry.batches == read_json(tokens / "profile.json")["batches"]
    assert not list((trained / "reports").glob("**/*.key"))


def test_a_training_over_the_budget_is_refused_before_it_starts(
    tmp_path: Path, trained: Path, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    ledger = tmp_path / "reports/privacy.json"
    ledger.parent.mkdir()
    ledger.write_bytes((trained / "reports/privacy.json").read_bytes())
    place = (tmp_path / "candidate", tmp_path / "reports/train")
    with pytest.raises(
        DataError, match=r"1 trainings have spent ε = 2\.9\d+.*together [34]\.\d+.*epsilon` is 3"
    ):
        train(tokens, tiny_base, nobody, *place, private(tiny_config))
    assert not place[0].exists()
    assert len(read_spendings(ledger)) == 1
    train(tokens, tiny_base, nobody, *place, private(tiny_config, budget=6.0))
    told = read_json(place[0] / "manifest.json")["privacy"]
    assert 3.0 < told["epsilon_together"] < 6.0
    assert len(read_spendings(ledger)) == 2


@pytest.mark.parametrize("in_rounds", [False, True])
def test_rounds_of_a_federation_and_own_trainings_spend_of_one_budget(
    tmp_path: Path,
    trained: Path,
    tokens: Path,
    tiny_base: Path,
    nobody: Path,
    tiny_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    in_rounds: bool,
) -> None:
    own, rounds = ledgers(tmp_path)
    spent = own if in_rounds else rounds
    spent.parent.mkdir(parents=True)
    spent.write_bytes((trained / "reports/privacy.json").read_bytes())
    monkeypatch.setenv("RATCHET_ROOT", str(tmp_path / NODE if in_rounds else tmp_path))
    reports = tmp_path / NODE / "trainings/run-1" if in_rounds else tmp_path / "workspace/reports/train"
    with pytest.raises(DataError, match="1 trainings have spent ε = 2"):
        train(tokens, tiny_base, nobody, tmp_path / "candidate", reports, private(tiny_config))


def test_users_are_protected_whole(
    tmp_path: Path, prepared: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    """Rows 0, 7, 14 … are of one user; the last rows of all name nobody and are users by themselves."""
    folder, config = tmp_path / "prepared", private(tiny_config, unit="user", user_rows=5)
    shutil.copytree(prepared, folder)
    rows = list(read_examples(folder / "train.jsonl"))
    for place, row in enumerate(rows[:-20]):
        row.meta["user"] = f"user {place % 7}"
    write_bytes(folder / "train.jsonl", map(encode_line, rows))
    tokenize(folder, tiny_base, nobody, tmp_path / "tokens", config)
    place = (tmp_path / "candidate", tmp_path / "reports/train")
    train(tmp_path / "tokens", tiny_base, nobody, *place, config)
    told = read_json(place[0] / "manifest.json")["privacy"]
    assert (told["unit"], told["units"]) == ("user", 7 + 20)
    with pytest.raises(DataError, match=r"none of \d+ rows names one"):
        tokenize(prepared, tiny_base, nobody, tmp_path / "plain", config)
        train(tmp_path / "plain", tiny_base, nobody, tmp_path / "c", tmp_path / "t", config)


def test_no_two_trainings_have_the_same_noise(
    tmp_path: Path, trained: Path, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    train(tokens, tiny_base, nobody, tmp_path / "candidate", tmp_path / "train", private(tiny_config))
    one, two = (load_file(each / "candidate/adapter_model.safetensors") for each in (trained, tmp_path))
    assert any(not torch.equal(weight, two[name]) for name, weight in one.items())


def test_a_champion_that_learned_without_privacy_is_no_start(
    tmp_path: Path, candidate: Path, tokens: Path, tiny_base: Path, tiny_config: Config
) -> None:
    manifest = read_json(candidate / "manifest.json")
    for path in candidate.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_json(tmp_path / "manifest.json", {**manifest, "version": 4})
    with pytest.raises(BaseModelError, match="v4, from which this training would start"):
        train(tokens, tiny_base, tmp_path, tmp_path / "out", tmp_path / "train", private(tiny_config))


def test_delta_has_to_be_small_for_so_many_rows(
    tmp_path: Path, tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    with pytest.raises(DataError, match=r"train\.privacy\.delta` is 0\.1"):
        train(tokens, tiny_base, nobody, tmp_path / "out", tmp_path / "t", private(tiny_config, delta=0.1))


def test_trainings_outside_the_ledger_are_refused(
    tokens: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    with pytest.raises(ConfigError, match="`ratchet plan` trains on these rows outside the ledger"):
        plan_training(Material(tokens, tiny_base, nobody), private(tiny_config), print)
    refuse_private(tiny_config, "plan")


def test_the_key_is_gone_when_the_training_has_ended(trained: Path) -> None:
    assert not (Path(os.environ["RATCHET_ROOT"]) / FOLDER).exists()
    assert b"privacy.key" not in json.dumps([str(path) for path in trained.rglob("*")]).encode()
