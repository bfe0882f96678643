"""The retention table on a real repository: three versions, two batches and golden rows, as retrainings land
them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from places import (
    KEPT_CONNECTIONS,
    commit,
    make_repository,
    use_git_without_a_user,
    use_no_mlflow,
    write_files,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ratchet.cli.main import app
from ratchet.config.params import load_config
from ratchet.data.examples import encode_line, make_example, read_examples
from ratchet.evaluation.statistics import estimate
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.loading import adapter_sha256
from ratchet.pipeline.checkout import dvc
from ratchet.promotion.champion import Champion, write_champion
from ratchet.reporting.evaluation_page import KEPT
from ratchet.reporting.heatmap import draw
from ratchet.reporting.retention import CACHE, SAVED, Cell, Retention, build, numbers_of, read_evaluations
from tasks.evaluate import evaluate
from tasks.retention import fill

pytestmark = pytest.mark.filterwarnings(KEPT_CONNECTIONS)
PIPELINE = """
stages:
  base: {cmd: cp -r ../made/base models/base, outs: [models/base]}
  prepare: {cmd: cp -r ../made/prepared data/prepared, deps: [number], outs: [data/prepared]}
  train: {cmd: cp -r ../made/candidate models/candidate, deps: [number], outs: [models/candidate]}
  evaluate:
    cmd: cp -r ../made/evaluation reports/evaluation && cp -r ../made/train reports/train
    deps: [number, models/candidate]
    outs: [reports/evaluation, reports/train]
"""
GATE = {
    "verdict": "promote",
    "reasons": ["it is better"],
    "checks": [
        {"name": "success", "metric": "token_f1", "rows": 9, "result": "pass", "reason": "it is better"}
    ],
}
PARAMS = (
    "evaluate: {max_new_tokens: 8, simple_baseline: false}\ntokenize: {max_length: 96, window: 128}\ngate:"
    " {metric: token_f1}\n"
)


class Made:
    """v1 knew the first batch; v2 was refused; v3 took over when the second batch had come."""

    def __init__(self, place: Path, prepared: Path, base: Path, candidate: Path) -> None:
        self.root, self._made = make_repository(place / "repository"), place / "made"
        self.rows = list(read_examples(prepared / "test.jsonl"))
        self.first, self.second = sorted({str(row.meta["batch"]) for row in self.rows})
        shutil.copytree(base, self._made / "base")
        write_files(
            self._made,
            {
                "train/history.jsonl": (
                    '{"step": 1, "time_ms": 1, "train_loss": 2.5, "validation_loss": 2.25}\n'
                )
            },
        )
        write_files(
            self.root,
            {
                "dvc.yaml": PIPELINE,
                "params.yaml": PARAMS,
                "models/.gitignore": "",
                "data/.gitignore": "",
                "reports/.gitignore": "",
            },
        )
        self.champion: Path | None = None
        self.adapters: list[str] = []
        self._retrain(prepared, candidate, 1, [self.first], promoted=True)
        self._retrain(prepared, candidate, 2, [self.first], promoted=False)
        self._retrain(prepared, candidate, 3, [self.first, self.second], promoted=True)

    def _retrain(
        self, prepared: Path, candidate: Path, number: int, batches: list[str], *, promoted: bool
    ) -> None:
        made = self._made
        for name in ("prepared", "candidate", "evaluation", "incumbent"):
            shutil.rmtree(made / name, ignore_errors=True)
        golden = [make_example(row.messages, {**row.meta, "batch": "golden"}) for row in self.rows[:4]]
        write_bytes(
            made / "prepared/test.jsonl",
            (encode_line(row) for row in self.rows[4:] if row.meta["batch"] in batches),
        )
        write_bytes(made / "prepared/golden.jsonl", map(encode_line, golden))
        shutil.copytree(candidate, made / "candidate")
        weights = made / "candidate/adapter_model.safetensors"
        save_file(
            {name: tensor * number for name, tensor in load_file(weights).items()},
            weights,
            metadata={"format": "pt"},
        )
        sha = adapter_sha256(made / "candidate")
        write_json(
            made / "candidate/manifest.json",
            {**read_json(made / "candidate/manifest.json"), "adapter_sha256": sha},
        )
        rival = 1 if self.champion else None
        shutil.copytree(self.champion, made / "incumbent") if self.champion else (made / "incumbent").mkdir()
        write_json(
            made / "incumbent/manifest.json",
            {
                **(read_json(made / "incumbent/manifest.json") if rival else {}),
                "version": rival,
                "batches": [],
            },
        )
        write_files(self.root, {"number": str(number)})
        evaluate(
            made / "prepared",
            made / "base",
            made / "incumbent",
            made / "candidate",
            made / "evaluation",
            load_config(self.root / "params.yaml"),
        )
        dvc(self.root, "repro", "--quiet")
        write_files(
            self.root,
            {
                "reports/gate.json": json.dumps(
                    GATE
                    | {
                        "candidate": {"run_key": sha, "adapter_sha256": sha},
                        "rival": {"model": "champion" if rival else "base", "version": rival},
                        "number": number,
                    }
                )
            },
        )
        landed = commit(self.root, f"Retrain {number}")
        self.adapters.append(sha)
        if not promoted:
            shutil.copytree(made / "candidate", made / "refused")
        else:
            kept = {
                "name": "small",
                "run_key": "",
                "run_id": "",
                "data": {},
                "gate": {"verdict": "promote", "rival": None},
                "at": "",
                "by": "tests",
                "why": "",
                "move": "promote",
                "batches": batches,
            }
            write_champion(
                self.root,
                Champion(
                    version=number, previous=rival, replaced=rival, commit=landed, adapter_sha256=sha, **kept
                ),
            )
            commit(self.root, f"Promote {number}")
            self.champion = self.champion or Path(shutil.copytree(made / "candidate", made / "champion"))


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, prepared: Path, tiny_base: Path, candidate: Path
) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        use_git_without_a_user(patch)
        made = Made(tmp_path_factory.mktemp("retention"), prepared, tiny_base, candidate)
        build(made.root, "token_f1", {})  # DVC is asked here once, and not in every test
        return made


@pytest.fixture
def made(original: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    use_git_without_a_user(monkeypatch)
    copy = object.__new__(Made)
    copy.__dict__ = original.__dict__ | {"root": tmp_path / "repository"}
    shutil.copytree(original.root, copy.root, symlinks=True)
    return copy


def scores(made: Made, model: str, batch: str) -> Any:
    table = pd.read_parquet(made._made / "evaluation/scores.parquet")
    return table[(table.model == model) & (table.batch == batch)].token_f1.to_numpy()


def names(table: Retention) -> list[str]:
    return [row.name for row in table.versions]


def cells(table: Retention, name: str) -> dict[str, Cell | None]:
    return next(row.cells for row in table.versions if row.name == name)


def test_every_version_has_its_row_and_every_batch_its_column(made):
    found = build(made.root, "token_f1", numbers_of(made.root))
    refused = next(name for name in names(found) if name.startswith("unnumbered"))
    assert names(found) == ["base", "v1", refused, "v3"]
    assert found.slices == [made.first, made.second, "golden"]
    assert found.faults == []
    assert (
        build(made.root, "token_f1", {**numbers_of(made.root), made.adapters[1]: 2}).versions[2].name == "v2"
    )  # as MLflow knows it


def test_a_cell_is_what_the_evaluation_recorded(made):
    found = build(made.root, "token_f1", numbers_of(made.root))
    for name, model in (("v3", "candidate"), ("base", "base"), ("v1", "champion")):
        for batch in (made.first, made.second, "golden"):
            cell = cells(found, name)[batch]
            assert (cell.rows, *cell) == (len(values := scores(made, model, batch)), *estimate(values))
            assert cell.low <= cell.mean <= cell.high and cell.from_


def test_a_version_that_was_not_asked_is_empty_and_says_so(made):
    found = build(made.root, "token_f1", {**numbers_of(made.root), made.adapters[1]: 2})
    assert [name for name, cell in cells(found, "v2").items() if cell is None] == [made.second]
    assert [(row.name, slices) for row, slices in found.unasked] == [("v2", [made.second])]


def test_filling_by_the_command_gives_what_an_evaluation_of_that_day_gives(
    made, nobody, monkeypatch, tmp_path
):
    """The refused v2 on the second batch, which came after it. Without MLflow it has no number."""
    use_no_mlflow(monkeypatch)
    done = CliRunner().invoke(app, ["-C", str(made.root), "retention", "--fill", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    found = msgspec.convert(shown, Retention)
    assert found.unasked == []
    cell = shown["versions"][2]["cells"][made.second]
    evaluate(
        made._made / "prepared",
        made._made / "base",
        nobody,
        made._made / "refused",
        tmp_path / "out",
        load_config(made.root / "params.yaml"),
    )
    table = pd.read_parquet(tmp_path / "out/scores.parquet")
    values = table[(table.model == "candidate") & (table.batch == made.second)].token_f1.to_numpy()
    assert cell == {**msgspec.structs.asdict(estimate(values)), "from": "filled"}
    assert read_json(made.root / SAVED) == shown  # what the page shows
    assert (
        fill(made.root, found, read_evaluations(made.root)[0], load_config(made.root / "params.yaml"), print)
        == 0
    )
    for path in (made.root / CACHE).glob("filled-*"):
        path.write_text("{")
    assert (
        len(build(made.root, "token_f1", numbers_of(made.root)).unasked) == 1
    )  # what is broken counts for nothing


def test_an_evaluation_that_is_gone_is_named_and_the_others_are_shown(made):
    newest = read_evaluations(made.root)[0]
    for path in (".dvc/cache", "reports/evaluation", CACHE):
        shutil.rmtree(made.root / path)
    found = build(made.root, "token_f1", numbers_of(made.root), [newest])
    assert found.versions == []
    assert [fault[:11] for fault in found.faults] == ["the scores "]


def test_what_was_read_once_is_not_asked_of_dvc_again(made):
    shutil.rmtree(made.root / ".dvc/cache")
    found = build(made.root, "token_f1", numbers_of(made.root))
    assert (len(found.versions), found.faults) == (4, [])


def test_the_heat_map_shows_every_cell(made):
    found = build(made.root, "token_f1", numbers_of(made.root))
    texts = [text.get_text() for text in draw(found).axes[0].texts]
    assert len(texts) == len(found.versions) * len(found.slices)
    assert texts.count("not asked") == 1


def test_the_command_prints_the_table_without_mlflow(made, monkeypatch):
    use_no_mlflow(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(app, ["-C", str(made.root), "retention"])
    assert (done.exit_code, done.stdout.count("not asked")) == (
        0,
        2,
    ), done.output  # the cell, and what it means
    assert [name in done.stdout for name in ("base", "v1", "unnumbered", "v3")] == [True] * 4


PROMOTED = "Promoted: agreement with the wanted words rose on 9 test rows, compared with the untouched base."


def test_explain_finds_a_version_by_its_number_and_writes_its_page(made, monkeypatch, tmp_path):
    use_no_mlflow(monkeypatch)
    done = CliRunner().invoke(
        app, ["-C", str(made.root), "gate", "explain", "v1", "--page", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert "<title>v1: promote</title>" in page
    assert page.count("not asked") == 1
    assert f">{PROMOTED}<" in page
    [kept] = (made.root / KEPT).glob("*.html")
    assert kept.read_text() == page
    told = CliRunner().invoke(app, ["-C", str(made.root), "gate", "explain", "v1"]).stdout
    assert " ".join(told.split()).startswith(PROMOTED)
    unknown = CliRunner().invoke(app, ["-C", str(made.root), "gate", "explain", "v9"])
    assert all(word in str(unknown.exception) for word in ("v9", "v1, v3"))


def test_a_metric_that_nobody_recorded_is_told(made, monkeypatch):
    use_no_mlflow(monkeypatch)
    done = CliRunner().invoke(app, ["-C", str(made.root), "retention", "--metric", "foo"])
    assert "has no foo" in str(done.exception) and "exact_match, answer_nll" in str(done.exception)


def test_without_an_evaluation_the_table_is_empty(tmp_path, monkeypatch):
    use_git_without_a_user(monkeypatch)
    found = build(make_repository(tmp_path / "new"), "exact_match", {})
    assert (found.versions, found.slices) == ([], [])
    assert draw(found).axes
