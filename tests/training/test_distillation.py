"""Distillation: a student learns its teacher's distribution, and nothing from a teacher of other tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.errors import BaseModelError
from ratchet.files import write_json
from ratchet.models.adapters import add_adapter
from ratchet.models.loading import MANIFEST, load_base, load_tokenizer
from ratchet.training.loss import AnswerLoss, load_teacher
from ratchet.training.packing import IGNORED, Window, read_windows, rows_of
from ratchet.training.schedule import Schedule
from ratchet.training.trainer import fit

SCHEDULE = Schedule(
    steps=60,
    batch_windows=4,
    accumulate=1,
    learning_rate=1e-2,
    kind="constant",
    warmup_share=0.0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    evaluations=1,
    patience=1,
    seed=7,
)


@pytest.fixture(scope="module")
def windows(tokens: Path) -> list[Window]:
    return read_windows(tokens / "train.arrow")[:6]


def student(base: Path) -> Any:
    return add_adapter(load_base(base), AdapterConfig(rank=8, alpha=16.0), seed=1)


@pytest.fixture(scope="module")
def teacher(tiny_base: Path, windows: list[Window]) -> Any:
    """It has learned the windows."""
    model = student(tiny_base)
    fit(model, windows, [], SCHEDULE, loss=AnswerLoss(), pad_id=0, report=lambda step, values: None)
    return model


@torch.no_grad()
def divergence(teacher: Any, model: Any, windows: list[Window]) -> float:
    """KL(teacher ‖ model) in nats a learned token, each row by itself."""
    total, tokens = 0.0, 0
    for row in (row for window in windows for row in rows_of(window)):
        learned = torch.tensor(row.labels[1:]) != IGNORED
        ours, theirs = (
            log_softmax(each.eval()(input_ids=torch.tensor([row.input_ids])).logits[0, :-1][learned], -1)
            for each in (model, teacher)
        )
        total += float(kl_div(ours, theirs, reduction="sum", log_target=True))
        tokens += int(learned.sum())
    return total / tokens


def test_a_student_of_a_teacher_alone_comes_to_its_distribution(tiny_base, windows, teacher):
    model = student(tiny_base)
    before = divergence(teacher, model, windows)
    kept = {name: weight.clone() for name, weight in teacher.named_parameters()}
    fit(
        model,
        windows,
        [],
        SCHEDULE,
        loss=AnswerLoss(teacher, teacher_weight=1.0),
        pad_id=0,
        report=lambda step, values: None,
    )
    assert divergence(teacher, model, windows) < before / 4
    assert all(torch.equal(weight, kept[name]) for name, weight in teacher.named_parameters())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_first_loss_is_the_divergence_by_hand(tiny_base, windows, teacher, temperature):
    """The fresh student is the base.

    At a temperature of 2 it is larger or smaller, and never the same by chance.
    """
    curve: list[float] = []
    count = sum(len(window.input_ids) for window in windows)
    fit(
        student(tiny_base),
        windows,
        [],
        SCHEDULE._replace(steps=1, batch_windows=count),
        loss=AnswerLoss(teacher, teacher_weight=1.0, temperature=temperature),
        pad_id=0,
        report=lambda _, values: curve.append(values.get("train_loss", 0.0)),
    )
    by_hand = divergence(teacher, student(tiny_base), windows)
    assert (curve[0] == pytest.approx(by_hand, rel=1e-4)) == (temperature == 1.0)


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it(tiny_base, windows):
    curve: list[dict[str, float]] = []
    fit(
        student(tiny_base),
        windows,
        [],
        SCHEDULE._replace(steps=1),
        loss=AnswerLoss(load_base(tiny_base), teacher_weight=1.0),
        pad_id=0,
        report=lambda _, values: curve.append(values),
    )
    assert curve[0]["train_loss"] == pytest.approx(0.0, abs=1e-6)


def test_without_a_champion_there_is_no_teacher(tiny_base, nobody):
    assert load_teacher("champion", tiny_base, nobody) is None
    assert load_teacher("", tiny_base, nobody) is None


def test_a_teacher_of_other_tokens_is_refused(tiny_base, tmp_path):
    incumbent = tmp_path / "incumbent"
    shutil.copytree(tiny_base, incumbent / "base")
    tokenizer = load_tokenizer(incumbent / "base")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(incumbent / "base")
    write_json(incumbent / MANIFEST, {"version": 3})
    size = len(load_tokenizer(tiny_base))
    with pytest.raises(
        BaseModelError,
        match=f"the champion has other tokens than the base: {size + 1} against {size},"
        " the first that differs is 'another'",
    ):
        load_teacher("champion", tiny_base, incumbent)


def test_a_teacher_that_is_not_on_this_machine_is_named_with_the_command_that_brings_it(
    tiny_base, nobody, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BaseModelError, match="hf download some/model --revision") as caught:
        load_teacher(f"some/model@{'0' * 40}", tiny_base, nobody)
    assert "is not on this machine" in str(caught.value)


@pytest.mark.parametrize("teacher", ["some/model", "some/model@main", "gpt"])
def test_a_teacher_without_a_commit_is_refused(teacher):
    with pytest.raises(ValueError, match="teacher"):
        TrainConfig(teacher=teacher)
