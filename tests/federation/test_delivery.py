"""A version goes to the nodes whole, to the byte, and a node keeps nothing that it cannot serve."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parties import make_node, make_version
from prefect.logging import disable_run_logger
from safetensors.torch import load_file, save_file

from flows.retrain import give_to_nodes
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig
from ratchet.errors import UserError
from ratchet.federation import messages
from ratchet.federation.delivery import deliver
from ratchet.federation.link.flower import FlowerLink
from ratchet.federation.node import handle
from ratchet.federation.records import DELIVERED, NODE, read_delivery
from ratchet.federation.status import describe, see_federation
from ratchet.files import read_json, write_json
from ratchet.models.loading import MANIFEST, WEIGHTS
from ratchet.pipeline.dvc import Workspace
from tasks.take import check_delivery

CONFIG_FILE = "adapter_config.json"


class Handled:
    """Nodes that answer by their own code in this process."""

    def __init__(self, roots: Mapping[str, Path]) -> None:
        self.roots = dict(roots)
        self.instead: dict[str, bytes | str] = {}
        self.asked: list[str] = []

    def nodes(self) -> dict[str, str]:
        return {f"id of {name}": name for name in self.roots}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        self.asked.append(name)
        names = self.nodes()
        return {
            node: self.instead.get(names[node]) or handle(self.roots[names[node]], request)
            for node, request in requests.items()
        }


@pytest.fixture
def link(tmp_path: Path, tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Handled:
    """A node that has made its base, as in a round."""
    config = tiny_config.model_copy(update={"base": BaseConfig(model=str(tiny_base))})
    root = make_node(tmp_path / "north", config, raw_rows[:5])
    shutil.copytree(tiny_base, root / NODE / "base")
    return Handled({"north": root})


def give(link: Handled, version: Path, base: Path, number: int | None = 3) -> dict[str, str]:
    return deliver(link, version, base, number, 1.0, lambda line: None)


def test_a_node_keeps_the_version_to_the_byte_and_says_so(tmp_path, link, candidate, tiny_base):
    root = link.roots["north"]
    assert "no version yet" in "\n".join(describe(see_federation(root)))
    with pytest.raises(UserError, match="was given no version") as told:
        check_delivery(root, Config(), personal=False)
    assert "ratchet federate status" in told.value.remedy
    version = make_version(tmp_path / "version", candidate)
    assert give(link, version, tiny_base) == {}
    kept = root / NODE / DELIVERED
    assert (kept / WEIGHTS).read_bytes() == (version / WEIGHTS).read_bytes()
    assert read_json(kept / CONFIG_FILE) == read_json(version / CONFIG_FILE)
    delivery = read_delivery(root)
    assert delivery is not None and (delivery.version, delivery.run) == (3, "run")
    assert delivery.federation.nodes == ["north"] and delivery.record["rank"] == 4
    assert "v3 of the coordinator" in "\n".join(describe(see_federation(root)))
    assert link.asked == ["run-deliver"]


def test_the_next_version_takes_the_place_of_the_last(tmp_path, link, candidate, tiny_base):
    give(link, make_version(tmp_path / "one", candidate), tiny_base)
    other = make_version(tmp_path / "two", candidate, run="later")
    weights = {name: tensor + 1 for name, tensor in load_file(other / WEIGHTS).items()}
    save_file(weights, other / WEIGHTS, {"format": "pt"})
    assert give(link, other, tiny_base, None) == {}
    root = link.roots["north"]
    delivery = read_delivery(root)
    assert delivery is not None and (delivery.run, delivery.version) == ("later", None)
    kept = load_file(root / NODE / DELIVERED / WEIGHTS)
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


def test_another_base_is_refused_with_both_and_nothing_is_kept(tmp_path, link, candidate, tiny_base):
    other = tmp_path / "base"
    shutil.copytree(tiny_base, other)
    write_json(other / MANIFEST, read_json(other / MANIFEST) | {"revision": "f" * 40})
    found = give(link, make_version(tmp_path / "version", candidate), other)
    assert list(found) == ["north"]
    assert "this node's base is another one: its revision is None, the coordinator's ffff" in found["north"]
    assert read_delivery(link.roots["north"]) is None


def test_numbers_that_are_not_finite_are_refused_and_the_last_version_stays(
    tmp_path, link, candidate, tiny_base
):
    give(link, make_version(tmp_path / "one", candidate), tiny_base)
    broken = make_version(tmp_path / "two", candidate, run="broken")
    weights = load_file(broken / WEIGHTS)
    next(iter(weights.values()))[0, 0] = float("inf")
    save_file(weights, broken / WEIGHTS, {"format": "pt"})
    assert "could not be answered" in give(link, broken, tiny_base)["north"]
    delivery = read_delivery(link.roots["north"])
    assert delivery is not None and delivery.run == "run"


def test_nodes_that_have_not_got_it_are_named(tmp_path, link, candidate, tiny_base):
    link.instead["north"] = "no reply within 1 s"
    version = make_version(tmp_path / "version", candidate, nodes=("north", "south"))
    assert give(link, version, tiny_base) == {"south": "it is away", "north": "no reply within 1 s"}
    link.instead["north"] = messages.write_message(messages.Masked())
    assert give(link, version, tiny_base)["north"] == "it sent Masked; wanted Delivered"


def test_a_link_that_died_fails_no_run(tmp_path, candidate, tiny_base, capsys, monkeypatch):
    """The version has landed when it goes out."""
    monkeypatch.setenv("RATCHET_CONSOLE", "1")
    make_version(tmp_path / "models/candidate", candidate)
    shutil.copytree(tiny_base, tmp_path / "models/base")
    workspace = Workspace(tmp_path, tmp_path, "main")
    with disable_run_logger():
        give_to_nodes.fn(workspace, FlowerLink(tmp_path), Config(), 3)
    assert "have not got the version: the coordinator's link" in capsys.readouterr().err


@pytest.mark.parametrize("whose", ["the version's", "the node's own"])
def test_a_personal_adapter_does_not_break_a_promise(tmp_path, link, candidate, tiny_base, whose):
    """Its rows would be learned again, without noise."""
    version, config, root = make_version(tmp_path / "version", candidate), Config(), link.roots["north"]
    manifest = read_json(version / MANIFEST)
    if whose == "the version's":
        manifest["federation"] |= {"epsilon": 2.0, "delta": 1e-5}
        write_json(version / MANIFEST, manifest)
    else:
        config = Config.model_validate({"train": {"privacy": {"epsilon": 2.0}}})
    give(link, version, tiny_base)
    with pytest.raises(UserError, match="ε = 2 stands for this node's rows"):
        check_delivery(root, config, personal=True)
    assert check_delivery(root, config, personal=False).run == "run"
