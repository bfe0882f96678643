"""A version with privacy from tokens to the gate's reason, one that leaks beside it, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from evaluated import evaluate
from places import commit, make_repository, use_git_without_a_user
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.config.evaluation import GateConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, PrivacyConfig, TrainConfig
from ratchet.data.examples import encode_line, read_examples
from ratchet.evaluation.canaries import make_audit_canaries
from ratchet.files import read_json, write_bytes, write_json
from ratchet.gate.privacy import judge_privacy
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_tokenizer
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.dvc import Workspace
from ratchet.privacy.accountant import Mechanism, epsilon_of
from ratchet.privacy.ledger import FILE, Spending, add_spending, read_spendings
from ratchet.promotion.champion import Champion, Data, GateLine, write_champion
from ratchet.training.collation import rows_apart
from ratchet.training.packing import read_windows
from tasks.pin import pin_privacy
from tasks.tokenize import tokenize
from tasks.train import train

CANARIES = 80


def settings(config: Config, **train: Any) -> Config:
    update = {"audit_canaries": CANARIES, "simple_baseline": False}
    return config.model_copy(
        update={
            "evaluate": config.evaluate.model_copy(update=update),
            "train": TrainConfig(learning_rate=5e-3, evaluations=1, **train),
            "adapter": AdapterConfig(rank=16, alpha=32.0),
        }
    )


def test_those_canaries_are_planted_whose_coin_says_so(
    tmp_path: Path, prepared: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    profile = tokenize(prepared, tiny_base, nobody, tmp_path / "tokens", settings(tiny_config))
    chat = ChatFormat(load_tokenizer(tiny_base))
    trained = {tuple(row.input_ids) for row in rows_apart(read_windows(tmp_path / "tokens/train.arrow"))}
    coins = make_audit_canaries(CANARIES, "")
    assert [tuple(chat.encode(one.row()).ids) in trained for one, _ in coins] == [coin for _, coin in coins]
    assert profile.audit_canaries == CANARIES
    assert len(trained) == profile.train.rows + sum(coin for _, coin in coins)


@pytest.mark.e2e
def test_a_private_version_keeps_its_claim_and_a_plain_one_would_not(
    tmp_path: Path, prepared: Path, tiny_base: Path, nobody: Path, tiny_config: Config
) -> None:
    """Few rows and many passes: without noise the canaries are known by heart."""
    few = tmp_path / "few"
    shutil.copytree(prepared, few)
    for split in ("train", "validation", "test"):
        rows = list(read_examples(few / f"{split}.jsonl"))[:8]
        write_bytes(few / f"{split}.jsonl", map(encode_line, rows))
    private = settings(tiny_config, epochs=60, privacy=PrivacyConfig(epsilon=1.0, batch_rows=10_000))
    plain = settings(tiny_config, epochs=200).model_copy(update={"adapter": AdapterConfig(method="full")})
    tokenize(few, tiny_base, nobody, tmp_path / "tokens", private)
    checks = {}
    for name, trained in (("private", private), ("plain", plain)):
        place = tmp_path / name
        train(tmp_path / "tokens", tiny_base, nobody, place / "candidate", place / "reports/train", trained)
        metrics = evaluate(few, tiny_base, nobody, place / "candidate", place / "evaluation", trained)
        assert metrics["audit_canaries"] == CANARIES
        table = pd.read_parquet(place / "evaluation/audit.parquet")
        promise = read_trained_manifest(tmp_path / "private/candidate").privacy
        assert promise
        checks[name] = judge_privacy(promise, table, CANARIES, GateConfig())
    assert checks["private"].result == "pass"
    assert "ε = 1, δ = 1e-05 for each of" in checks["private"].reason
    assert checks["plain"].result == "fail"
    assert "the claim is refuted" in checks["plain"].reason
    assert read_trained_manifest(tmp_path / "plain/candidate").privacy is None


# --- the ledger of a checkout ---

ONE = Mechanism(2.0, 1.0, 4)


def spending(number: int, batches: list[str]) -> Spending:
    return Spending(f"key{number}", f"sha{number}", ONE, 3.0, 1e-5, "row", 500, batches)


def champion(number: int, adapter: str, batches: list[str]) -> Champion:
    line = GateLine("promote", None)
    return Champion(
        "x", number, None, "c", "k", "r", adapter, batches, Data(), line, "t", "b", "w", "promote", None
    )


def test_the_command_shows_what_is_spent_and_what_no_noise_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_git_without_a_user(monkeypatch)
    root = make_repository(
        tmp_path / "checkout", {"params.yaml": "train:\n  privacy: {epsilon: 3.0, budget: 6.0}\n"}
    )
    call = CliRunner()
    assert "nothing was trained with privacy" in call.invoke(app, ["-C", str(root), "privacy"]).stdout
    for number, batches in ((1, ["may"]), (2, ["may", "june"])):
        add_spending(root / FILE, spending(number, batches))
    write_champion(root, champion(1, "plain", ["april"]))
    commit(root, "Promote")
    write_champion(root, champion(2, "sha2", ["may", "june"]))
    commit(root, "Promote")
    told = json.loads(call.invoke(app, ["-C", str(root), "privacy", "--json"]).stdout)
    lines = {line["batch"]: line for line in told["batches"]}
    assert (told["budget"], told["trainings"]) == (6.0, 2)
    assert lines["may"]["epsilon"] == pytest.approx(epsilon_of([ONE, ONE], 1e-5))
    assert lines["april"] == {"batch": "april", "trainings": 0, "epsilon": 0.0, "without_privacy": [1]}
    assert lines["may"]["without_privacy"] == []
    text = call.invoke(app, ["-C", str(root), "privacy"]).stdout
    assert "april  ε = 0.000 in 0 trainings, 6 left; learned without privacy by v1" in text


def test_a_training_that_dvc_took_from_its_cache_is_counted_once(tmp_path: Path) -> None:
    promise = {
        **msgspec.to_builtins(spending(3, ["may"])),
        "max_grad_norm": 1.0,
        "epsilon_together": 3.0,
        "moved": 0.2,
    }
    workspace = Workspace(tmp_path, tmp_path, "")
    write_json(tmp_path / "models/candidate/manifest.json", {"adapter_sha256": "sha3", "privacy": promise})
    assert pin_privacy(workspace)
    assert not pin_privacy(workspace)
    assert read_spendings(tmp_path / FILE) == [spending(3, ["may"])]
    write_json(tmp_path / "models/candidate/manifest.json", {"adapter_sha256": "sha4"})
    assert not pin_privacy(workspace)
    assert read_json(tmp_path / FILE)["trainings"][0]["batches"] == ["may"]
