"""Rounds make a candidate as the stage `train` does: from the base, from the champion, without what was
forgotten. What nodes learn is crafted here; in `test_nodes` they train.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from prefect import Flow

from flows.federate import federate
from flows.retrain import retrain
from ratchet.config.federation import FederateConfig
from ratchet.config.params import Config
from ratchet.errors import ConfigError, UserError
from ratchet.federation.link.flower import FOLDER
from ratchet.federation.messages import Refused, Train, Trained, read_request, write_message
from ratchet.federation.records import FORGOTTEN, ForgottenNode, read_trained_rounds
from ratchet.federation.secure import SharesWrong
from ratchet.federation.state import GLOBAL
from ratchet.files import read_json, write_json
from ratchet.models.manifests import TrainedManifest, read_trained_manifest
from tasks.federate import check_trainable, forget_run, is_interrupted, train_together


class Crafted:
    """Nodes that add a little to every weight, and hold no rows out."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def nodes(self) -> dict[str, str]:
        return {name: name for name in self.names}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        return {node: self._answer(request) for node, request in requests.items()}

    def _answer(self, request: bytes) -> bytes:
        asked, tensors = read_request(request)
        if not isinstance(asked, Train):
            return write_message(Refused("no held-out rows"))
        learned = {
            key.removeprefix(GLOBAL): tensor + 0.01
            for key, tensor in tensors.items()
            if key.startswith(GLOBAL)
        }
        numbers = Trained(
            rows=60, steps=4, learned_tokens=500, seconds=0.5, train_loss=2.0, validation_loss=None
        )
        return write_message(numbers, learned)


class Coordinator(NamedTuple):
    root: Path
    config: Config

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def train(self, link: Crafted) -> tuple[TrainedManifest, list[str]]:
        said: list[str] = []
        train_together(self.workspace, self.root, self.config, link, said.append)
        forget_run(self.root)
        return read_trained_manifest(self.workspace / "models/candidate"), said

    def promote(self) -> None:
        """Make the candidate the incumbent, as `tasks.pin` does."""
        incumbent = self.workspace / "models/incumbent"
        shutil.rmtree(incumbent)
        shutil.copytree(self.workspace / "models/candidate", incumbent)
        write_json(incumbent / "manifest.json", read_json(incumbent / "manifest.json") | {"version": 1})


@pytest.fixture
def coordinator(tmp_path: Path, tiny_config: Config, tiny_base: Path, tokens: Path) -> Coordinator:
    config = tiny_config.model_copy(update={"federate": FederateConfig(rounds=2, min_nodes=1)})
    found = Coordinator(tmp_path, config)
    shutil.copytree(tiny_base, found.workspace / "models/base")
    shutil.copytree(tokens, found.workspace / "data/tokenized")
    write_json(found.workspace / "models/incumbent/manifest.json", {"version": None, "batches": []})
    return found


def test_what_nodes_taught_is_known_until_it_is_forgotten(coordinator: Coordinator) -> None:
    first, _ = coordinator.train(Crafted("north", "south"))
    assert first.federation is not None and first.federation.nodes == ["north", "south"]
    assert (first.inputs.start, first.taught_by, first.batches) == ("base", ["north", "south"], [])

    coordinator.promote()
    second, _ = coordinator.train(Crafted("north"))
    assert second.federation is not None and second.federation.nodes == ["north"]
    assert (second.inputs.start, second.taught_by) == (first.adapter_sha256, ["north", "south"])

    coordinator.promote()
    forgotten = [ForgottenNode("south", "2026-01-01T00:00:00+00:00", "it left")]
    write_json(coordinator.root / FOLDER / FORGOTTEN, msgspec.to_builtins(forgotten))
    third, said = coordinator.train(Crafted("north"))
    assert (third.inputs.start, third.taught_by) == ("base", ["north"])
    assert "federate: from the base, since south taught the champion and was forgotten" in said


class WrongShares(Crafted):
    """Nodes whose shares do not fit."""

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        raise SharesWrong("they do not fit")


def test_after_a_wrong_share_another_run_begins(coordinator: Coordinator) -> None:
    """Nodes give their shares of a round once: the same run would be refused for good."""
    with pytest.raises(SharesWrong):
        coordinator.train(WrongShares("north", "south"))
    assert not is_interrupted(coordinator.root)


def test_the_reports_are_those_of_a_training_with_each_round(coordinator: Coordinator) -> None:
    coordinator.train(Crafted("north", "south"))
    reports = coordinator.workspace / "reports/train"
    rounds, figures = read_trained_rounds(reports), read_json(reports / "figures.json")
    assert [[part.name for part in each.nodes] for each in rounds] == [["north", "south"]] * 2
    assert figures["rows"]["rows"] == 120 and figures["steps"] == 8
    assert figures["learned_tokens_per_second"] == pytest.approx(2000 / figures["seconds"])
    assert read_json(reports / "nodes.json")["left_out"] == {
        "north": "it refused: no held-out rows",
        "south": "it refused: no held-out rows",
    }


@pytest.mark.parametrize("flow", [retrain, federate], ids=["retrain", "federate"])
def test_too_few_invited_nodes_are_told_before_a_workspace_is_opened(
    tmp_path: Path, tiny_config: Config, flow: Flow[..., Any]
) -> None:
    """The folder is no git repository, so a workspace could not be opened."""
    with_nodes = tiny_config.retrain.model_copy(update={"trains_with": "nodes"})
    config = tiny_config.model_copy(update={"retrain": with_nodes})
    write_json(tmp_path / "params.yaml", config.model_dump(mode="json"))
    with pytest.raises(UserError, match=r"0 nodes are invited \(none\); `federate.min_nodes` asks for 2"):
        flow.fn(root=str(tmp_path))


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("adapter", {"method": "dora"}, "adapter.method is 'dora'"),
        ("adapter", {"bias": "lora_only"}, "modules_to_save or bias"),
        ("train", {"processes": 2}, "train.processes times train.nodes is 2"),
        ("train", {"teacher": "champion"}, "nodes have no champion"),
        ("evaluate", {"canaries": 4}, "evaluate.canaries is 4"),
        ("evaluate", {"audit_canaries": 4}, "audit_canaries 4"),
        ("federate", {"audit_canaries": 4}, "no claim to test"),
    ],
)
def test_settings_that_no_node_could_follow_are_refused(
    tiny_config: Config, section: str, values: dict[str, object], told: str
) -> None:
    check_trainable(tiny_config)
    part = getattr(tiny_config, section).model_copy(update=values)
    with pytest.raises(ConfigError, match=told) as caught:
        check_trainable(tiny_config.model_copy(update={section: part}))
    assert "set " in caught.value.remedy
