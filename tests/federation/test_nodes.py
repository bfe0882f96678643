"""Nodes with rows of their own train with the real stages, and give away nothing but what was asked for."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest
import torch
from parties import Direct, join, make_node
from patience import scaled
from safetensors.torch import load_file

from ratchet.config.base import Section
from ratchet.config.params import Config
from ratchet.config.training import BaseConfig, PrivacyConfig
from ratchet.errors import UserError
from ratchet.evaluation.node_scores import ALL
from ratchet.federation import messages
from ratchet.federation.aggregation import Aggregate
from ratchet.federation.messages import write_message
from ratchet.federation.node import handle, identity
from ratchet.federation.records import NODE, read_own_scores, read_rounds
from ratchet.federation.rounds import Plan, run_rounds, score_at_nodes
from ratchet.federation.state import state_tensors
from ratchet.files import read_json
from ratchet.models.adapters import load_trainable, save_trained
from tasks.base import make_base
from tasks.federate import SECTIONS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SECRET = "Zanzibar quicksilver"


class World(NamedTuple):
    folder: Path
    config: Config
    base: Path
    start: Aggregate
    link: Direct

    def plan(self, run: str = "run", **settings: Any) -> Plan:
        params = {name: getattr(self.config, name).model_dump(mode="json") for name in SECTIONS}
        described = read_json(self.folder / "start/adapter_config.json")
        federate = self.config.federate.model_copy(update={"rounds": 2, **settings})
        return Plan(run, params, identity(self.base), described, 2.0, federate)


def put(section: Section, **values: Any) -> Any:
    return section.model_copy(update=values)


@pytest.fixture(scope="module")
def world(tiny_config: Config, tiny_base: Path, raw_rows: list[dict[str, Any]]) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="ratchet-federation-") as scratch:
        folder = Path(scratch)
        config = put(
            tiny_config,
            base=BaseConfig(model=str(tiny_base)),
            prepare=put(tiny_config.prepare, test_share=0.0),
            train=put(tiny_config.train, checkpoint_minutes=0.0),
        )
        base = folder / "base"
        make_base(base, config)
        model = load_trainable(base, None, config.adapter, seed=config.train.seed)
        save_trained(model, base, folder / "start")
        weights = load_file(folder / "start/adapter_model.safetensors")
        planted = {
            "messages": [
                {"role": "user", "content": f"Where does {SECRET} stand in the list of metals?"},
                {"role": "assistant", "content": f"{SECRET} is a fluid one."},
            ]
        }
        nodes = {
            name: make_node(folder / name, config, [*raw_rows[place::3][:70], planted])
            for place, name in enumerate(("north", "south"))
        }
        yield World(folder, config, base, Aggregate(weights, {}), Direct(nodes))


def test_two_nodes_train_in_rounds_and_no_row_travels(world: World):
    found, records = run_rounds(world.link, world.folder / "runs", world.start, world.plan(), print)
    assert [[part.name for part in record.nodes] for record in records] == [["north", "south"]] * 2
    assert not any(record.left_out for record in records)
    assert found.residual.keys() == {
        name.removesuffix(".lora_A.weight") for name in world.start.adapter if "_A" in name
    }
    losses = [record.validation_loss for record in records]
    assert losses[0] is not None and losses[1] is not None and losses[1] < losses[0]
    kept = b"".join(path.read_bytes() for path in (world.folder / "runs").rglob("*") if path.is_file())
    said = b"".join(reply for _, _, reply in world.link.replies if isinstance(reply, bytes))
    for word in SECRET.split():
        assert (
            word.encode() not in kept + said
            and word.encode() in (world.folder / "north/data/raw").rglob("*.jsonl").__next__().read_bytes()
        )
    done = read_rounds(world.link.roots["north"])
    assert [(one.run, one.round) for one in done] == [("run", 1), ("run", 2)]


def test_nodes_train_on_a_base_in_four_bits_beside_what_two_factors_cannot_hold(
    world: World, raw_rows: list[dict[str, Any]]
):
    """The second round trains a new adapter beside the frozen one, on weights that are quantised."""
    four_bits = put(world.config, adapter=put(world.config.adapter, method="qlora"))
    base = world.folder / "four-bits"
    make_base(base, four_bits)
    nodes = {
        name: make_node(world.folder / name, four_bits, raw_rows[place::3][:60])
        for place, name in enumerate(("far", "near"))
    }
    one = world._replace(config=four_bits, base=base)
    found, records = run_rounds(
        Direct(nodes), world.folder / "four-bits-runs", world.start, one.plan("four"), print
    )
    assert [len(record.nodes) for record in records] == [2, 2] and found.residual
    losses = [record.validation_loss for record in records]
    assert losses[0] is not None and losses[1] is not None and losses[1] < losses[0]


def request(world: World, run: str, **changes: Any) -> bytes:
    plan = world.plan(run)
    asked = messages.Train(
        run=run,
        round=1,
        params={**plan.params, "train": {**plan.params["train"], "factors": "both"}},
        base=plan.base,
        adapter_config=plan.adapter_config,
        scale=plan.scale,
    )
    return write_message(msgspec.structs.replace(asked, **changes), state_tensors(world.start))


def test_one_node_is_central_training_byte_for_byte(world: World):
    reply = world.link.call(world.link.roots["north"], request(world, "alone"))
    assert isinstance(reply, bytes)
    learned = messages.read_reply(reply).tensors
    work, out = world.link.roots["north"] / NODE, world.folder / "central"
    paths = {"tokens": work / "tokenized", "base": work / "base", "incumbent": work / "nobody"}
    paths |= {"out": out / "candidate", "reports": out / "reports"}
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    done = subprocess.run(
        [sys.executable, "-m", "tasks.train", "--params", str(work / "params.yaml"), *flags],
        env=os.environ | {"RATCHET_ROOT": str(out)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    central = load_file(out / "candidate/adapter_model.safetensors")
    assert central.keys() == learned.keys()
    assert all(torch.equal(central[name], learned[name]) for name in central)


def test_a_node_killed_in_a_training_ends_in_the_same_bytes(world: World):
    """The coordinator asks again; the training goes on from its checkpoint."""
    root = world.link.roots["south"]
    whole = world.link.call(root, request(world, "whole"))
    asked, reply = root / NODE / "request", root / NODE / "reply"
    asked.write_bytes(request(world, "killed"))
    reply.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "ratchet.federation.node", str(asked), str(reply)],
        cwd=root,
        start_new_session=True,
    )
    checkpoints = root / NODE / ".ratchet/checkpoints"
    until = time.monotonic() + scaled(120)
    while not list(checkpoints.glob("*/step-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not reply.exists()
    again = world.link.call(root, request(world, "killed"))
    assert isinstance(whole, bytes) and isinstance(again, bytes)
    one, other = messages.read_reply(whole).tensors, messages.read_reply(again).tensors
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "goes on from the checkpoint" in world.link.log
    before = len(read_rounds(root))
    assert handle(root, request(world, "killed")) == again  # asked a third time, it only repeats itself
    assert len(read_rounds(root)) == before
    # As if it was killed before it kept its reply: the round that it repeats is not one more of today.
    shutil.rmtree(root / NODE / "replies")
    join(root, rounds_a_day=before)
    repeated = world.link.call(root, request(world, "killed"))
    join(root)
    assert isinstance(repeated, bytes) and len(read_rounds(root)) == before
    other = messages.read_reply(repeated).tensors
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_old_request_is_answered_from_memory_or_refused(world: World):
    root = world.link.roots["north"]
    old = world.link.call(root, request(world, "old"))
    new = world.link.call(root, request(world, "new"))
    kept, took_part = sorted((root / NODE / "replies").iterdir()), read_rounds(root)
    assert handle(root, request(world, "old")) == old
    (reply,) = (path for path in kept if path.read_bytes() == old)
    reply.unlink()  # as after a week
    assert "took part in round 1 of old before" in reason(world, root, request(world, "old"))
    assert (root / NODE / "work/new-1").exists()  # another run's files are left alone
    assert handle(root, request(world, "new")) == new and read_rounds(root) == took_part


def test_a_node_trains_once_when_it_is_asked_twice(world: World, tmp_path: Path):
    """The command is killed, and the training that it started goes on: the next command waits for it."""
    root, asked = world.link.roots["north"], tmp_path / "request"
    asked.write_bytes(request(world, "twice"))
    commands, trainings = [], []
    for number in range(3):
        command = [sys.executable, "-m", "ratchet.federation.node", str(asked), str(tmp_path / f"{number}")]
        commands.append(psutil.Popen(command, cwd=root))
        if number == 0:
            trainings = wait_for_training(commands[0])
            commands[0].kill()
    while trainings[0].is_running() and trainings[0].status() != psutil.STATUS_ZOMBIE:
        assert not any("tasks.train" in " ".join(line) for line in lines_below(commands[1:]))
        time.sleep(0.05)
    assert [command.wait(scaled(120)) for command in commands] == [-signal.SIGKILL, 0, 0]
    assert not (tmp_path / "0").exists()
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert [done.run for done in read_rounds(root)].count("twice") == 1


def wait_for_training(command: psutil.Popen) -> list[psutil.Process]:
    until = time.monotonic() + scaled(120)
    while time.monotonic() < until and command.poll() is None:
        for child in command.children():
            with contextlib.suppress(psutil.Error):
                if "tasks.train" in child.cmdline():
                    return [child]
        time.sleep(0.05)
    raise AssertionError("no training began")


def lines_below(commands: list[psutil.Popen]) -> Iterator[list[str]]:
    for command in commands:
        with contextlib.suppress(psutil.Error):
            for child in command.children(recursive=True):
                yield child.cmdline()


def reason(world: World, root: Path, data: bytes) -> str:
    header = messages.read_reply(handle(root, data)).header
    assert isinstance(header, messages.Refused)
    return header.reason


def test_a_node_refuses_another_base_and_keeps_its_limits(world: World):
    root = world.link.roots["north"]
    other = {**identity(world.base), "revision": "0" * 40}
    assert "its revision is None, the coordinator's 0000" in reason(
        world, root, request(world, "x", base=other)
    )
    join(root, rounds_a_day=1)
    assert "takes part in 1 rounds a day" in reason(world, root, request(world, "y"))
    hour = dt.datetime.now().hour
    join(root, hours=f"{(hour + 2) % 24}-{(hour + 3) % 24}")
    assert "trains between" in reason(world, root, request(world, "z"))
    join(root)


def test_what_goes_wrong_in_a_stage_is_told_in_the_nodes_log_alone(
    world: World, raw_rows: list[dict[str, Any]]
):
    config = put(world.config, prepare=put(world.config.prepare, min_rows=1000))
    root = make_node(world.folder / "east", config, raw_rows[:50])
    link = Direct({"east": root})
    with pytest.raises(UserError, match="the stage prepare ended with code 2; this node's log says why"):
        run_rounds(link, world.folder / "east-runs", world.start, world.plan(min_nodes=1), print)
    assert "min_rows" in link.log


def test_rounds_share_an_epsilon_and_a_spent_budget_is_refused(world: World, raw_rows: list[dict[str, Any]]):
    """Both rounds together spend what is asked for; then these rows have none left."""
    pytest.importorskip("opacus")
    privacy = {"epsilon": 8.0, "delta": 1e-3, "batch_rows": 16, "max_grad_norm": 1.0, "trainings": 2}
    asked = put(world.config, train=put(world.config.train, privacy=PrivacyConfig(**privacy)))
    root = make_node(world.folder / "west", world.config, raw_rows[1::3][:60], epsilon=9.0)
    link = Direct({"west": root})
    one = world._replace(config=asked)
    found, records = run_rounds(
        link, world.folder / "private", world.start, one.plan("p1", min_nodes=1), print
    )
    spent = [record.nodes[0].epsilon for record in records]
    assert spent[0] is not None and spent[1] is not None and 0 < spent[0] < spent[1] <= 8.0
    assert records[0].moved > 0 and found.adapter.keys() == world.start.adapter.keys()
    with pytest.raises(UserError, match="the stage train ended with code 2"):
        run_rounds(link, world.folder / "again", world.start, one.plan("p2", min_nodes=1), print)
    assert "would overspend the privacy" in link.log
    join(root, epsilon=1.0)
    with pytest.raises(
        UserError, match="this node's rows may spend ε = 1 at most, and the coordinator asks for 8"
    ):
        run_rounds(link, world.folder / "less", world.start, one.plan("p3", min_nodes=1), print)


def test_nodes_score_their_own_rows_and_send_sums(world: World, raw_rows: list[dict[str, Any]]):
    """An adapter whose B is zero answers as the base does, so every difference is zero."""
    config = put(world.config, prepare=put(world.config.prepare, test_share=0.3))
    root = make_node(world.folder / "held", config, raw_rows[2::3][:80])
    plan, described = world.plan("scored"), read_json(world.folder / "start/adapter_config.json")
    asked = messages.Score(
        run="scored",
        params={**plan.params, "evaluate": world.config.evaluate.model_dump(mode="json")},
        base=plan.base,
        adapters={"candidate": described},
        records={"candidate": world.config.adapter.model_dump(mode="json")},
        max_length=96,
        metric="answer_nll",
        least=5,
    )
    tensors = {f"candidate:{name}": tensor for name, tensor in world.start.adapter.items()}
    link = Direct({"held": root})
    found = score_at_nodes(link, world.folder / "scores", plan, asked, tensors)
    assert not found.left_out, (found.left_out, link.log)
    sums = found.nodes["held"][ALL]
    assert found.rival == "base" and 10 <= sums.rows <= 40
    assert sums.candidate < 0 and sums.candidate == pytest.approx(sums.rival)
    assert sums.difference == pytest.approx(0, abs=1e-6) and sums.square == pytest.approx(0, abs=1e-6)
    own = read_own_scores(root)
    assert own is not None and (own.run, own.rival, own.rows) == ("scored", "base", sums.rows)
    assert own.before == pytest.approx(own.after) and own.after == pytest.approx(-sums.candidate / sums.rows)
    more = msgspec.structs.replace(asked, run="few", least=1000)
    few = score_at_nodes(link, world.folder / "few", plan, more, tensors)
    assert few.nodes == {} and few.left_out == {"held": "it has fewer than 1000 held-out rows"}
