"""What a policy achieved in a half-year, beside an oracle."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.loopbench.simulate import Run
from benchmarks.loopbench.workshop import Workshop


class Score(NamedTuple):
    """One policy and seed. `regret` is relative: the share of the oracle's right answers that it lacks."""

    policy: str
    told: str
    seed: int
    right: float  # share of all requests
    regret: float
    by_tick: list[float]  # right, too
    trainings: int = 0
    rows: int = 0  # trained on, in one epoch, all trainings together
    seconds: float = 0.0  # of training
    promotions: int = 0
    wrong: int = 0
    poisoned: float = 0.0  # mean share of probes, since the poisoned batch
    unerased: int = 0  # ticks
    verdicts: Mapping[str, int] = {}
    trials: Mapping[str, int] = {}
    refused: Sequence[int] = ()


def score_all(runs: Sequence[Run], workshop: Workshop) -> list[Score]:
    """Score the policies of one seed, and the oracle last."""
    best = oracle(runs, workshop)
    requests = sum(runs[0].requests)
    shares = [sum(right) / requests for right in (*(run.right for run in runs), best)]
    found = [_score(run, share, shares[-1], workshop) for run, share in zip(runs, shares[:-1], strict=True)]
    asked = runs[0].requests
    nothing = Score("oracle", "oracle", workshop.world.seed, shares[-1], 0.0, _by_tick(best, asked))
    return [*found, nothing]


def oracle(runs: Sequence[Run], workshop: Workshop) -> list[int]:
    """Return the right answers by tick of the best version of each tick, chosen by that tick's requests.

    It chooses among the versions that any of the policies serves or trains in that tick; it trains none.
    """
    models = {model.version: model for model in workshop.trainings}
    best = []
    for tick, now in enumerate(workshop.world.ticks):
        there = {run.served[tick] for run in runs}
        there |= {version for run in runs for at, version in run.trained if at == tick}
        hits = [
            np.array(workshop.right(models[version], now.questions))[now.asked].sum() for version in there
        ]
        best.append(int(max(hits)))
    return best


def _score(run: Run, share: float, best: float, workshop: Workshop) -> Score:
    models = {model.version: model for model in workshop.trainings}
    trained = [models[version] for _, version in run.trained]
    own = [move for move in run.moves if move.kind == "promoted"]
    return Score(
        run.policy.name,
        run.policy.told,
        workshop.world.seed,
        share,
        1 - share / best if best else 0.0,
        _by_tick(run.right, run.requests),
        len(trained),
        sum(model.rows for model in trained),
        sum(model.seconds for model in trained),
        len(own),
        sum(move.wrong for move in own),
        statistics.mean(run.poisoned),
        run.unerased,
        _counted(run.verdicts),
        _counted(run.trials),
        run.refused,
    )


def _by_tick(right: Sequence[int], requests: Sequence[int]) -> list[float]:
    return [round(hits / asked, 4) for hits, asked in zip(right, requests, strict=True)]


def _counted(words: Iterable[str]) -> dict[str, int]:
    found = list(words)
    return {word: found.count(word) for word in sorted(set(found))}
