"""Measure what nodes learn together that keep their rows: CLINC150 dealt out to ten nodes, and five nodes of
which one sends poison.

    python -m benchmarks.federation [--data ../shared/data/clinc150] [--quick] [--parts nodes,poison] [--json]

A base of the demo's shape is pre-trained on four domains; a seed draws others, whose queries are the
questions and whose intents' names are the answers. Each intent's rows go to the nodes by shares of a
Dirichlet distribution (arXiv 1909.06335): at 1.0 the nodes differ, at 0.1 most have a few intents only. Every
training is the project's own `fit` on packed windows, every round's outcome is that of a strategy in
`ratchet.federation.strategies`.

`central` trains on all rows, `alone` each node on its own; both stop by validation rows. The others have the
same rounds: `factors` averages A and B apart, as is usual, `exact` the updates; `prox` is exact with
`train.proximal`. `personal` mixes the exact one with a node's own adapter, trained alone or from the exact
one on, by the loss on the node's own validation rows.
`clusters` goes on in clusters of nodes after some of the exact rounds.

A node's accuracy is that on the test rows of its intents, each weighted by its share of the node's rows. A
row is right where each token of the right answer is the likeliest, so that greedy decoding would give exactly
it. Intervals are 95 % over seeds (Student's t), differences are within a seed. One thread.

Poison: five nodes with rows of all intents, one of which sends ten times its update, its update with the
opposite sign, or what it learned from other intents' names. The last line has the four others alone, since a
strategy that keeps the poison out still lacks the rows of that node.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import clinc
from benchmarks.clinc import DATA, Counts, make_base, one_thread, read_domain, require_data, unread
from benchmarks.forgetting import interval
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.examples import Example, Message, make_example
from ratchet.errors import DivergenceError
from ratchet.files import sha256_json, whole_folder

if TYPE_CHECKING:
    from ratchet.federation.aggregation import Aggregate
    from ratchet.federation.personal import Choice
    from ratchet.federation.strategies import Strategy
    from ratchet.models.chat_template import Encoded

Adapter = dict[str, Any]  # tensors by the names that PEFT saves them under
ARMS = ("central", "alone", "factors", "exact", "prox", "personal", "clusters")
NAMES = {
    "central": "central: all rows in one place",
    "alone": "each node alone",
    "factors": "FedAvg, A and B averaged apart",
    "exact": "FedAvg, exact",
    "prox": "exact + FedProx",
    "personal": "exact + personal adapters",
    "clusters": "exact + clusters",
}
STRATEGIES = ("fedavg", "trimmed_mean", "krum", "multi_krum")
POISONS = ("none", "scaled", "flipped", "labels")


class Size(NamedTuple):
    """`counts` are rows per intent; `alone` the epochs of central and lonely trainings, at most."""

    seeds: int
    domains: int
    intents: int  # of each domain
    counts: Counts
    nodes: int
    least_rows: int  # of a node
    rounds: int
    epochs: float  # of a node in a round
    alone: float
    together: int  # rounds before clusters part
    steps: int  # of the base's pre-training
    poisoned: int  # seeds of the second part
    poison_rounds: int
    rate: float = 5e-3  # of trainings in one place
    round_rate: float = 1.5e-2  # of a node in the first round
    proximal: float = 0.05


FULL = Size(5, 2, 5, Counts(40, 16, 30), 10, 10, 24, 1.0, 20.0, 8, 600, 3, 16)
QUICK = Size(1, 1, 4, Counts(8, 4, 4), 5, 2, 2, 1.0, 2.0, 1, 20, 1, 1)
ALPHAS = (1.0, 0.1)
EQUAL = 1000.0  # Dirichlet parameter at which nodes have the same shares, nearly
RUNS = "runs.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--quick", action="store_true", help="hardly any training: shows that it runs")
    parser.add_argument("--parts", default="nodes,poison")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder to keep the base and each seed's figures in; what is there is not measured again",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    require_data(arguments.data)
    size = QUICK if arguments.quick else FULL
    if arguments.seeds:
        size = size._replace(seeds=arguments.seeds, poisoned=arguments.seeds)
    with contextlib.redirect_stdout(sys.stderr):
        found = list(measure(arguments.data, arguments.parts.split(","), size, arguments.keep))
    if arguments.json:
        print("\n".join(json.dumps(run) for run in found))
    else:
        print("\n".join([*table_of_nodes(found, size), *table_of_poison(found, size)]))


def measure(data: Path, parts: list[str], size: Size, kept: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a dict per seed and Dirichlet parameter, then one per seed with poison."""
    units = [("nodes", seed, alpha) for seed in range(size.seeds) for alpha in ALPHAS if "nodes" in parts]
    units += [("poison", seed, EQUAL) for seed in range(size.poisoned) if "poison" in parts]
    known = {}
    key = json.loads(json.dumps(size._replace(seeds=0, poisoned=0)))
    if kept and (kept / RUNS).exists():
        runs = map(json.loads, (kept / RUNS).read_text(encoding="utf-8").splitlines())
        known = {(run["part"], run["seed"], run["alpha"]): run for run in runs if run["size"] == key}
    with tempfile.TemporaryDirectory(prefix="ratchet-federation-") as folder:
        bench: Bench | None = None
        for unit in units:
            if unit not in known:
                if bench is None:
                    one_thread(folder)
                    bench = Bench(kept or Path(folder), data, size)
                began = time.perf_counter()
                part, seed, alpha = unit
                run = (nodes_part if part == "nodes" else poison_part)(bench, data, seed, alpha, size)
                seconds = round(time.perf_counter() - began)
                known[unit] = {"part": part, "seed": seed, "alpha": alpha, "size": key, **run}
                print(f"{part}, seed {seed}, Dirichlet {alpha:g}: {seconds} s", file=sys.stderr)
                if kept:
                    kept.mkdir(parents=True, exist_ok=True)
                    with (kept / RUNS).open("a", encoding="utf-8") as out:
                        out.write(json.dumps(known[unit]) + "\n")
            yield known[unit]


# --- the model ----------------------------------------------------------------------------------------------


class Bench:
    """One base with one adapter, into which the adapters of all nodes are put in turn."""

    def __init__(self, folder: Path, data: Path, size: Size) -> None:
        from ratchet.models.adapters import load_trainable
        from ratchet.models.loading import load_chat

        self.size, self.config = size, settings(size)
        made = sha256_json([self.config.base.model_dump(mode="json"), list(size.counts)])[:8]
        base = folder / f"base-{made}"
        if not base.exists():
            with whole_folder(base) as fresh:
                make_base(fresh, data, size.counts, self.config.base, names=True)
        self.chat = load_chat(base)
        self.central: dict[int, Adapter] = {}  # by seed
        self._model = load_trainable(base, None, self.config.adapter, seed=0)
        self._layers = {
            name: module for name, module in self._model.named_modules() if hasattr(module, "lora_A")
        }
        self._base = {
            name: module.base_layer.weight.detach().clone() for name, module in self._layers.items()
        }
        gc.collect()
        gc.freeze()  # accelerate collects garbage before each training

    def encode(self, rows: Sequence[Example]) -> list[Encoded]:
        return [self.chat.encode(row) for row in rows]

    def begin(self, seed: int) -> Aggregate:
        """Return an adapter without an update, drawn by `seed`."""
        from transformers import set_seed

        from ratchet.federation.aggregation import Aggregate

        set_seed(seed)
        for module in self._layers.values():
            module.reset_lora_parameters("default", True)
        return Aggregate(self._taken(), {})

    def learn(
        self,
        start: Aggregate,
        rows: Sequence[Encoded],
        validation: Sequence[Encoded] = (),
        *,
        epochs: float,
        seed: int,
        learning_rate: float,
        proximal: float = 0.0,
    ) -> Adapter:
        """Return the adapter that one node trains from `start`; its base holds the start's residual.

        With validation rows the best weights are returned, otherwise the last ones. Raises DivergenceError.
        """
        from ratchet.models.loading import quiet
        from ratchet.training.collation import count_batches
        from ratchet.training.loss import AnswerLoss
        from ratchet.training.packing import pack
        from ratchet.training.schedule import Schedule
        from ratchet.training.trainer import fit

        train = self.config.train
        window = self.config.tokenize.window
        assert isinstance(window, int)
        windows = pack(rows, window)
        steps = max(1, math.ceil(epochs * count_batches(windows, train.batch_windows)))
        self._put(start)
        with quiet():
            fit(
                self._model,
                windows,
                pack(validation, window),
                Schedule(
                    steps=steps,
                    batch_windows=train.batch_windows,
                    accumulate=1,
                    learning_rate=learning_rate,
                    kind=train.schedule if validation else "constant",
                    warmup_share=train.warmup_share,
                    weight_decay=train.weight_decay,
                    max_grad_norm=train.max_grad_norm,
                    evaluations=min(train.evaluations, steps),
                    patience=train.patience,
                    seed=seed,
                    proximal=proximal,
                ),
                loss=AnswerLoss(),
                pad_id=self.chat.pad_id,
                report=lambda step, values: None,
            )
        return self._taken()

    def score(self, found: Aggregate, rows: Sequence[Encoded]) -> tuple[Any, Any]:
        """Return for each row whether greedy decoding gives it, and its loss in nats, (rows,) arrays."""
        import torch
        from torch.nn.functional import cross_entropy

        from ratchet.models.cache import logits_at
        from ratchet.training.collation import RowCollator
        from ratchet.training.loss import learned_of
        from ratchet.training.packing import pack

        self._put(found)
        self._model.eval()
        right, losses = np.zeros(len(rows)), np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        collate = RowCollator(self.chat.pad_id)
        with torch.no_grad():
            for start in range(0, len(order), 256):
                places = order[start : start + 256]
                batch = collate([[pack([rows[place]], len(rows[place].ids))[0] for place in places]])
                learned = learned_of(batch)
                logits = logits_at(self._model, self._model.get_output_embeddings(), batch, learned)
                targets, row = batch["input_ids"][:, 1:][learned], learned.nonzero()[:, 0]
                wrong = torch.zeros(len(places)).index_add(0, row, (logits.argmax(-1) != targets).float())
                nats = cross_entropy(logits, targets, reduction="none")
                right[places] = (wrong == 0).numpy()
                losses[places] = torch.zeros(len(places)).index_add(0, row, nats).numpy()
        return right, losses

    def _put(self, found: Aggregate) -> None:
        import torch

        from ratchet.federation.aggregation import DOWN, UP

        with torch.no_grad():
            for name, module in self._layers.items():
                module.lora_A["default"].weight.copy_(found.adapter[name + DOWN])
                module.lora_B["default"].weight.copy_(found.adapter[name + UP])
                weight = self._base[name]
                if name in found.residual:
                    weight = weight + module.scaling["default"] * found.residual[name].dense().float()
                module.base_layer.weight.copy_(weight)

    def _taken(self) -> Adapter:
        from ratchet.federation.aggregation import DOWN, UP

        return {
            name + end: part["default"].weight.detach().clone()
            for name, module in self._layers.items()
            for end, part in ((DOWN, module.lora_A), (UP, module.lora_B))
        }


def settings(size: Size) -> Config:
    config = clinc.settings(size.steps, size.epochs, 0)
    demo = config.base.demo.model_copy(update={"layers": 1})
    return config.model_copy(
        update={
            "base": config.base.model_copy(update={"demo": demo}),
            "adapter": AdapterConfig(rank=8, alpha=16.0),
            "train": config.train.model_copy(update={"evaluations": 10, "batch_windows": 1}),
        }
    )


# --- rows ---------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """The rows of a seed by split, each with its intent's number."""

    train: list[tuple[Example, int]]
    validation: list[tuple[Example, int]]
    test: list[tuple[Example, int]]


class Node(NamedTuple):
    """`shares` are those of the node's training rows by intent, and sum up to 1."""

    train: list[Encoded]
    validation: list[Encoded]
    shares: np.ndarray


def read_rows(data: Path, seed: int, size: Size) -> Rows:
    domains = [
        read_domain(data, name, size.counts, seed, enough=True)
        for name in random.Random(f"domains {seed}").sample(unread(data), size.domains)
    ]
    drawn = random.Random(f"intents {seed}")
    chosen = [
        name
        for part in domains
        for name in drawn.sample(sorted({row.answer for row in part.train}), size.intents)
    ]
    numbers = {name: number for number, name in enumerate(chosen)}

    def split(name: str) -> list[tuple[Example, int]]:
        rows = [row for domain in domains for row in getattr(domain, name)]
        return [(row, numbers[row.answer]) for row in rows if row.answer in numbers]

    return Rows(*(split(name) for name in Rows._fields))


def deal(bench: Bench, rows: Rows, alpha: float, seed: int, nodes: int, least: int) -> list[Node]:
    """Give each intent's rows to nodes by shares drawn from a Dirichlet distribution.

    It is drawn again until each node has `least` training rows, and a validation row.
    """
    chance = np.random.default_rng([12, seed, round(alpha * 1000)])
    intents = 1 + max(intent for _, intent in rows.train)
    while True:
        shares = chance.dirichlet([alpha] * nodes, intents)  # (intents, nodes)
        given = {name: _places(getattr(rows, name), shares, chance) for name in ("train", "validation")}
        counts = {name: [places.count(node) for node in range(nodes)] for name, places in given.items()}
        if min(counts["train"]) >= least and min(counts["validation"]) >= 1:
            break
    found = []
    for node in range(nodes):
        train, validation = (
            [pair for pair, place in zip(getattr(rows, name), places, strict=True) if place == node]
            for name, places in given.items()
        )
        own = np.bincount([intent for _, intent in train], minlength=intents)
        encoded = [bench.encode([row for row, _ in part]) for part in (train, validation)]
        found.append(Node(encoded[0], encoded[1], own / own.sum()))
    return found


def _places(rows: list[tuple[Example, int]], shares: np.ndarray, chance: np.random.Generator) -> list[int]:
    """Return the node of each row: of each intent's rows, as many as the shares say, rounded."""
    found = [0] * len(rows)
    for intent, share in enumerate(shares):
        own = chance.permutation([place for place, row in enumerate(rows) if row[1] == intent])
        ends = np.rint(np.cumsum(share) * len(own)).astype(int)
        for node, part in enumerate(np.split(own, ends[:-1])):
            for place in part:
                found[place] = node
    return found


# --- rounds -------------------------------------------------------------------------------------------------


class Played(NamedTuple):
    """The global adapter after the rounds, and what the last one was made of."""

    outcome: Aggregate
    before: Aggregate
    adapters: list[Adapter]


def play(
    bench: Bench,
    start: Aggregate,
    nodes: Sequence[Node],
    strategy: Strategy,
    rounds: range,
    total: int,
    *,
    proximal: float = 0.0,
    send: Callable[[int, Adapter, Adapter], Adapter] = lambda node, before, after: after,
) -> Played:
    """Play some of `total` rounds from `start`; `send` is what a node sends instead of what it learned."""
    from ratchet.federation.aggregation import Aggregate

    state: dict[str, Any] = {}
    found, before, adapters = start, start, []
    for number in rounds:
        before = found
        adapters = [
            send(
                place,
                before.adapter,
                bench.learn(
                    before,
                    node.train,
                    epochs=bench.size.epochs,
                    seed=1000 * number + place,
                    learning_rate=rate_of(number, total, bench.size),
                    proximal=proximal,
                ),
            )
            for place, node in enumerate(nodes)
        ]
        outcome, state = strategy.combine(
            before.adapter, adapters, [len(node.train) for node in nodes], state
        )
        found = Aggregate(outcome.adapter, _added(before.residual, outcome.residual))
    return Played(found, before, adapters)


def rate_of(number: int, total: int, size: Size) -> float:
    """Return the nodes' learning rate of a round: it falls by a cosine to a fifth over all rounds.

    With a constant one, nodes that differ do not come to rest at the common optimum (arXiv 1907.02189).
    """
    return size.round_rate * (0.2 + 0.4 * (1 + math.cos(math.pi * number / total)))


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        layer: (one[layer] + other[layer]).cut()[0]
        if layer in one and layer in other
        else one.get(layer, other.get(layer))
        for layer in one.keys() | other.keys()
    }


# --- nodes that differ --------------------------------------------------------------------------------------


def nodes_part(bench: Bench, data: Path, seed: int, alpha: float, size: Size) -> dict[str, Any]:
    """Return the accuracy of each arm at each node."""
    from ratchet.federation.aggregation import Aggregate
    from ratchet.federation.personal import cluster_nodes, cosine_distances
    from ratchet.federation.strategies import FedAvg

    rows = read_rows(data, seed, size)
    test = bench.encode([row for row, _ in rows.test])
    intents = np.array([intent for _, intent in rows.test])
    start = bench.begin(seed)

    def by_intent(found: Aggregate) -> np.ndarray:
        right, _ = bench.score(found, test)
        return np.array([right[intents == intent].mean() for intent in range(intents.max() + 1)])

    if seed not in bench.central:
        everything = [bench.encode([row for row, _ in part]) for part in (rows.train, rows.validation)]
        bench.central[seed] = bench.learn(
            start, *everything, epochs=size.alone, seed=seed, learning_rate=size.rate
        )
    central = by_intent(Aggregate(bench.central[seed], {}))
    nodes = deal(bench, rows, alpha, seed, size.nodes, size.least_rows)
    own = [
        Aggregate(
            bench.learn(
                start, node.train, node.validation, epochs=size.alone, seed=seed, learning_rate=size.rate
            ),
            {},
        )
        for node in nodes
    ]
    early = play(bench, start, nodes, FedAvg(), range(size.together), size.rounds)
    late = range(size.together, size.rounds)
    exact = play(bench, early.outcome, nodes, FedAvg(), late, size.rounds).outcome
    clusters = cluster_nodes(
        cosine_distances(early.before.adapter, early.adapters), size.nodes // 2, least_nodes=2
    )
    parted = {
        cluster: exact
        if len(set(clusters)) == 1
        else play(
            bench,
            early.outcome,
            [node for node, number in zip(nodes, clusters, strict=True) if number == cluster],
            FedAvg(),
            late,
            size.rounds,
        ).outcome
        for cluster in sorted(set(clusters))
    }
    choices = [_choose(bench, exact, mine, node, seed) for node, mine in zip(nodes, own, strict=True)]
    every = range(size.rounds)
    shared = {
        "factors": play(bench, start, nodes, FedAvg(exact=False), every, size.rounds).outcome,
        "exact": exact,
        "prox": play(bench, start, nodes, FedAvg(), every, size.rounds, proximal=size.proximal).outcome,
    }
    accuracies = {
        "central": [central] * size.nodes,
        "alone": [by_intent(each) for each in own],
        **{arm: [by_intent(each)] * size.nodes for arm, each in shared.items()},
        "personal": [by_intent(choice.mixture) for choice in choices],
        "clusters": [by_intent(parted[cluster]) for cluster in clusters],
    }
    return {
        "rows": [len(node.train) for node in nodes],
        "clusters": clusters,
        "shares": [choice.share for choice in choices],
        "accuracy": {
            arm: [float(node.shares @ right) for node, right in zip(nodes, found, strict=True)]
            for arm, found in accuracies.items()
        },
    }


def _choose(bench: Bench, exact: Aggregate, alone: Aggregate, node: Node, seed: int) -> Choice:
    """Return a node's mixture with its own adapter: trained alone, or from the global one on."""
    from ratchet.federation.aggregation import Aggregate
    from ratchet.federation.personal import choose_mixture

    def loss(found: Aggregate) -> float:
        return float(bench.score(found, node.validation)[1].mean())

    size = bench.size
    tuned = bench.learn(
        exact, node.train, node.validation, epochs=size.alone / 3, seed=seed, learning_rate=size.rate
    )
    owns = (Aggregate(tuned, exact.residual), alone)
    return min((choose_mixture(exact, own, loss) for own in owns), key=lambda choice: choice.loss)


def table_of_nodes(runs: list[dict[str, Any]], size: Size) -> list[str]:
    lines = []
    for alpha in ALPHAS:
        found = [run for run in runs if run["part"] == "nodes" and run["alpha"] == alpha]
        if not found:
            continue
        rows = [count for run in found for count in run["rows"]]
        clusters = sorted(len(set(run["clusters"])) for run in found)
        shares = [share for run in found for share in run["shares"]]
        lines += [
            (
                f"Dirichlet {alpha:g}: {len(found)} seeds, {size.nodes} nodes with {min(rows)} to {max(rows)}"
                f" rows, median {statistics.median(rows):g}; clusters {', '.join(map(str, clusters))}; mean "
                f"share of a node's own adapter {statistics.mean(shares):.2f}"
            ),
            "",
            "| | mean of the nodes | against central | worst node | worst node against alone |",
            "|---|---|---|---|---|",
        ]
        for arm in ARMS:
            mean = [statistics.mean(run["accuracy"][arm]) for run in found]
            worst = [min(run["accuracy"][arm]) for run in found]
            central = [statistics.mean(run["accuracy"]["central"]) for run in found]
            alone = [min(run["accuracy"]["alone"]) for run in found]
            lines.append(
                f"| {NAMES[arm]} | {_cell(mean)} | {_points(mean, central) if arm != 'central' else ''} | "
                f"{_cell(worst)} | {_points(worst, alone) if arm != 'alone' else ''} |"
            )
        lines.append("")
    return lines


# --- poison -------------------------------------------------------------------------------------------------


def poison_part(bench: Bench, data: Path, seed: int, alpha: float, size: Size) -> dict[str, Any]:
    """Return the global model's accuracy on all test rows, by strategy and poison of one of five nodes."""
    from ratchet.federation.strategies import FedAvg, Krum, TrimmedMean

    strategies: dict[str, Strategy] = {
        "fedavg": FedAvg(),
        "trimmed_mean": TrimmedMean(1),
        "krum": Krum(1),
        "multi_krum": Krum(1, kept=4),
    }
    rows = read_rows(data, seed, size)
    test = bench.encode([row for row, _ in rows.test])
    start = bench.begin(seed)
    nodes = deal(bench, rows, alpha, seed, 5, size.least_rows)
    traitor, rounds = seed % 5, range(size.poison_rounds)
    turned = deal(bench, rows._replace(train=_renamed(rows.train)), alpha, seed, 5, size.least_rows)
    honest = [node for place, node in enumerate(nodes) if place != traitor]
    absent = play(bench, start, honest, FedAvg(), rounds, size.poison_rounds).outcome
    accuracy: dict[str, dict[str, float]] = {}
    for name in STRATEGIES:
        accuracy[name] = {}
        for poison in POISONS:
            taking_part = list(nodes)
            if poison == "labels":
                taking_part[traitor] = turned[traitor]
            factor = {"scaled": 10.0, "flipped": -1.0}.get(poison, 1.0)

            def send(node: int, before: Adapter, after: Adapter, factor: float = factor) -> Adapter:
                if node != traitor or factor == 1.0:
                    return after
                return {key: before[key] + factor * (after[key] - before[key]) for key in after}

            try:
                found = play(
                    bench, start, taking_part, strategies[name], rounds, size.poison_rounds, send=send
                )
                accuracy[name][poison] = float(bench.score(found.outcome, test)[0].mean())
            except DivergenceError:
                accuracy[name][poison] = 0.0
    left = float(bench.score(absent, test)[0].mean())
    return {"accuracy": accuracy, "absent": left, "rows": [len(node.train) for node in nodes]}


def _renamed(rows: list[tuple[Example, int]]) -> list[tuple[Example, int]]:
    """Give each intent the name of the next one."""
    names = {intent: row.answer for row, intent in rows}
    return [
        (
            make_example([*row.prompt, Message("assistant", names[(intent + 1) % len(names)])], row.meta),
            intent,
        )
        for row, intent in rows
    ]


def table_of_poison(runs: list[dict[str, Any]], size: Size) -> list[str]:
    measured = [run for run in runs if run["part"] == "poison"]
    if not measured:
        return []
    found = [run["accuracy"] for run in measured]
    lines = [
        (
            f"Poison: {len(found)} seeds, one of five nodes; points against FedAvg of five honest nodes, on"
            " all test rows"
        ),
        "",
        "| | five honest nodes | ten times its update | opposite sign | other labels |",
        "|---|---|---|---|---|",
    ]
    honest = [run["fedavg"]["none"] for run in found]
    titles = {
        "fedavg": "FedAvg, exact",
        "trimmed_mean": "trimmed mean",
        "krum": "Krum",
        "multi_krum": "Multi-Krum, four kept",
    }
    for name in STRATEGIES:
        cells = [_points([run[name][poison] for run in found], honest) for poison in POISONS[1:]]
        lines.append(
            f"| {titles[name]} | {_cell([run[name]['none'] for run in found])} | {' | '.join(cells)} |"
        )
    absent = [run["absent"] for run in measured]
    lines.append(
        f"| FedAvg, exact, of the four others alone | {_cell(absent)} |{f' {_points(absent, honest)} |' * 3}"
    )
    return lines


def _cell(values: list[float]) -> str:
    found = interval(values)
    return f"{found['mean']:.3f}" + _bounds(found, ".3f", 1)


def _points(values: list[float], against: list[float]) -> str:
    found = interval([one - other for one, other in zip(values, against, strict=True)])
    return f"{100 * (found['mean'] or 0):+.1f}" + _bounds(found, "+.1f", 100)


def _bounds(found: dict[str, float | None], form: str, factor: float) -> str:
    low, high = found["low"], found["high"]
    return "" if low is None or high is None else f" [{factor * low:{form}}, {factor * high:{form}}]"


if __name__ == "__main__":
    main()
