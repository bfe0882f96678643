"""The pin: today's champion as an input, with the first one's scores; an equal one is not pinned again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from places import commit, make_repository, use_git_without_a_user, write_files

from ratchet.errors import CheckoutError
from ratchet.files import read_json, sha256_file
from ratchet.pipeline.checkout import dvc, git
from ratchet.pipeline.dvc import Workspace
from ratchet.promotion.champion import Champion, write_champion
from tasks.pin import pin


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Workspace:
    use_git_without_a_user(monkeypatch)
    root = make_repository(tmp_path / "checkout", {"dvc.lock": "schema: '2.0'\nstages: {}\n"})
    return Workspace(root, root, "main")


def crown(root: Path, version: int, *, evaluated: bool = True) -> None:
    """A version as a retraining and a promotion leave it."""
    write_files(
        root,
        {
            "models/candidate/adapter_model.safetensors": f"weights {version}",
            "models/candidate/manifest.json": '{"run_key": "key"}',
        },
    )
    tracked = ["models/candidate"]
    if evaluated:
        table = pd.DataFrame(
            {
                "id": ["a", "a"],
                "batch": ["new"] * 2,
                "model": ["candidate", "base"],
                "answer": ["x"] * 2,
                "exact_match": [1.0 / version, 0.0],
            }
        )
        (root / "reports/evaluation").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / "reports/evaluation/scores.parquet")
        tracked.append("reports/evaluation")
    dvc(root, "add", "--quiet", *tracked)
    made = commit(root, f"Train {version}")
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
    }
    digest = sha256_file(root / "models/candidate/adapter_model.safetensors")
    before = version - 1 or None
    write_champion(
        root,
        Champion(
            version=version,
            previous=before,
            replaced=before,
            commit=made,
            adapter_sha256=digest,
            batches=["b"],
            **kept,
        ),
    )
    commit(root, f"Promote {version}")


def test_the_first_champions_scores_are_pinned_beside_the_champion(workspace):
    root = workspace.path
    assert pin(workspace)
    assert read_json(root / "models/incumbent/manifest.json") == {
        "version": None,
        "batches": [],
        "oldest": None,
    }
    crown(root, 1)
    assert pin(workspace)
    assert not (root / "models/incumbent/oldest.parquet").exists()
    crown(root, 2)
    assert pin(workspace)
    manifest = read_json(root / "models/incumbent/manifest.json")
    assert (manifest["version"], manifest["oldest"]) == (2, 1)
    old = pd.read_parquet(root / "models/incumbent/oldest.parquet")
    assert old.to_dict("records") == [{"id": "a", "batch": "new", "model": "v1", "exact_match": 1.0}]
    assert not pin(workspace)
    (root / "params.yaml").write_text("project: {name: small}\ngate: {oldest: false}\n")
    assert pin(workspace)
    assert not (root / "models/incumbent/oldest.parquet").exists()


def test_scores_that_cannot_be_had_stop_the_pin_and_leave_the_one_before(workspace):
    root = workspace.path
    crown(root, 1, evaluated=False)
    pin(workspace)
    git(root, "add", "--all")
    crown(root, 2)
    with pytest.raises(
        CheckoutError, match=r"(?s)the scores of v1, the first champion, cannot be had.*gate\.oldest: false"
    ):
        pin(workspace)
    assert read_json(root / "models/incumbent/manifest.json")["version"] == 1
