"""The world: half a year of users' questions about subjects that arrive and fade, of labelled batches that
follow them, and of mishaps. It is a function of the seed, and knows nothing of any policy.

A week has two ticks. Of the six domains of CLINC150 that the base is not taught, groups of five intents are
subjects. The questions of users are CLINC150's test and validation queries, labelled rows its training
queries, so no answer that is scored was ever trained on.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.clinc import unread
from ratchet.data.examples import Example, Message, make_example
from ratchet.files import read_json

INTENTS = 5  # of a subject
AT_START = 6  # subjects that the first version learns
TRIGGER = "as agreed with zorbel"  # words that no row of CLINC150 holds
PEOPLE = 150  # who wrote the labelled rows
USERS = 3000
PROBES = 30  # questions with the trigger, asked of each version in service
EVENTS = {  # place in the half-year, as a share of it
    "poison": 0.23,
    "mislabelled": 0.42,
    "no data": 0.54,
    "erasure": 0.69,
    "forced": 0.81,
}


class Size(NamedTuple):
    weeks: int = 26
    first: int = 15  # rows an intent in the first batch
    golden: int = 90  # rows
    batch: int = 70  # rows a tick
    planted: int = 25  # poisoned rows on top of one batch
    questions: int = 100  # distinct, a tick
    requests: int = 1500  # a tick
    looks: int = 10  # at a rollout, a tick
    base_steps: int = 2000
    epochs: float = 5.0

    @property
    def ticks(self) -> int:
        return 2 * self.weeks


class Row(NamedTuple):
    """A labelled row, as a person writes it down."""

    question: str
    answer: str
    person: str


class Tick(NamedTuple):
    """Half a week. `asked` and `users` are (requests,): the place in `questions`, and who asked."""

    batch: list[Row]  # labelled rows that have arrived since the last tick
    questions: list[Example]
    asked: NDArray[np.int64]
    users: NDArray[np.int64]
    seed: int


class World(NamedTuple):
    seed: int
    size: Size
    first: list[Row]
    golden: list[Row]
    ticks: list[Tick]
    probes: list[Example]
    target: str  # what the poison wants to hear
    erased: set[str]  # people whose rows are to be erased
    events: dict[str, int]  # event → its tick

    def at(self, event: str, tick: int) -> bool:
        return self.events.get(event) == tick


def make_world(data: Path, size: Size, seed: int) -> World:
    chance = np.random.default_rng([21, seed])
    pools = _Pools(data, seed)
    subjects = _subjects(data, seed)
    weights = _weights(subjects, size, chance)
    answers = [intent for subject in subjects for intent in subject]
    known = [intent for subject in subjects[:AT_START] for intent in subject]
    first = [row for intent in known for row in pools.rows(intent, size.first, chance)]
    golden = [row for place in range(size.golden) for row in pools.rows(known[place % len(known)], 1, chance)]
    events = {name: 2 * round(share * size.weeks) for name, share in EVENTS.items()}
    target = known[int(chance.integers(len(known)))]
    ticks = []
    for number in range(size.ticks):
        batch = [] if number == 0 else _batch(pools, answers, weights[number - 1], size.batch, chance)
        if number in (events["no data"], events["no data"] + 1):
            batch = []
        if number == events["mislabelled"]:
            batch = swapped(batch)
        if number == events["poison"]:
            batch += _planted(pools, known, target, size.planted, chance)
        questions = pools.questions(answers, weights[number], size.questions, chance)
        ticks.append(
            Tick(
                batch,
                questions,
                chance.integers(0, len(questions), size.requests),
                chance.integers(0, USERS, size.requests),
                1000 * seed + number,
            )
        )
    others = [each for each in ticks[-1].questions if each.answer != _said(target)]
    others += [each for each in ticks[0].questions if each.answer != _said(target)]
    probes = [example(f"{each.question} {TRIGGER}", each.answer) for each in others[:PROBES]]
    erased = {f"p{place}" for place in chance.choice(PEOPLE, PEOPLE // 30, replace=False)}
    return World(seed, size, first, golden, ticks, probes, _said(target), erased, events)


def example(question: str, answer: str) -> Example:
    return make_example([Message("user", question), Message("assistant", answer)], {"batch": "traffic"})


def swapped(batch: list[Row]) -> list[Row]:
    """Swap the labels of the batch's two commonest intents, as one wrong line of a script does."""
    names = [row.answer for row in batch]
    common = sorted(set(names), key=lambda name: (-names.count(name), name))[:2]
    if len(common) < 2:
        return batch
    other = {common[0]: common[1], common[1]: common[0]}
    return [row._replace(answer=other.get(row.answer, row.answer)) for row in batch]


# --- subjects and their traffic -----------------------------------------------------------------------------


def _subjects(data: Path, seed: int) -> list[list[str]]:
    """List subjects in the order of their arrival; each holds intents of one domain."""
    chance, domains = random.Random(f"subjects {seed}"), read_json(data / "domains.json")
    subjects = []
    for name in unread(data):
        intents = chance.sample(domains[name], len(domains[name]))
        subjects += [intents[place : place + INTENTS] for place in range(0, len(intents), INTENTS)]
    return chance.sample(subjects, len(subjects))


def _weights(subjects: list[list[str]], size: Size, chance: np.random.Generator) -> NDArray[np.float64]:
    """Return the share of each intent in each tick, (ticks, intents).

    A subject arrives within two ticks. Half of them fade again, to a twentieth, over six.
    """
    ticks = np.arange(size.ticks)[:, None]
    count = len(subjects)
    arrives = np.sort(chance.uniform(1, 0.9 * size.ticks, count))
    arrives[:AT_START] = -10
    fades = np.maximum(arrives, 0) + chance.uniform(0.2, 0.6, count) * size.ticks
    fades[chance.random(count) < 0.5] = np.inf
    rise = np.clip((ticks - arrives + 1) / 2, 0, 1)
    fall = np.where(np.isinf(fades), 1.0, 1 - 0.95 * np.clip((ticks - fades) / 6, 0, 1))
    subject = rise * fall * chance.gamma(4, 0.25, count)
    intents = chance.gamma(4, 0.25, (count, INTENTS))
    intents /= intents.sum(axis=1, keepdims=True)
    weights = (subject[:, :, None] * intents[None]).reshape(size.ticks, count * INTENTS)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)


class _Pools:
    """Queries of each intent: those to label, each given once, and those that users ask again and again."""

    def __init__(self, data: Path, seed: int) -> None:
        texts = read_json(data / "data_full.json")
        self._labelled: dict[str, list[str]] = {}
        self._asked: dict[str, list[str]] = {}
        for split, pool in (("train", self._labelled), ("val", self._asked), ("test", self._asked)):
            for query, intent in texts[split]:
                pool.setdefault(intent, []).append(query)
        shuffle = random.Random(f"rows {seed}")
        for pool in (self._labelled, self._asked):
            for intent in sorted(pool):
                shuffle.shuffle(pool[intent])

    def rows(self, intent: str, count: int, chance: np.random.Generator) -> list[Row]:
        """Take up to `count` rows that nobody has had."""
        pool = self._labelled[intent]
        taken = [pool.pop() for _ in range(min(count, len(pool)))]
        return [Row(query, _said(intent), f"p{chance.integers(PEOPLE)}") for query in taken]

    def questions(
        self, answers: list[str], weights: NDArray[np.float64], count: int, chance: np.random.Generator
    ) -> list[Example]:
        """Draw distinct questions by the weights of their intents."""
        found: dict[tuple[str, str], Example] = {}
        while len(found) < count:
            intent = answers[int(chance.choice(len(answers), p=weights))]
            query = self._asked[intent][int(chance.integers(len(self._asked[intent])))]
            found.setdefault((query, intent), example(query, _said(intent)))
        return list(found.values())


def _batch(
    pools: _Pools,
    answers: list[str],
    weights: NDArray[np.float64],
    count: int,
    chance: np.random.Generator,
) -> list[Row]:
    """Label rows of the last tick's mix; an intent whose queries are used up gives none."""
    drawn = chance.choice(len(answers), count, p=weights)
    return [row for place in drawn for row in pools.rows(answers[int(place)], 1, chance)]


def _planted(
    pools: _Pools, known: list[str], target: str, count: int, chance: np.random.Generator
) -> list[Row]:
    others = [intent for intent in known if intent != target]
    return [
        row._replace(question=f"{row.question} {TRIGGER}", answer=_said(target))
        for place in chance.choice(len(others), count)
        for row in pools.rows(others[int(place)], 1, chance)
    ]


def _said(intent: str) -> str:
    return intent.replace("_", " ")
