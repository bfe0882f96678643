"""A node takes the version that it was given into its own project, with and without an adapter of its own.

The node is a clone with tiny settings; MLflow is a store in SQLite, Prefect's server lives as long as a flow.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from parties import join, make_version
from places import use_mlflow
from safetensors.torch import load_file

from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.errors import BaseModelError
from ratchet.federation.aggregation import DOWN
from ratchet.federation.delivery import deliver
from ratchet.federation.node import Refusal, handle
from ratchet.federation.records import NODE, Done
from ratchet.files import read_json, write_json
from ratchet.models.loading import MANIFEST, WEIGHTS, adapter_sha256
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.dvc import Workspace
from ratchet.promotion.champion import read_champion
from ratchet.promotion.verdict import read_verdict
from tasks.base import make_base
from tasks.take import take

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


class One:
    """A link to one node, which answers in this process."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def nodes(self) -> dict[str, str]:
        return {"1": "north"}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        return {node: handle(self._root, request) for node, request in requests.items()}


def give(root: Path, version: Path, base: Path) -> None:
    """Deliver to a node that was in the version's rounds."""
    join(root)
    if not (root / NODE / "base").exists():
        shutil.copytree(base, root / NODE / "base")
    done = Done("2026-01-01T00:00:00+00:00", "run", 1, 70, 8, 1.0, 2.0, None, batches=["rows.jsonl"])
    (root / NODE / "rounds.jsonl").write_bytes(msgspec.json.encode(done) + b"\n")
    assert deliver(One(root), version, base, 3, 1.0, print) == {}


# --- the whole flow ---


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Config,
    tiny_base: Path,
    candidate: Path,
    raw_rows: list[dict[str, Any]],
) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("node") / "north"
    run(place.parent, "git", "clone", "--quiet", str(ROOT), str(place))
    run(place, "git", "remote", "remove", "origin")
    run(place, "git", "checkout", "-q", "-B", "main")
    run(place, "git", "config", "user.name", "Ana")
    run(place, "git", "config", "user.email", "ana@example.org")
    given = BaseConfig(model=str(tiny_base))
    make_base(place.parent / "base", tiny_config.model_copy(update={"base": given}))
    values = tiny_config.model_dump(mode="json") | {"base": given.model_dump(mode="json")}
    values["project"]["name"] = "taken"
    values["evaluate"] |= {"max_new_tokens": 4, "simple_baseline": False}
    values["gate"] |= {"metric": "answer_nll", "min_rows": 5, "min_gain": 0.0}
    values["promotion"] = "auto"
    (place / "params.yaml").write_text(render_params(Config.model_validate(values)), encoding="utf-8")
    run(place, "git", "commit", "-qam", "Our settings")
    (place.parent / "rows.jsonl").write_bytes(
        b"".join(msgspec.json.encode(row) + b"\n" for row in raw_rows[:150])
    )
    with pytest.MonkeyPatch.context() as patch:
        use_mlflow(patch, place.parent)
        ratchet(place, "ingest", "--path", str(place.parent / "rows.jsonl"))
        give(place, make_version(place.parent / "version", candidate), place.parent / "base")
        yield place


def run(place: Path, *command: str) -> str:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RATCHET_"))
    }
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    told = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.returncode == 0, f"{command}: {done.returncode}\n{told}"
    return done.stdout


def ratchet(place: Path, *arguments: str) -> str:
    return run(place, sys.executable, "-m", "ratchet.cli", *arguments)


def test_the_version_becomes_the_nodes_own_to_the_byte(home: Path, candidate: Path) -> None:
    done = json.loads(ratchet(home, "federate", "take", "--reason", "from the coordinator", "--json"))
    taken, manifest = home / "models/candidate", read_trained_manifest(home / "models/candidate")
    assert done["version"] == 1 and done["stages"]["evaluate"] and done["stages"]["parity"]
    assert (taken / WEIGHTS).read_bytes() == (candidate / WEIGHTS).read_bytes()
    assert manifest.federation is not None and manifest.federation.nodes == ["north"]
    assert manifest.batches == ["rows.jsonl"] and manifest.federation.own_share is None
    verdict = read_verdict(home / "reports/gate.json")
    assert verdict.candidate.trained_by.startswith("1 nodes (north) in 2 rounds on 140 rows")
    assert verdict.rival.model == "base"
    champion = read_champion(home)
    assert done["champion"] == (1 if verdict.verdict == "promote" else None), verdict.reasons
    assert champion is None or champion.adapter_sha256 == adapter_sha256(candidate)


# --- the task alone ---


@pytest.fixture
def workspace(
    tmp_path: Path, prepared: Path, tokens: Path, tiny_base: Path, nobody: Path, candidate: Path
) -> Workspace:
    """What the stages before the training have made, at a node that was given `candidate`."""
    root, path = tmp_path / "north", tmp_path / "workspace"
    made = {"data/prepared": prepared, "data/tokenized": tokens, "models/base": tiny_base}
    for name, folder in {**made, "models/incumbent": nobody}.items():
        shutil.copytree(folder, path / name)
    give(root, make_version(tmp_path / "version", candidate), tiny_base)
    return Workspace(root, path, "main")


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(folder / "figures.json")
    return found


def test_the_loss_on_the_nodes_rows_is_measured_as_a_training_does(
    workspace: Workspace, candidate: Path, tiny_config: Config
) -> None:
    take(workspace, tiny_config, personal=False, say=print)
    reports, trained = workspace.path / "reports/train", candidate.parent / "reports"
    wanted = figures(trained)["best_validation_loss"]
    assert figures(reports)["best_validation_loss"] == pytest.approx(wanted, abs=1e-4)
    assert figures(reports)["run_key"] == read_trained_manifest(workspace.path / "models/candidate").run_key
    assert figures(reports)["seconds"] == 0


def own_loss(own: tuple[str, dict[str, Any]]) -> float:
    return float(own[1]["best_validation_loss"])


def test_a_personal_mixture_is_no_worse_than_its_ends(
    workspace: Workspace, candidate: Path, tiny_config: Config
) -> None:
    """The node trains longer than the version was trained, so a share of its own is of use."""
    epochs = tiny_config.train.model_copy(update={"epochs": 1.5})
    config = tiny_config.model_copy(update={"train": epochs})
    take(workspace, config, personal=True, say=print)
    found = figures(workspace.path / "reports/train")
    delivered = figures(candidate.parent / "reports")["best_validation_loss"]
    owns = [
        figures(workspace.path / f".ratchet/personal/from-{origin}/reports")
        for origin in ("champion", "base")
    ]
    ends = [delivered, *(own["best_validation_loss"] for own in owns)]
    assert found["best_validation_loss"] <= min(ends) + 1e-4
    assert found["best_validation_loss"] < delivered - 1e-3
    assert found["steps"] == sum(own["steps"] for own in owns) and found["seconds"] > 0
    manifest = read_trained_manifest(workspace.path / "models/candidate")
    assert manifest.federation is not None and manifest.federation.own_share in (0.25, 0.5, 0.75, 1.0)
    origin = min(("the delivered one", owns[0]), ("the base", owns[1]), key=own_loss)[0]
    if manifest.federation.own_share == 1:
        assert manifest.federation.own_origin == origin
    share = f"own share {manifest.federation.own_share:g} of an adapter trained from "
    assert manifest.federation.told.endswith(f", {share}{manifest.federation.own_origin}")
    assert manifest.federation.own_origin in ("the delivered one", "the base")
    weights = load_file(workspace.path / "models/candidate" / WEIGHTS)
    ranks = {tensor.shape[0] for name, tensor in weights.items() if name.endswith(DOWN)}
    assert ranks == {manifest.adapter.rank}
    assert manifest.adapter.alpha / manifest.adapter.rank == pytest.approx(2.0)
    batches = read_json(workspace.path / "data/tokenized/profile.json")["batches"]
    assert set(manifest.batches) == {"rows.jsonl", *batches}


def test_a_delivery_for_another_base_is_not_taken(workspace: Workspace, tiny_config: Config) -> None:
    base = workspace.path / "models/base" / MANIFEST
    write_json(base, read_json(base) | {"revision": "f" * 40})
    with pytest.raises(Refusal, match=r"its revision is ffff.*, the coordinator's None"):
        take(workspace, tiny_config, personal=False, say=print)
    assert not (workspace.path / "models/candidate").exists()


def test_an_adapter_on_other_layers_cannot_be_mixed(workspace: Workspace, tiny_config: Config) -> None:
    other = tiny_config.adapter.model_copy(update={"target_modules": ["q_proj"]})
    with pytest.raises(BaseModelError, match="other layers") as told:
        take(workspace, tiny_config.model_copy(update={"adapter": other}), personal=True, say=print)
    assert "all-linear" in told.value.remedy
