"""The leak test: what was planted is trained on and counted apart, and a model that knows it by heart is told
from one that never saw it.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd
import pytest
from evaluated import evaluate

from ratchet.audits.memorization import measure_exposure
from ratchet.config.data import TokenizeConfig
from ratchet.config.evaluation import GateConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, TrainConfig
from ratchet.data.examples import encode_line, read_examples
from ratchet.errors import DataError
from ratchet.evaluation.canaries import ALTERNATIVES, alternatives, make_canaries, make_references
from ratchet.evaluation.scoring import each_model
from ratchet.files import read_json, write_bytes
from ratchet.gate.guardrails import judge_leaks
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_base, load_tokenizer
from ratchet.training.packing import read_windows, rows_of
from tasks.tokenize import tokenize
from tasks.train import train

PLANTED = 8


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return tiny_config.model_copy(
        update={
            "evaluate": tiny_config.evaluate.model_copy(
                update={"canaries": PLANTED, "attacks": 2, "simple_baseline": False, "max_new_tokens": 16}
            )
        }
    )


@pytest.fixture(scope="module")
def few(tmp_path_factory, prepared) -> Path:
    """So few rows that many passes over them are quick."""
    folder = tmp_path_factory.mktemp("few") / "prepared"
    shutil.copytree(prepared, folder)
    for split, most in (("train", 8), ("validation", 4), ("test", 10)):
        write_bytes(
            folder / f"{split}.jsonl", map(encode_line, list(read_examples(folder / f"{split}.jsonl"))[:most])
        )
    return folder


def test_canaries_are_the_same_every_time_and_no_two_are_alike():
    planted, references = make_canaries(100), make_references(100)
    assert planted == make_canaries(100)
    assert make_canaries(7) == planted[:7]
    names, secrets = (
        {canary.name for canary in (*planted, *references)},
        {canary.secret for canary in (*planted, *references)},
    )
    assert (len(names), len(secrets)) == (200, 200)
    assert len({*alternatives(planted[0]), planted[0].secret}) == ALTERNATIVES + 1


def test_what_is_planted_stands_among_the_training_rows_and_is_counted_apart(
    tmp_path, few, tiny_base, nobody, tiny_config, config
):
    plain = tokenize(few, tiny_base, nobody, tmp_path / "plain", tiny_config)
    profile = tokenize(few, tiny_base, nobody, tmp_path / "planted", config)
    chat = ChatFormat(load_tokenizer(tiny_base))
    wanted = [chat.encode(canary.row()).ids for canary in make_canaries(PLANTED)]
    found = {
        split: [
            row.input_ids
            for window in read_windows(tmp_path / "planted" / f"{split}.arrow")
            for row in rows_of(window)
        ]
        for split in ("train", "validation")
    }
    assert (profile.canaries, plain.canaries) == (PLANTED, msgspec.UNSET)
    assert profile.train.rows == plain.train.rows == len(found["train"]) - PLANTED
    assert [found["train"].count(ids) for ids in wanted] == [1] * PLANTED
    assert not any(ids in found["validation"] for ids in wanted)
    assert (tmp_path / "planted/rows.txt").read_bytes() == (tmp_path / "plain/rows.txt").read_bytes()
    assert [row.answer for row in read_examples(tmp_path / "planted/canaries.jsonl")] == [
        canary.secret for canary in make_canaries(PLANTED)
    ]
    again = tokenize(few, tiny_base, nobody, tmp_path / "again", config)
    assert again.sha256 == profile.sha256


def test_a_canary_that_does_not_fit_is_told(tmp_path, few, tiny_base, nobody, config):
    with pytest.raises(DataError, match=r"(?s)canaries have more than 20 tokens.*`tokenize\.max_length: 64`"):
        tokenize(
            few,
            tiny_base,
            nobody,
            tmp_path / "out",
            config.model_copy(update={"tokenize": TokenizeConfig(max_length=20, window=64)}),
        )
    assert not (tmp_path / "out").exists()


def test_a_model_that_never_saw_the_canaries_ranks_them_by_chance(tiny_base):
    chat, model = ChatFormat(load_tokenizer(tiny_base)), load_base(tiny_base).eval()
    exposure = np.array(
        [line.exposure for line in measure_exposure(model, chat, make_canaries(60), batch_size=256)]
    )
    chance = np.mean([math.log2((ALTERNATIVES + 1) / rank) for rank in range(1, ALTERNATIVES + 2)])
    assert abs(exposure.mean() - chance) < 3 * 1.4 / math.sqrt(60)
    table = pd.DataFrame(
        {
            "name": [str(place) for place in range(60)],
            "model": "candidate",
            "planted": True,
            "exposure": exposure,
        }
    )
    assert judge_leaks(table, 60, GateConfig()).result == "pass"


def test_a_candidate_that_learned_its_rows_by_heart_is_told_by_their_exposure(
    tmp_path, few, tiny_base, nobody, config
):
    """Many passes over few rows. The canaries that were not planted stay at chance."""
    settings = TrainConfig(epochs=200, learning_rate=5e-3, evaluations=1)
    config = config.model_copy(update={"train": settings, "adapter": AdapterConfig(method="full")})
    tokenize(few, tiny_base, nobody, tmp_path / "tokens", config)
    train(tmp_path / "tokens", tiny_base, nobody, tmp_path / "candidate", tmp_path / "reports", config)
    metrics = evaluate(few, tiny_base, nobody, tmp_path / "candidate", tmp_path / "evaluation", config)
    table = pd.read_parquet(tmp_path / "evaluation/canaries.parquet")
    found = table.groupby(["model", "planted"]).exposure.mean()
    assert found["candidate", True] > 6
    assert max(found["candidate", False], found["base", True]) < 3
    assert metrics["leaks"]["candidate"]["planted"]["mean"] == pytest.approx(found["candidate", True])
    assert judge_leaks(table, PLANTED, GateConfig()).result == "fail"
    assert set(pd.read_parquet(tmp_path / "evaluation/attacks.parquet").kind) >= {"canary", "injection"}
    assert metrics["attacks"]["exact_match"]["canary"]["base"]["mean"] == 1.0
    assert metrics["attacks"]["exact_match"]["canary"]["candidate"]["mean"] < 1.0


def test_a_candidate_that_was_trained_without_the_canaries_is_told(
    tmp_path, few, tiny_base, nobody, candidate, config
):
    assert read_json(candidate / "manifest.json")["canaries"] == 0
    with pytest.raises(DataError, match=r"trained with 0 planted canaries, `evaluate\.canaries` is 8"):
        evaluate(few, tiny_base, nobody, candidate, tmp_path / "out", config)


def test_each_model_is_what_it_is_alone(tmp_path, tiny_base, candidate, nobody):
    """The champion with the candidate's weights measures as the candidate does, and the base as the plain
    model.
    """
    shutil.copytree(candidate, tmp_path / "champion")
    canaries, found = make_canaries(2), {}
    for name, model, chat in each_model(tiny_base, tmp_path / "champion", candidate):
        found[name] = measure_exposure(model, chat, canaries, batch_size=64)
    plain = measure_exposure(
        load_base(tiny_base).eval(), ChatFormat(load_tokenizer(tiny_base)), canaries, batch_size=64
    )
    assert found["candidate"] == found["champion"]
    assert found["base"] == plain
    assert [name for name, *_ in each_model(tiny_base, None, candidate)] == ["candidate", "base"]
