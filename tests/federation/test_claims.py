"""Canaries at the nodes bear out the ε of an honest federation, and refute one whose noise is left out.

The nodes' stages run in this process, so that a test can take the noise from the trainer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from calm import Calm
from parties import make_node
from safetensors.torch import load_file

from ratchet.config.evaluation import EvaluateConfig, GateConfig
from ratchet.config.federation import FederateConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, PrivacyConfig, TrainConfig
from ratchet.federation import messages
from ratchet.federation.audit import DRAWN, audit_at_nodes, keep_drawn
from ratchet.federation.node import identity
from ratchet.federation.records import NODE
from ratchet.federation.rounds import Plan
from ratchet.files import read_json, write_json
from ratchet.gate.privacy import judge_claim
from ratchet.models.chat_template import ChatFormat
from ratchet.models.loading import load_tokenizer
from ratchet.privacy import gradients
from ratchet.privacy.audit import FILE, Claim
from ratchet.promotion.verdict import Check
from ratchet.training.collation import rows_apart
from ratchet.training.packing import read_windows
from tasks.base import make_base
from tasks.federate import SECTIONS, forget_run, train_together

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NAMES = ("north", "south", "west")
CANARIES = 40  # at each node
ROWS = 10  # at each node
# Where one node trains for long on little else than canaries, without noise it knows them by heart. Of
# several nodes, each one's canaries are diluted by what the others learn.
LONG = {"epochs": 50, "learning_rate": 5e-3}


class Place(NamedTuple):
    folder: Path
    config: Config
    link: Calm

    def alone(self, canaries: int) -> Place:
        """Return the federation of one node, which trains for long."""
        federate = FederateConfig(rounds=2, min_nodes=1, audit_canaries=canaries)
        train = self.config.train.model_copy(update=LONG)
        config = self.config.model_copy(update={"federate": federate, "train": train})
        return self._replace(config=config, link=Calm({"north": self.folder / "north"}))

    def train(self, name: str) -> tuple[Claim, Check]:
        """Run all rounds into a workspace of its own; return the claim, and what the gate says of it."""
        workspace = self.folder / name
        (workspace / "models").mkdir(parents=True)
        (workspace / "models/base").symlink_to(self.folder / "base")
        write_json(workspace / "models/incumbent/manifest.json", {"version": None, "batches": []})
        write_json(workspace / "data/tokenized/profile.json", {"max_length": 96, "train": {}})
        train_together(workspace, workspace, self.config, self.link, print)
        forget_run(workspace)
        claim = workspace / "reports/train" / FILE
        (check,) = judge_claim(claim, GateConfig())
        return msgspec.convert(read_json(claim), Claim), check


@pytest.fixture(scope="module")
def place(tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="ratchet-claims-") as scratch:
        folder = Path(scratch)
        privacy = PrivacyConfig(epsilon=0.5, batch_rows=8, budget=100.0)
        rates: dict[str, Any] = {"epochs": 5, "batch_windows": 64, "evaluations": 1}
        config = tiny_config.model_copy(
            update={
                "base": BaseConfig(model=str(tiny_base)),
                "prepare": tiny_config.prepare.model_copy(update={"test_share": 0.0, "min_rows": 1}),
                "train": TrainConfig(**rates, precision="float32", privacy=privacy),
                "adapter": AdapterConfig(rank=32, alpha=64.0),
                "evaluate": EvaluateConfig(batch_size=64),
                "federate": FederateConfig(rounds=2, min_nodes=3, audit_canaries=CANARIES),
            }
        )
        make_base(folder / "base", config)
        homes = {
            name: make_node(folder / name, config, raw_rows[number::3][:ROWS])
            for number, name in enumerate(NAMES)
        }
        yield Place(folder, config, Calm(homes))


def test_an_honest_federation_is_not_refuted_and_its_canaries_stay(place: Place) -> None:
    claim, check = place.train("honest")
    assert check.result == "pass", check.reason
    assert (claim.epsilon, claim.nodes, claim.left_out) == (0.5, list(NAMES), {})
    assert claim.guesses is not None and claim.guesses.canaries == CANARIES * len(NAMES)
    assert "ε = 0.5, δ = 1e-05" in check.reason and "canaries of 3 nodes" in check.reason
    assert claim.moved > 0
    heard = b"".join(reply for _, _, reply in place.link.replies if isinstance(reply, bytes))
    chat, seen = ChatFormat(load_tokenizer(place.folder / "base")), set()
    for name in NAMES:
        node = place.folder / name / NODE
        (run,) = (node / "work").glob("*-canaries")
        coins = keep_drawn(run).coins
        rows = {
            tuple(row.input_ids) for row in rows_apart(read_windows(node / "planted/tokenized/train.arrow"))
        }
        assert [tuple(chat.encode(one.row()).ids) in rows for one, _ in coins] == [coin for _, coin in coins]
        assert 8 < sum(coin for _, coin in coins) < 32
        for canary, _ in coins:
            seen.add(canary.name)
            assert canary.name.encode() not in heard and canary.secret.encode() not in heard
        assert (run / DRAWN).stat().st_mode & 0o777 == 0o600
    assert len(seen) > 0.9 * CANARIES * len(NAMES), "each node has other canaries"


def test_the_sum_under_masks_is_that_of_the_counts(place: Place) -> None:
    candidate = place.folder / "honest/models/candidate"
    claim = msgspec.convert(read_json(place.folder / "honest/reports/train" / FILE), Claim)
    manifest = read_json(candidate / "manifest.json")
    run = manifest["federation"]["run"]
    params = {name: getattr(place.config, name).model_dump(mode="json") for name in SECTIONS}
    base = identity(place.folder / "base")
    asked = messages.Audit(
        run=run,
        base=base,
        adapter_config=read_json(candidate / "adapter_config.json"),
        record=manifest["adapter"],
        max_length=manifest["max_length"],
        batch_size=64,
        masked=True,
        round=4,
    )
    plan = Plan(run, params, base, {}, 2.0, place.config.federate)
    found = audit_at_nodes(
        place.link, place.folder / "masked", plan, asked, load_file(candidate / "adapter_model.safetensors")
    )
    assert (found.guesses, found.nodes, found.left_out) == (claim.guesses, list(NAMES), {})
    said = [
        message
        for _, name, reply in place.link.replies[-15:]
        if name.endswith("-audit") and isinstance(reply, bytes)
        for message in [messages.read_reply(reply).header]
    ]
    assert [message.guesses for message in said] == [None] * 3


@pytest.mark.parametrize(("noise", "result"), [(True, "pass"), (False, "fail")])
def test_without_its_noise_the_same_training_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, *, noise: bool, result: str
) -> None:
    if not noise:
        monkeypatch.setattr(gradients, "normal", lambda key, number, count, part=0: np.zeros(count))
    claim, check = place.alone(60).train(f"noise-{noise}")
    assert check.result == result, check.reason
    assert ("the claim is refuted" in check.reason) == (not noise)
    assert claim.nodes == ["north"]


def test_a_node_that_planted_nothing_makes_no_audit(place: Place) -> None:
    """Its reason is told, and a claim that nobody tested is not believed."""
    asked = messages.Audit(run="another", base={}, adapter_config={}, record={}, max_length=96, batch_size=8)
    plan = Plan("another", {}, {}, {}, 2.0, place.config.federate)
    found = audit_at_nodes(place.link, place.folder / "another", plan, asked, {})
    assert found.guesses is None and found.nodes == []
    assert set(found.left_out) == set(NAMES)
    assert "planted no canaries in another" in found.left_out["north"]
