"""Rounds: what nodes send is checked, aggregated exactly, and a killed coordinator goes on where it was."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from ratchet.config.federation import FederateConfig
from ratchet.errors import UserError
from ratchet.evaluation.node_scores import ALL, Sums, add
from ratchet.federation import messages, node
from ratchet.federation.aggregation import DOWN, UP, Aggregate, fold, layers_of
from ratchet.federation.masking import encode
from ratchet.federation.messages import Trained, read_request, write_message
from ratchet.federation.records import NODE
from ratchet.federation.rounds import Plan, run_rounds, score_at_nodes
from ratchet.federation.secure import SharesWrong, words_of
from ratchet.federation.state import GLOBAL, KEPT, read_state, split, state_tensors, updates_of, write_state
from ratchet.files import write_bytes

ROWS = {"a": 10, "b": 30, "c": 5}
LAYERS = ("q", "v")


def quiet(line: str) -> None:
    """Nobody listens."""


def adapter(seed: int, rank: int = 2) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {
        f"{layer}{part}": torch.randn(shape, generator=chance)
        for layer in LAYERS
        for part, shape in ((UP, (6, rank)), (DOWN, (rank, 5)))
    }


def plan(**settings: Any) -> Plan:
    return Plan("run", {"train": {"factors": "both"}}, {}, {}, 2.0, FederateConfig(**settings))


class Crafted:
    """Nodes whose training is a function of the global adapter, of the node, and of the round."""

    def __init__(self, rows: Mapping[str, int] = ROWS) -> None:
        self.rows = dict(rows)
        self.asked: list[str] = []
        self.forgotten: list[str] = []
        self.instead: dict[str, Callable[[bytes], bytes | str]] = {}

    def nodes(self) -> dict[str, str]:
        return {str(number): name for number, name in enumerate(sorted(self.rows), start=1)}

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        self.asked.append(name)
        return {number: self.answer(self.nodes()[number], request) for number, request in requests.items()}

    def forget(self, name: str) -> None:
        self.forgotten.append(name)

    def answer(self, name: str, request: bytes) -> bytes | str:
        return self.instead.get(name, lambda data: self.trained(name, data))(request)

    def learn(self, name: str, number: int, start: dict[str, Tensor], factors: str) -> dict[str, Tensor]:
        seed = 100 * number + ord(name[0])
        change = adapter(seed)
        frozen = {"up": DOWN, "down": UP}.get(factors, "\0")
        return {
            key: weight if key.endswith(frozen) else weight + 0.1 * change[key]
            for key, weight in start.items()
        }

    def trained(self, name: str, request: bytes) -> bytes:
        asked, tensors = read_request(request)
        start = {key.removeprefix(GLOBAL): value for key, value in tensors.items() if key.startswith(GLOBAL)}
        learned = self.learn(name, asked.round, start, asked.params["train"]["factors"])
        return write_message(self.header(name), learned)

    def header(self, name: str) -> Trained:
        return Trained(
            rows=self.rows[name],
            steps=3,
            learned_tokens=50,
            seconds=1.0,
            train_loss=2.0,
            validation_loss=1.5,
        )


def dense(aggregate: Aggregate) -> dict[str, Tensor]:
    return {layer: update.dense() for layer, update in updates_of(aggregate).items()}


def test_the_mean_of_the_updates_is_exact_over_rounds(tmp_path):
    """Each node's update of a round is its B·A beside the residual that all got."""
    link, start = Crafted(), Aggregate(adapter(1), {})
    found, records = run_rounds(link, tmp_path, start, plan(rounds=3), quiet)
    total, before = sum(ROWS.values()), start
    for number in (1, 2, 3):
        after = read_state(tmp_path / f"round-{number}/global.safetensors")
        for layer in LAYERS:
            wanted = torch.zeros(6, 5, dtype=torch.float64)
            for name, rows in ROWS.items():
                learned = link.learn(name, number, before.adapter, "both")
                wanted += rows / total * (learned[layer + UP].double() @ learned[layer + DOWN].double())
            if layer in before.residual:
                wanted += before.residual[layer].dense()
            assert torch.allclose(dense(after)[layer], wanted, atol=1e-6, rtol=0)
        before = after
    assert dense(found).keys() == dense(before).keys() and found.residual.keys() == set(LAYERS)
    whole = fold(found, 512)
    assert whole.missing < 1e-6 and whole.rank > 2
    assert [record.rows for record in records] == [45] * 3
    assert [part.name for part in records[0].nodes] == ["a", "b", "c"]
    assert records[0].moved > 0 and records[0].received_bytes > 0


def test_nodes_get_the_residual_that_is_kept(tmp_path):
    link, seen = Crafted(), []
    original = link.trained

    def look(name: str, data: bytes) -> bytes:
        seen.append(read_request(data).tensors)
        return original(name, data)

    link.trained = look
    run_rounds(link, tmp_path, Aggregate(adapter(1), {}), plan(rounds=2), quiet)
    first, second = seen[0], seen[-1]
    assert not any(name.startswith(KEPT) for name in first)
    kept = read_state(tmp_path / "round-1/global.safetensors").residual
    for layer in LAYERS:
        sent = second[f"{KEPT}{layer}{UP}"].double() @ second[f"{KEPT}{layer}{DOWN}"].double()
        assert torch.allclose(sent, kept[layer].dense(), atol=1e-6)


def test_one_node_gives_its_own_adapter_to_the_bit(tmp_path):
    link, start = Crafted({"a": 7}), Aggregate(adapter(1), {})
    found, _ = run_rounds(link, tmp_path, start, plan(rounds=1, min_nodes=1), quiet)
    learned = link.learn("a", 1, start.adapter, "both")
    assert not found.residual and all(torch.equal(found.adapter[name], learned[name]) for name in learned)


def replace(**changes: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, **changes}


NAN = torch.full((6, 2), float("nan"))
FAULTS: dict[str, tuple[Callable[[Crafted], Callable[[bytes], bytes | str]], str]] = {
    "away": (lambda link: lambda data: "no reply within 60 s", "no reply within 60 s"),
    "garbage": (lambda link: lambda data: b"\x80\x04garbage", "cannot be read"),
    "refusing": (lambda link: lambda data: write_message(messages.Refused("another base")), "another base"),
    "another answer": (lambda link: lambda data: write_message(messages.Masked()), "Masked"),
    "no rows": (
        lambda link: (
            lambda data: write_message(
                Trained(rows=0, steps=0, learned_tokens=0, seconds=0, train_loss=0.0, validation_loss=None)
            )
        ),
        "0 rows",
    ),
    "nan": (
        lambda link: lambda data: write_message(link.header("c"), {**adapter(1), f"q{UP}": NAN}),
        "not finite",
    ),
    "nan loss": (
        lambda link: lambda data: link.trained("c", data).replace(b"2.0", b"nan"),
        "cannot be read|loss of nan",
    ),
    "other shape": (
        lambda link: lambda data: write_message(link.header("c"), adapter(1, rank=3)),
        r"wanted \(2, 5\)|wanted \(6, 2\)",
    ),
    "other weights": (lambda link: lambda data: write_message(link.header("c"), {}), "other weights"),
    "too long": (
        lambda link: (
            lambda data: write_message(
                link.header("c"), {name: 1e3 * weight for name, weight in adapter(1).items()}
            )
        ),
        "times the median",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_that_sends_something_else_is_named_and_left_out(tmp_path, fault):
    link, (make, told) = Crafted(), FAULTS[fault]
    link.instead["c"] = make(link)
    start = Aggregate(adapter(1), {})
    found, (record,) = run_rounds(link, tmp_path, start, plan(rounds=1), quiet)
    import re

    assert list(record.left_out) == ["c"] and re.search(told, record.left_out["c"])
    assert [part.name for part in record.nodes] == ["a", "b"]
    honest, _ = run_rounds(Crafted({"a": 10, "b": 30}), tmp_path / "honest", start, plan(rounds=1), quiet)
    assert all(torch.equal(dense(found)[layer], dense(honest)[layer]) for layer in LAYERS)


def test_too_few_nodes_end_the_run_and_leave_no_round(tmp_path):
    link = Crafted()
    link.instead = {name: lambda data: write_message(messages.Refused("full disk")) for name in "bc"}
    with pytest.raises(UserError, match=r"updates of 1 nodes.*b: it refused: full disk") as told:
        run_rounds(link, tmp_path, Aggregate(adapter(1), {}), plan(rounds=1), quiet)
    assert "the champion stays" in told.value.remedy
    assert not (tmp_path / "round-1/round.json").exists()
    link.instead = {}
    run_rounds(link, tmp_path, Aggregate(adapter(1), {}), plan(rounds=1), quiet)
    assert link.forgotten == ["run-1-"] and link.asked == ["run-1-train"] * 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(3))
def test_a_killed_coordinator_goes_on_to_the_same_bytes(tmp_path, moment):
    start, settings = Aggregate(adapter(1), {}), plan(rounds=3)
    run_rounds(Crafted(), tmp_path / "whole", start, settings, quiet)
    link = Crafted()
    ask = link.ask

    def die(requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        if len(link.asked) == moment:
            link.ask = ask
            raise Killed
        return ask(requests, seconds, name)

    link.ask = die
    with pytest.raises(Killed):
        run_rounds(link, tmp_path / "killed", start, settings, quiet)
    run_rounds(link, tmp_path / "killed", start, settings, quiet)
    assert link.asked == ["run-1-train", "run-2-train", "run-3-train"]
    one, other = (
        (tmp_path / name / "round-3/global.safetensors").read_bytes() for name in ("whole", "killed")
    )
    assert one == other


def test_alternate_rounds_are_exact_without_a_residual(tmp_path):
    link, start = Crafted(), Aggregate(adapter(1), {})
    found, records = run_rounds(link, tmp_path, start, plan(rounds=2, aggregation="alternate"), quiet)
    assert [record.factors for record in records] == ["up", "down"] and not found.residual
    first = read_state(tmp_path / "round-1/global.safetensors")
    assert torch.equal(first.adapter[f"q{DOWN}"], start.adapter[f"q{DOWN}"])
    assert torch.equal(found.adapter[f"q{UP}"], first.adapter[f"q{UP}"])
    for layer in LAYERS:
        learned = {name: link.learn(name, 2, first.adapter, "down") for name in ROWS}
        wanted = sum(
            rows / 45 * (learned[name][layer + UP].double() @ learned[name][layer + DOWN].double())
            for name, rows in ROWS.items()
        )
        assert torch.allclose(dense(found)[layer], wanted, atol=1e-6, rtol=0)


# --- secure aggregation ---


class Secure(Crafted):
    """Nodes that answer every step of the sum by the node's own code; their training is the crafted one."""

    def __init__(self, folder: Path, rows: Mapping[str, int]) -> None:
        super().__init__(rows)
        self.folder = folder
        self.received: list[bytes] = []
        self.said: list[tuple[str, bytes, bytes | str]] = []  # node, request, reply
        self.words: dict[str, np.ndarray[Any, Any]] = {}
        self.away: dict[str, str] = {}  # node → the step from which on it is away

    def ask(self, requests: Mapping[str, bytes], seconds: float, name: str) -> dict[str, bytes | str]:
        step = name.rpartition("-")[2]
        found = super().ask(requests, seconds, name)
        for number in requests:
            who = self.nodes()[number]
            if self.away.get(who) == step or f"{who}!" in self.away:
                self.away[f"{who}!"] = step
                found[number] = "no reply within 120 s"
            self.said.append((who, requests[number], found[number]))
        self.received += [reply for reply in found.values() if isinstance(reply, bytes)]
        return found

    def trained(self, name: str, request: bytes) -> bytes:
        asked, tensors = read_request(request)
        root = self.folder / name
        if not isinstance(asked, messages.Train):
            return node.handle(root, request)
        start = {key.removeprefix(GLOBAL): value for key, value in tensors.items()}
        factors = asked.params["train"]["factors"]
        learned = self.learn(name, asked.round, start, factors)
        self.words[name] = words_of(learned, start, self.rows[name], factors)
        home = root / NODE / "work" / f"{asked.run}-{asked.round}"
        home.mkdir(parents=True, exist_ok=True)
        write_bytes(home / "words.npy", [self.words[name].tobytes()])
        header = self.header(name)
        return write_message(
            Trained(
                rows=0,
                steps=header.steps,
                learned_tokens=0,
                seconds=1.0,
                train_loss=2.0,
                validation_loss=None,
            )
        )


SECURE = {"secure": True, "aggregation": "alternate", "min_nodes": 3}
MANY = {"a": 10, "b": 30, "c": 5, "d": 20, "e": 1}


def test_the_secure_sum_is_the_mean_and_shows_no_single_update(tmp_path):
    start = Aggregate(adapter(1), {})
    link = Secure(tmp_path / "nodes", ROWS)
    found, records = run_rounds(link, tmp_path / "secure", start, plan(rounds=2, **SECURE), quiet)
    plain, _ = run_rounds(
        Crafted(), tmp_path / "plain", start, plan(rounds=2, aggregation="alternate"), quiet
    )
    assert all(torch.allclose(found.adapter[name], plain.adapter[name], atol=1e-6) for name in found.adapter)
    assert [record.rows for record in records] == [45, 45]
    assert all(part.rows is None for record in records for part in record.nodes)
    everything = b"".join(link.received) + b"".join(
        path.read_bytes() for path in sorted((tmp_path / "secure").rglob("*")) if path.is_file()
    )
    for words in link.words.values():
        steps = encode(words, 3)
        for number in itertools.chain(words[:4], steps[:4]):
            assert number.tobytes() not in everything
    masked = [
        read.tensors["words"].numpy().view(np.uint64)
        for read in map(messages.read_reply, link.received)
        if isinstance(read.header, messages.Masked)
    ]
    assert len(masked) == 6
    # Of a masked vector each bit is as likely 0 as 1, so it says nothing without the masks.
    bits = np.unpackbits(np.concatenate(masked).view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.05


@pytest.mark.parametrize("step", ["train", "keys", "deal", "mask", "reveal"])
def test_a_node_that_drops_out_costs_its_own_update_alone(tmp_path, step):
    start = Aggregate(adapter(1), {})
    link = Secure(tmp_path / "nodes", MANY)
    link.away = {"b": step}
    found, (record,) = run_rounds(link, tmp_path / "secure", start, plan(rounds=1, **SECURE), quiet)
    rows = {name: count for name, count in MANY.items() if name != "b" or step == "reveal"}
    plain, _ = run_rounds(
        Crafted(rows), tmp_path / "plain", start, plan(rounds=1, aggregation="alternate"), quiet
    )
    assert record.rows == sum(rows.values()) and list(record.left_out) == ["b"]
    assert all(torch.allclose(found.adapter[name], plain.adapter[name], atol=1e-6) for name in found.adapter)


FALSE: dict[str, Callable[[Any], messages.Reply]] = {
    "keys": lambda said: msgspec.structs.replace(said, masks="00" * 32),
    "deal": lambda said: messages.Dealt(dict(list(said.letters.items())[1:])),
    "reveal": lambda said: messages.Revealed(said.keys, {9: "0x1"}),
}


@pytest.mark.parametrize("step", FALSE)
def test_a_node_that_sends_something_else_in_a_sum_is_left_out(tmp_path, step):
    class Lying(Secure):
        def trained(self, name: str, request: bytes) -> bytes:
            reply = super().trained(name, request)
            asked = type(read_request(request).header).__name__.lower()
            said = messages.read_reply(reply).header
            return write_message(FALSE[step](said)) if (name, asked) == ("b", step) else reply

    link = Lying(tmp_path / "nodes", MANY)
    _, (record,) = run_rounds(
        link, tmp_path / "secure", Aggregate(adapter(1), {}), plan(rounds=1, **SECURE), quiet
    )
    assert list(record.left_out) == ["b"] and record.left_out["b"].startswith(f"{step}: ")
    assert record.rows == sum(MANY.values()) - (MANY["b"] if step != "reveal" else 0)


class Scoring(Secure):
    """Their scores are given; they keep them for the sum, as `node._score` does."""

    def __init__(self, folder: Path, sums: Mapping[str, Sums]) -> None:
        super().__init__(folder, ROWS)
        self.sums = sums

    def trained(self, name: str, request: bytes) -> bytes:
        asked = read_request(request).header
        if not isinstance(asked, messages.Score):
            return super().trained(name, request)
        home = self.folder / name / NODE / "work" / f"{asked.run}-{asked.round}"
        home.mkdir(parents=True)
        write_bytes(home / node.WORDS, [np.array(msgspec.structs.astuple(self.sums[name])).tobytes()])
        return write_message(messages.Scored({}))


def asked_for_scores() -> messages.Score:
    return messages.Score(
        run="run",
        params={},
        base={},
        adapters={"candidate": {}, "champion": {}},
        records={},
        max_length=96,
        metric="exact_match",
        least=5,
        masked=True,
        round=3,
    )


def test_under_masks_the_sums_of_scores_are_those_over_all_nodes(tmp_path):
    sums = {
        "a": Sums(30, 20.0, 14.0, 6.0, 8.0),
        "b": Sums(9, 3.5, 4.25, -0.75, 0.8125),
        "c": Sums(51, 40.0, 30.0, 10.0, 12.0),
    }
    link = Scoring(tmp_path, sums)
    found = score_at_nodes(link, tmp_path / "scores", plan(**SECURE), asked_for_scores(), {})
    assert found.together == {ALL: add(list(sums.values()))} and found.rival == "champion"
    assert (found.nodes, found.names, found.count, found.left_out) == ({}, ["a", "b", "c"], 3, {})
    everything = b"".join(link.received)
    assert not any(np.float64(one.candidate).tobytes() in everything for one in sums.values())
    link = Scoring(tmp_path / "two", sums)
    link.away = {"b": "deal"}
    few = score_at_nodes(link, tmp_path / "few", plan(**SECURE), asked_for_scores(), {})
    assert few.together == {} and sorted(few.left_out) == ["a", "b", "c"]
    assert "round 3 has the updates of 2 nodes, wanted 3 (b: deal: no reply" in few.left_out["a"]


def test_too_many_that_drop_out_end_the_run(tmp_path):
    link = Secure(tmp_path / "nodes", ROWS)
    link.away = {"b": "mask"}
    with pytest.raises(UserError, match=r"updates of 2 nodes, wanted 3 \(b: mask: no reply"):
        run_rounds(link, tmp_path / "secure", Aggregate(adapter(1), {}), plan(rounds=1, **SECURE), quiet)


class Wrong(Secure):
    """One node adds 1 to a share that it gives."""

    def trained(self, name: str, request: bytes) -> bytes:
        reply = super().trained(name, request)
        if name != "b" or not isinstance(read_request(request).header, messages.Reveal):
            return reply
        shares = messages.read_reply(reply).header
        first = min(shares.seeds)
        wrong = {**shares.seeds, first: hex(int(shares.seeds[first], 16) + 1)}
        return write_message(messages.Revealed(shares.keys, wrong))


def test_a_wrong_share_ends_the_run_and_says_that_another_one_is_wanted(tmp_path):
    link = Wrong(tmp_path / "nodes", ROWS)
    with pytest.raises(SharesWrong, match=r"round 1: the sum holds .* no sum of nodes") as found:
        run_rounds(link, tmp_path / "secure", Aggregate(adapter(1), {}), plan(rounds=1, **SECURE), quiet)
    assert "begins another one" in found.value.remedy


def answer(root: Path, asked: messages.Request) -> Any:
    return messages.read_reply(node.handle(root, write_message(asked))).header


def test_a_node_gives_one_answer_to_each_step_and_shares_in_one_try(tmp_path):
    """Two vectors under one mask, or shares for two splits, would tell of a single update."""
    link = Secure(tmp_path / "nodes", ROWS)
    run_rounds(link, tmp_path / "secure", Aggregate(adapter(1), {}), plan(rounds=1, **SECURE), quiet)
    root = tmp_path / "nodes/a"
    keys, deal, mask, reveal = [read_request(asked).header for who, asked, _ in link.said if who == "a"][1:]
    for asked, told in (
        (msgspec.structs.replace(keys, place=2), "gave its keys of this try before"),
        (msgspec.structs.replace(keys, threshold=3), "gave its keys of this try before"),
        (msgspec.structs.replace(keys, attempt="another"), "in an earlier try"),
        (msgspec.structs.replace(keys, run="other"), "trained nothing"),
        (msgspec.structs.replace(deal, attempt="another"), "no keys of this try"),
        (msgspec.structs.replace(deal, publics={1: deal.publics[1]}), "could not be answered"),
        (msgspec.structs.replace(mask, letters={2: mask.letters[2]}), "could not be answered"),
        (msgspec.structs.replace(reveal, sent=[1, 2], dropped=[3]), "could not be answered"),
    ):
        reply = answer(root, asked)
        assert isinstance(reply, messages.Refused) and told in reply.reason, asked
    words = root / NODE / f"work/{keys.run}-1/words.npy"
    before = answer(root, mask)
    shutil.rmtree(root / NODE / "replies")
    assert answer(root, mask) == before
    shutil.rmtree(root / NODE / "replies")
    write_bytes(words, [(2 * np.frombuffer(words.read_bytes())).tobytes()])  # as if it was trained again
    assert isinstance(answer(root, mask), messages.Refused)


def test_a_replayed_step_of_a_sum_tells_nothing_new(tmp_path):
    """An old request gets the old bytes, from its reply or from the keys; without both it gets none."""
    link = Secure(tmp_path / "nodes", ROWS)
    run_rounds(link, tmp_path / "secure", Aggregate(adapter(1), {}), plan(rounds=1, **SECURE), quiet)
    root = tmp_path / "nodes/a"
    steps = [(asked, reply) for who, asked, reply in link.said if who == "a"][1:]
    assert [type(read_request(asked).header).__name__ for asked, _ in steps] == [
        "Keys",
        "Deal",
        "Mask",
        "Reveal",
    ]
    assert all(node.handle(root, asked) == reply for asked, reply in steps)
    shutil.rmtree(root / NODE / "replies")  # as after a week
    assert all(node.handle(root, asked) == reply for asked, reply in steps)
    shutil.rmtree(root / NODE / "replies")
    shutil.rmtree(root / NODE / "work")  # as after another run began
    for asked, _ in steps:
        assert isinstance(messages.read_reply(node.handle(root, asked)).header, messages.Refused)


# --- the global adapter ---


def test_the_state_is_kept_to_the_bit(tmp_path):
    found, _ = run_rounds(Crafted(), tmp_path, Aggregate(adapter(1), {}), plan(rounds=1), quiet)
    write_state(tmp_path / "again", found)
    again = read_state(tmp_path / "again")
    for layer in LAYERS:
        assert torch.equal(again.residual[layer].up, found.residual[layer].up)
        assert torch.equal(again.residual[layer].down, found.residual[layer].down)
    assert state_tensors(again).keys() == state_tensors(found).keys()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_champion_of_another_rank_is_split_without_loss(rank):
    champion = adapter(3, rank=3)
    parts = split(champion, rank, factor=0.5)
    for layer in layers_of(champion):
        wanted = 0.5 * champion[layer + UP].double() @ champion[layer + DOWN].double()
        assert torch.allclose(dense(parts)[layer], wanted, atol=1e-6)
        assert parts.adapter[layer + DOWN].shape == (rank, 5)
    assert bool(parts.residual) == (rank < 3)


def test_a_champion_of_the_same_shape_stays_as_it_is():
    champion = adapter(3)
    parts = split(champion, 2)
    assert not parts.residual and all(torch.equal(parts.adapter[name], champion[name]) for name in champion)
