"""Make pairs of candidate and champion with known effects from the scores of real models.

All effects are expectations over the pool of held-out rows. A row's scores stay together: which model gave
them is decided row by row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd

SCORES = ("exact_match", "answer_nll", "answer")
EQUAL, LOSS, GAIN, SPOILT = "equal", "loss", "gain", "spoilt"
TWIN, BASE, WEAKER, BAD = "twin", "base", "weaker", "spoilt"  # how models of the pool are named
GOLDEN = 3  # test rows for each golden row, as in benchmarks/gate_models.py

Columns = dict[str, np.ndarray[Any, Any]]


class Pool(NamedTuple):
    """Rows with what all models have in common, and each model's scores in the order of the rows."""

    rows: Columns
    models: dict[str, Columns]

    def named(self, kind: str) -> list[str]:
        return sorted(name for name in self.models if name.partition("-")[0] == kind)


class Case(NamedTuple):
    """One pair on `rows` test rows; `points` is the expected loss or gain in points of exact match."""

    kind: str
    points: float
    rows: int
    number: int


class Pair(NamedTuple):
    candidate: Columns
    champion: Columns


def read_pool(path: Path) -> Pool:
    """Read a table with a line a row and model."""
    table = pd.read_parquet(path).sort_values(["model", "id"], ignore_index=True)
    shared = [name for name in table if name not in (*SCORES, "model")]
    parts = {str(name): part for name, part in table.groupby("model")}
    first = next(iter(parts.values()))
    assert all((part.id.to_numpy() == first.id.to_numpy()).all() for part in parts.values())
    return Pool(_columns(first, shared), {name: _columns(part, SCORES) for name, part in parts.items()})


def _columns(table: pd.DataFrame, names: Any) -> Columns:
    return {name: table[name].to_numpy() for name in names}


def farthest(pool: Pool) -> float:
    """Return the largest effect in points that the pool's models can make."""
    weaker = pool.models[WEAKER]["exact_match"].mean()
    means = sorted(pool.models[name]["exact_match"].mean() for name in pool.named(TWIN))
    return float(100 * ((means[0] + means[1]) / 2 - weaker))


def make_table(pool: Pool, case: Case) -> pd.DataFrame:
    """Make the table that the rules see: docs/gatebench.md says what it holds."""
    generator = np.random.default_rng(
        [12, crc32(case.kind.encode()), round(10 * case.points), case.rows, case.number]
    )
    pair = make_pair(pool, case, generator)
    asked = case.rows + case.rows // GOLDEN
    places, earlier = (generator.choice(len(pool.rows["id"]), asked, replace=False) for _ in range(2))
    golden = np.arange(asked) >= case.rows
    sides = {
        "candidate": (pair.candidate, places),
        "champion": (pair.champion, places),
        "base": (pool.models[BASE], places),
        "champion_earlier": (pair.champion, earlier),
    }
    columns = {
        name: np.concatenate([values[where] for _, where in sides.values()])
        for name, values in pool.rows.items()
    }
    columns |= {
        name: np.concatenate([scores[name][where] for scores, where in sides.values()]) for name in SCORES
    }
    columns["batch"] = np.where(np.tile(golden, len(sides)), "golden", columns["batch"])
    return pd.DataFrame({"model": np.repeat(list(sides), asked), **columns})


def make_pair(pool: Pool, case: Case, generator: np.random.Generator) -> Pair:
    if case.kind == SPOILT:
        bad = pool.named(BAD)
        return Pair(pool.models[bad[case.number % len(bad)]], pool.models[f"{TWIN}-0"])
    names = generator.choice(pool.named(TWIN), 2, replace=False)
    one, other = (pool.models[name] for name in names)
    pair = exchange(one, other, generator)
    if case.kind == EQUAL:
        return pair
    weaker, share = pool.models[WEAKER], share_of(case.points, one, other, pool.models[WEAKER])
    if case.kind == LOSS:
        return Pair(mix(pair.candidate, weaker, share, generator), pair.champion)
    return Pair(pair.candidate, mix(pair.champion, weaker, share, generator))


def exchange(one: Columns, other: Columns, generator: np.random.Generator) -> Pair:
    """Decide by a coin per row which of two models is the candidate, so that neither side is better."""
    coin = generator.random(len(one["exact_match"])) < 0.5
    return Pair(*(_chosen(coin, *both) for both in ((one, other), (other, one))))


def share_of(points: float, one: Columns, other: Columns, weaker: Columns) -> float:
    """Return the share of rows to take from the weaker model for an expected effect of `points`.

    A side of an exchanged pair is right on the mean of both models' accuracies.
    """
    gap = (one["exact_match"].mean() + other["exact_match"].mean()) / 2 - weaker["exact_match"].mean()
    return float(points / 100 / gap)


def mix(scores: Columns, weaker: Columns, share: float, generator: np.random.Generator) -> Columns:
    return _chosen(generator.random(len(scores["exact_match"])) < share, weaker, scores)


def _chosen(coin: np.ndarray[Any, Any], heads: Columns, tails: Columns) -> Columns:
    return {name: np.where(coin, heads[name], tails[name]) for name in SCORES}
