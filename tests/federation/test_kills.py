"""Kill a node before each write of each step of a secure sum, and the coordinator before each file of a run.

Started again, all goes on as if nothing had happened: the same integers, nobody left out, one answer a step.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import stopped
from stopped import Stop
from test_rounds import ROWS, SECURE, Crafted, Scoring, adapter, asked_for_scores, plan, quiet

from ratchet.errors import UserError
from ratchet.evaluation.node_scores import ALL, Sums
from ratchet.federation import masking, messages, node
from ratchet.federation.aggregation import Aggregate
from ratchet.federation.link import flower
from ratchet.federation.link.flower import FOLDER, FlowerLink
from ratchet.federation.messages import read_request
from ratchet.federation.records import NODE
from ratchet.federation.rounds import NODES, STATE, Plan, run_rounds, score_at_nodes
from ratchet.federation.secure import Sum
from ratchet.federation.state import read_state, write_state
from ratchet.files import read_json, write_bytes, write_json

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
STEPS = ("keys", "deal", "mask", "reveal")
VECTORS = {name: np.random.default_rng(place).normal(size=40) for place, name in enumerate("abc")}


def reply_into(root: Path, request: bytes, path: Path) -> None:
    """Do what the node's command does: path's existence is what leaves the node."""
    write_bytes(path, [node.handle(root, request)])


class Killed:
    """Three nodes with a vector each, of which b is killed before a write of one step, and starts again."""

    def __init__(self, folder: Path, step: str, moment: int) -> None:
        self.folder, self.step, self.moment = folder, step, moment
        self.changes: list[str] | None = None
        for name, vector in VECTORS.items():
            home = folder / name / NODE / "work/run-1"
            home.mkdir(parents=True)
            write_bytes(home / node.WORDS, [vector.tobytes()])

    def ask(self, requests: Mapping[str, bytes], step: str) -> dict[str, bytes | str]:
        return {
            name: self._struck(name, request)
            if (name, step) == ("b", self.step)
            else node.handle(self.folder / name, request)
            for name, request in requests.items()
        }

    def _struck(self, name: str, request: bytes) -> bytes:
        root, left = self.folder / name, self.folder / name / "reply"
        task = partial(reply_into, root, request, left)
        self.changes = stopped.run(task, Stop(root, self.moment))
        sent = left.read_bytes() if left.exists() else None
        reply = node.handle(root, request)
        assert sent in (None, reply)
        shutil.rmtree(root / NODE / "replies")
        assert node.handle(root, request) == reply
        return reply


@pytest.mark.parametrize("step", STEPS)
def test_a_node_killed_before_any_write_of_a_sum_gives_its_part(tmp_path: Path, step: str) -> None:
    summed = np.sum([masking.encode(vector, 3) for vector in VECTORS.values()], axis=0, dtype=np.uint64)
    moment, changes = 0, None
    while changes is None:
        moment += 1
        nodes = Killed(tmp_path / str(moment), step, moment)
        sum_ = Sum("run", 1, "first", nodes.ask, 3, {name: name for name in VECTORS})
        values, names = sum_.total(sorted(VECTORS), 40)
        assert (names, sum_.left_out) == (["a", "b", "c"], {}), moment
        assert np.array_equal(values, masking.decode(summed)), moment
        changes = nodes.changes
    renamed = [change.split()[1] for change in changes if change.startswith("os.rename")]
    kept = [path.name for path in (tmp_path / f"{moment}/b" / NODE / "replies").iterdir()]
    assert renamed[0] == "member.json" and renamed[1] in kept and renamed[2:] == ["reply"]
    assert moment == len(changes) + 1 > 8


# --- a sum that failed ---


def refusing(data: bytes) -> bytes:
    return messages.write_message(messages.Refused("full disk"))


class Failing(Scoring):
    """Of five nodes some are away from a step on, until they are started again."""

    def __init__(self, folder: Path, away: Mapping[str, str]) -> None:
        super().__init__(folder, {})
        self.rows, self.away = {**ROWS, "d": 20, "e": 1}, dict(away)


@pytest.mark.parametrize("step", ["train", *STEPS])
def test_a_round_that_too_few_nodes_went_through_is_summed_when_they_are_back(
    tmp_path: Path, step: str
) -> None:
    start, settings = Aggregate(adapter(1), {}), plan(rounds=1, **SECURE)
    whole, _ = run_rounds(Failing(tmp_path / "1", {}), tmp_path / "whole", start, settings, quiet)
    link = Failing(tmp_path / "2", dict.fromkeys("cde", step))
    wanted = r"updates of 2 nodes" if step == "train" else "updates of 2 nodes|2 nodes gave their shares"
    with pytest.raises(UserError, match=wanted):
        run_rounds(link, tmp_path / "again", start, settings, quiet)
    link.away = {}
    found, (record,) = run_rounds(link, tmp_path / "again", start, settings, quiet)
    assert (len(record.nodes), record.left_out, record.rows) == (5, {}, 66)
    assert all((found.adapter[name] == whole.adapter[name]).all() for name in whole.adapter)


# --- the coordinator ---

SUMS = {
    "a": Sums(30, 20.0, 14.0, 6.0, 8.0),
    "b": Sums(9, 3.5, 4.25, -0.75, 0.8125),
    "c": Sums(51, 40.0, 30.0, 10.0, 12.0),
}


class Plain(Crafted):
    """Nodes without masks, whose scores are given."""

    def trained(self, name: str, request: bytes) -> bytes:
        if isinstance(read_request(request).header, messages.Score):
            return messages.write_message(messages.Scored({ALL: SUMS[name]}))
        return super().trained(name, request)


def coordinate(root: Path, plan: Plan) -> None:
    """Run the rounds and compare, as `tasks.federate` does; what comes out is in files."""
    flower.POLL = 0.01
    link, start = FlowerLink(root), read_state(root / "start")
    run_rounds(link, root / "run", start, plan, quiet)
    asked = msgspec.structs.replace(asked_for_scores(), masked=plan.settings.secure)
    scores = score_at_nodes(link, root / "run/scores", plan, asked, {})
    write_json(root / "run/found.json", msgspec.to_builtins(scores))


@contextmanager
def relayed(root: Path, nodes: Crafted) -> Iterator[None]:
    """Answer what a coordinator leaves in the folder of its relay, as `relay.py` does with Flower."""
    exchange, ended = root / FOLDER / "exchange", threading.Event()
    write_json(root / FOLDER / "nodes.json", nodes.nodes())
    write_json(exchange / NODES, sorted(nodes.nodes()))

    def relay() -> None:
        while not ended.wait(0.01):
            (exchange / "alive").touch()
            for asked in sorted(exchange.glob("ask-*/request.json")):
                if not (asked.parent / "done").exists():
                    for path in sorted(asked.parent.glob("*.request")):
                        reply = nodes.answer(nodes.nodes()[path.stem], path.read_bytes())
                        write_bytes(path.with_suffix(".reply"), [reply])
                    (asked.parent / "done").touch()

    thread = threading.Thread(target=relay)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["plain", "secure"])
def test_a_coordinator_killed_before_any_file_goes_on_to_the_same_bytes(tmp_path: Path, kind: str) -> None:
    secure = kind == "secure"
    rounds = 1 if secure else 2
    settings = plan(rounds=rounds, **(SECURE if secure else {"min_nodes": 3}))
    moment, changes, found = 0, None, set()
    while changes is None:
        moment += 1
        root = tmp_path / str(moment)
        write_state(root / "start", Aggregate(adapter(1), {}))
        with relayed(root, Scoring(root / "nodes", SUMS) if secure else Plain()):
            task = partial(coordinate, root, settings)
            changes = stopped.run(task, Stop(root, moment, {"os.rename"}))
            if changes is None:
                assert stopped.run(task, Stop(root, 0)) is not None
        scores = read_json(root / "run/found.json")
        assert not scores["left_out"] and (scores["summed"] if secure else scores["nodes"])
        found.add(
            (root / f"run/round-{rounds}" / STATE).read_bytes() + (root / "run/found.json").read_bytes()
        )
        assert all(
            not read_json(root / f"run/round-{number}/round.json")["left_out"]
            for number in range(1, rounds + 1)
        )
    assert len(found) == 1
    assert moment == len(changes) + 1 > (35 if secure else 15)
