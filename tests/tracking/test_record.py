"""What the stages found reaches MLflow whole, and delivering it twice changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from evaluation_reports import RETENTION, make_reports
from huggingface_hub import ModelCard
from places import KEPT_CONNECTIONS, use_mlflow, use_no_mlflow

from ratchet.config.data import ProjectConfig
from ratchet.config.params import Config
from ratchet.errors import RatchetError, ServiceError
from ratchet.files import write_json
from ratchet.promotion.plain_words import tell_verdict
from ratchet.promotion.verdict import Candidate, Check, Rival, Verdict
from ratchet.reporting.evaluation_page import gather
from ratchet.tracking.mlflow import KEY_TAG, find_or_create_run, mlflow_client
from ratchet.tracking.registry import get_version, list_versions
from tasks.record import (
    MAX_DESCRIPTION,
    close_lost_runs,
    gate_line,
    read_findings,
    record,
    record_page,
    register,
)

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
CONFIG = Config(project=ProjectConfig(name="small"))
COMMIT = "c" * 40
OLD, NEW = "20260101T000000Z-old-00000000.jsonl", "20260201T000000Z-new-00000000.jsonl"


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def summary(mean: float, *, likelihood: bool = True) -> dict[str, Any]:
    scores = {
        "rows": 40,
        **{metric: interval(mean) for metric in ("exact_match", "token_f1", "rouge_l", "chrf")},
    }
    return scores | ({"answer_nll": interval(1 - mean), "perplexity": 2.5} if likelihood else {})


MODELS = {
    "base": summary(0.1),
    "candidate": summary(0.6),
    "champion": summary(0.4),
    "simple": summary(0.5, likelihood=False),
}


def make_findings(
    folder: Path,
    *,
    batches: tuple[str, ...] = (OLD, NEW),
    kinds: tuple[str, ...] = ("module",),
    verdict: str = "promote",
) -> Path:
    """A workspace after the gate, as far as registration reads it."""
    check = {
        "name": "success",
        "metric": "exact_match",
        "mean": 0.2,
        "low": 0.1,
        "high": 0.3,
        "rows": 80,
        "wanted": 0.0,
        "result": "pass",
        "reason": "it is better",
    }
    slices = ["test", "golden", *(f"batch:{name}" for name in batches), *(f"kind:{name}" for name in kinds)]
    write_json(folder / "models/candidate/manifest.json", {
        "run_key": "key1", "adapter_sha256": "a" * 64, "batches": list(batches),
        "base": {"model": "org/base", "revision": "f" * 40}, "inputs": {"start": "base"},
    })  # fmt: skip
    (folder / "models/candidate/adapter_model.safetensors").write_text("weights")
    write_json(
        folder / "reports/train/figures.json",
        {"steps": 4, "seconds": 1.5, "best_validation_loss": None, "run_key": "key1", "rows": {"new": 3}},
    )
    lines = [
        {
            "step": step,
            "time_ms": 1000 + step,
            "train_loss": 1 / step,
            **({"validation_loss": 2 / step} if step % 2 == 0 else {}),
        }
        for step in range(1, 5)
    ]
    (folder / "reports/train/history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(
        folder / "reports/evaluation/metrics.json",
        {"rows": 80, "champion": 1, "slices": dict.fromkeys(slices, MODELS)},
    )
    (folder / "reports/evaluation/scores.parquet").write_bytes(b"scores")
    write_json(folder / "reports/parity.json", {"candidate": "a" * 64})
    write_json(
        folder / "reports/gate.json",
        {
            "verdict": verdict,
            "reasons": ["it is better"],
            "rival": {"model": "champion", "version": 1},
            "candidate": {"run_key": "key1", "adapter_sha256": "a" * 64},
            "checks": [check],
        },
    )
    total = {
        "rows": 100,
        "accepted": {"rows": 90, "train": 60},
        "rejected": {"rows": 3},
        "duplicate": {"rows": 7},
    }
    write_json(folder / "data/prepared/profile.json", {"total": total})
    (folder / "data/raw.dvc").write_text(
        "outs:\n- md5: 9f060411ff9b1d4a4fbcfe4c1a7e8abe.dir\n  size: 5\n  nfiles: 2\n  "
        "hash: md5\n  path: raw\n"
    )
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    use_mlflow(monkeypatch, tmp_path)
    return make_findings(tmp_path / "workspace")


def everything(run_id: str) -> dict[str, Any]:
    client, run = mlflow_client(), mlflow_client().get_run(run_id)
    return {
        "metrics": {
            name: [
                (point.step, point.timestamp, point.value)
                for point in client.get_metric_history(run_id, name)
            ]
            for name in run.data.metrics
        },
        "params": run.data.params,
        "tags": run.data.tags,
        "inputs": [
            (entry.dataset.name, entry.dataset.digest, {tag.key: tag.value for tag in entry.tags})
            for entry in run.inputs.dataset_inputs
        ],
        "artifacts": sorted(
            entry.path
            for place in ("", "adapter", "figures", "reports", "reports/train", "reports/evaluation")
            for entry in client.list_artifacts(run_id, place)
        ),
        "status": run.info.status,
    }


def test_a_run_holds_curve_scores_knobs_data_figures_and_files(folder):
    found = everything(record(read_findings(folder), CONFIG, commit=COMMIT, reason="March's rows"))
    assert found["metrics"]["train_loss"] == [(step, 1000 + step, 1 / step) for step in range(1, 5)]
    assert found["metrics"]["test/candidate/exact_match"] == [(0, 1004, 0.6)]
    assert found["metrics"]["golden/champion/answer_nll"] == [(0, 1004, 0.6)]
    assert found["metrics"][f"batch/{OLD}/base/rows"] == [(0, 1004, 40.0)]
    assert found["metrics"]["gate/low"] == [(0, 1004, 0.1)]
    assert found["metrics"]["train/steps"] == [(0, 1004, 4.0)]
    assert (
        found["params"]["train.seed"],
        found["params"]["project.name"],
        found["params"]["adapter.target_modules"],
    ) == ("17", "small", "all-linear")
    expected = {
        "ratchet.git_commit": COMMIT,
        "ratchet.reason": "March's rows",
        "ratchet.verdict": "promote",
        "ratchet.state": "gated",
        KEY_TAG: "key1",
    }
    assert expected.items() <= found["tags"].items()
    [(name, digest, tags)] = found["inputs"]
    assert (name, digest) == ("raw", "9f060411ff9b1d4a4fbcfe4c1a7e8abe")
    assert tags["mlflow.data.context"] == "training"
    assert {
        "figures/comparison.png",
        "figures/curves.png",
        "reports/gate.json",
        "reports/parity.json",
        "reports/train/history.jsonl",
        "reports/evaluation/scores.parquet",
    } <= set(found["artifacts"])
    assert found["status"] == "FINISHED"


def test_recording_twice_changes_nothing(folder):
    first = record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand")
    before = everything(first)
    assert record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand") == first
    assert everything(first) == before


def test_the_evaluations_page_and_the_retention_table_stand_beside_the_run(folder):
    parity = (folder / "reports/parity.json").read_bytes()
    shutil.rmtree(folder / "reports")
    make_reports(folder)
    (folder / "reports/parity.json").write_bytes(parity)
    shutil.copytree(
        make_findings(folder.parent / "other") / "reports/train", folder / "reports/train", dirs_exist_ok=True
    )
    found = read_findings(folder)
    run_id = record(found, CONFIG, commit=COMMIT, reason="by hand")
    for _ in range(2):
        record_page(found, gather(folder, "v3", RETENTION), RETENTION, run_id=run_id)
    assert {"reports/evaluation.html", "reports/retention.json", "figures/retention.png"} <= set(
        everything(run_id)["artifacts"]
    )
    page = Path(
        mlflow_client().download_artifacts(run_id, "reports/evaluation.html", str(folder.parent))
    ).read_text(encoding="utf-8")
    assert (
        page.index("Kept the champion (v1): ")
        < page.index("Every check")
        < page.index(">Retention<")
        < page.index("Rows that got better")
    )


def test_the_run_that_the_training_opened_is_the_one_that_is_completed(folder):
    opened = find_or_create_run("small", "key1", {"mlflow.runName": "train-key1"})
    assert record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand") == opened


def test_a_knob_that_changed_after_the_training_does_not_stop_the_delivery(folder):
    """MLflow's params cannot be changed; the training's stay."""
    first = record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand")
    other = CONFIG.model_copy(update={"promotion": "manual"})
    record(read_findings(folder), other, commit=COMMIT, reason="by hand")
    assert everything(first)["params"]["promotion"] == "rollout"


def test_any_kind_of_the_users_has_a_place_among_the_metrics(tmp_path, monkeypatch):
    use_mlflow(monkeypatch, tmp_path)
    kinds = ("Q&A (short)", "a/b", "..", "/", "ünïcode 日本", "x" * 400, "a:b", "%s\n")
    folder = make_findings(tmp_path / "workspace", kinds=kinds)
    names = set(everything(record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand"))["metrics"])
    assert {
        f"kind/{kind}/candidate/exact_match"
        for kind in ("Q_A _short_", "a_b", "_", "ünïcode 日本", "x" * 100)
    } <= names


def test_many_batches_are_delivered_and_the_card_fits_into_the_registry(tmp_path, monkeypatch):
    use_mlflow(monkeypatch, tmp_path)
    batches = tuple(f"20260101T000000Z-batch-{number:08}.jsonl" for number in range(40))
    folder = make_findings(tmp_path / "workspace", batches=batches, kinds=())
    found = read_findings(folder)
    run_id = record(found, CONFIG, commit=COMMIT, reason="by hand")
    assert len(mlflow_client().get_run(run_id).data.metrics) > 40 * 4 * 6
    version = register(
        found,
        CONFIG,
        run_id=run_id,
        commit=COMMIT,
    )
    assert len(version.description) <= MAX_DESCRIPTION
    assert version.description.endswith(
        "the rest stands in the run's artifacts: reports/gate.json, reports/evaluation/metrics.json\n"
    )
    assert json.loads(get_version("small", version.number).tags["batches"]) == list(batches)
    card = ModelCard.load(mlflow_client().download_artifacts(run_id, "adapter/README.md", str(tmp_path)))
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}[
        "exact_match"
    ] == 0.6
    assert all(batch in card.text for batch in batches), "the card is whole where the description is cut"


def registered(folder: Path) -> Any:
    found = read_findings(folder)
    run_id = record(found, CONFIG, commit=COMMIT, reason="by hand")
    return register(
        found,
        CONFIG,
        run_id=run_id,
        commit=COMMIT,
    )


def test_a_version_carries_all_that_a_promotion_and_a_person_need(folder):
    version = registered(folder)
    assert get_version("small", 1) == version
    assert version.tags["rival"] == "1"
    assert version.tags["git_commit"] == COMMIT
    assert json.loads(version.tags["data"]) == {
        "dvc": "9f060411ff9b1d4a4fbcfe4c1a7e8abe.dir",
        "batches": 2,
        "rows": 100,
        "accepted": 90,
        "rejected": 3,
        "duplicate": 7,
        "nodes": [],
        "share": "",
    }
    assert json.loads(version.tags["gate"]) == {
        "verdict": "promote",
        "rival": 1,
        "metric": "exact_match",
        "mean": 0.2,
        "low": 0.1,
        "high": 0.3,
        "rows": 80,
    }
    for words in (
        "promote",
        "it is better",
        "100 rows in 2 batches, DVC 9f06",
        COMMIT,
        f"org/base@{'f' * 40}",
        f"runs/{version.run_id}",
    ):
        assert words in version.description
    assert len(version.description) <= MAX_DESCRIPTION


def test_registering_twice_makes_one_version_and_a_new_verdict_is_told(folder):
    registered(folder)
    make_findings(folder, verdict="uncertain")
    again = registered(folder)
    assert [version.number for version in list_versions("small")] == [1]
    assert again.tags["verdict"] == "uncertain"
    assert "uncertain" in get_version("small", 1).description
    assert get_version("small", 1).description.startswith(tell_verdict(read_findings(folder).decision))


def test_too_few_rows_leave_the_ledgers_figures_open(folder):
    check = Check("success", "exact_match", 12, "unclear", "too few")
    verdict = Verdict("uncertain", ["too few"], Rival("base", None), [check], Candidate("key1", "sha"))
    assert msgspec.to_builtins(gate_line(verdict)) == {
        "verdict": "uncertain",
        "rival": None,
        "metric": "exact_match",
        "mean": None,
        "low": None,
        "high": None,
        "rows": 12,
    }


def test_without_a_golden_set_and_a_champion_the_rest_is_recorded(folder):
    slices = {
        "test": {"base": summary(0.1), "candidate": summary(0.6)},
        f"batch:{OLD}": {"base": summary(0.1), "candidate": summary(0.6)},
    }
    write_json(folder / "reports/evaluation/metrics.json", {"rows": 80, "champion": None, "slices": slices})
    assert (
        "test/candidate/exact_match"
        in everything(record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand"))["metrics"]
    )


@pytest.mark.parametrize(
    "name", ["models/candidate/manifest.json", "reports/gate.json", "data/prepared/profile.json"]
)
def test_a_file_that_a_stage_did_not_write_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(RatchetError, match=f"{name} does not exist"):
        read_findings(folder)


def test_a_server_that_is_away_is_an_error_of_the_service_and_the_files_stand(folder, monkeypatch):
    use_no_mlflow(monkeypatch)
    with pytest.raises(ServiceError):
        record(read_findings(folder), CONFIG, commit=COMMIT, reason="by hand")
    assert read_findings(folder).decision.verdict == "promote"


def test_runs_that_a_killed_process_left_open_are_closed_and_others_stay(tmp_path, monkeypatch):
    use_mlflow(monkeypatch, tmp_path)
    assert close_lost_runs(CONFIG, but="mine") == 0
    client = mlflow_client()
    lost, mine = find_or_create_run("small", "lost", {}), find_or_create_run("small", "mine", {})
    done = find_or_create_run("small", "done", {})
    client.set_terminated(done, "FINISHED")
    somebodys = client.create_run(client.get_experiment_by_name("small").experiment_id).info.run_id
    elsewhere = find_or_create_run("other", "lost", {})
    assert close_lost_runs(CONFIG, but="mine") == 1
    assert close_lost_runs(CONFIG, but="mine") == 0
    status = {
        run_id: client.get_run(run_id).info.status for run_id in (lost, mine, done, somebodys, elsewhere)
    }
    assert status == {
        lost: "KILLED",
        mine: "RUNNING",
        done: "FINISHED",
        somebodys: "RUNNING",
        elsewhere: "RUNNING",
    }
