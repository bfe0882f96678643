"""Measure how often the gate errs: its own code (`tasks.gate.judge`) on simulated tables of scores, with the
files that the stages write.

    python -m benchmarks.gate [--quick] [--only equal,copies,bad,better,repetition,unbudgeted,broken]

Three models answer 1,200 test rows of three batches (two of them known to the champion) and 400 golden ones.
A row is right or wrong; two models differ in `DIFFERING` of the rows. Not covered: real models
(`benchmarks.gate_models`); these tables meet the assumptions of the gate's statistics.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom

from ratchet.config.evaluation import GateConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.statistics import bootstrap_mean, chance_of
from ratchet.files import write_json
from ratchet.gate.alpha_budget import alpha_of
from ratchet.gate.power import Spread, plan
from ratchet.promotion.verdict import Verdict
from tasks.gate import judge

BATCHES = {"old": 400, "older": 400, "new": 400}
SEEN = ["old", "older"]
GOLDEN = 400
# Shares of rows: the champion is right, candidate and champion differ, the base is right.
RIGHT, DIFFERING, BASE = 0.6, 0.15, 0.2
QUICK = 10  # a tenth of the cycles
HEADER = (
    "| candidates | cycles | promoted | rejected | uncertain | no verdict | wanted"
    " |\n|---|---|---|---|---|---|---|"
)


class Cycles(NamedTuple):
    """Cycles of each part."""

    equal: int = 1000
    copies: int = 200
    bad: int = 200
    better: int = 600
    series: int = 60
    fast: int = 4000


class Bench:
    """A folder with the files that the stages write before the gate."""

    def __init__(self, folder: Path, seen: list[str] = SEEN) -> None:
        self.folder, self.written = folder, dict[str, object]()
        self.decision: Verdict | None = None
        write_json(folder / "incumbent/manifest.json", {"version": 7, "batches": seen})
        write_json(folder / "candidate/manifest.json", {"run_key": "candidate", "adapter_sha256": "sha"})
        write_json(folder / "parity.json", passing_parity("sha"))

    @property
    def passed(self) -> bool:
        """Return whether the last candidate met the success criterion."""
        return self.decision is not None and self.decision.checks[0].result == "pass"

    def verdict(
        self,
        table: pd.DataFrame,
        config: GateConfig,
        *,
        looks: int = 0,
        evaluated: dict[str, object] | None = None,
    ) -> str:
        """Return promote, reject, uncertain, or `error` if the gate gives no verdict."""
        found = {"champion": 7, "candidate": "sha", "rows": int((table.model == "base").sum()), "pairs": 0}
        self._write("looks.json", {"judged": {"7": [f"earlier {number}" for number in range(looks)]}})
        self._write("evaluation/metrics.json", found | (evaluated or {}))
        table.to_parquet(self.folder / "evaluation/scores.parquet", index=False)
        try:
            self.decision = judge(
                self.folder / "evaluation",
                self.folder / "candidate",
                self.folder / "incumbent",
                self.folder / "parity.json",
                self.folder / "looks.json",
                self.folder / "gate.json",
                config,
            )
        except RatchetError:
            return "error"
        return self.decision.verdict

    def _write(self, name: str, value: object) -> None:
        if self.written.get(name) != value:
            write_json(self.folder / name, value)
            self.written[name] = value


def passing_parity(adapter: str) -> dict[str, object]:
    """Return a report of serve parity that finds nothing, so that the scores alone decide."""
    parts = [
        {"name": name, "rows": 200, "mismatches": 0, "result": "pass", "reason": "the same"}
        for name in ("files", "training", "prompts", "gateway")
    ]
    return {"candidate": adapter, "rows": 200, "training_rows": 200, "parts": parts}


def main() -> None:
    parts = {
        "equal": equal,
        "copies": copies,
        "bad": bad,
        "better": better,
        "repetition": repetition,
        "unbudgeted": unbudgeted,
        "broken": broken,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the cycles")
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas")
    options = parser.parse_args()
    cycles = Cycles(*(count // QUICK for count in Cycles())) if options.quick else Cycles()
    started = time.perf_counter()
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="ratchet-gate-") as folder:
        for name in options.only.split(","):
            for line in parts[name](Bench(Path(folder)), cycles):
                print(line, flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


# --- parts: each gives lines of the table -------------------------------------------------------------------


def equal(bench: Bench, cycles: Cycles) -> Iterator[str]:
    """Judge an equal candidate on fresh rows in every cycle, at 5 % without a budget: 5 % may pass."""
    config = GateConfig(alpha=0.05, alpha_budget=1.0, resamples=1000)
    found, passed = Counter[str](), 0
    for cycle in range(cycles.equal):
        found[bench.verdict(draw(np.random.default_rng([1, cycle])), config)] += 1
        passed += bench.passed
    yield row(
        "equal to the champion, error 5 %",
        found,
        f"at most {limit(cycles.equal, 0.05)} promoted ({passed} by the success metric alone)",
    )


def copies(bench: Bench, cycles: Cycles) -> Iterator[str]:
    config, found = GateConfig(alpha=0.05, alpha_budget=1.0, resamples=1000), Counter[str]()
    for cycle in range(cycles.copies):
        table = draw(np.random.default_rng([2, cycle]))
        same = table[table.model == "champion"].assign(model="candidate")
        found[bench.verdict(pd.concat([table[table.model != "candidate"], same]), config)] += 1
    yield row("the champion itself", found, "none promoted")


def bad(bench: Bench, cycles: Cycles) -> Iterator[str]:
    """Judge candidates that are worse or broken, at the default settings."""
    for name, spoil in SPOILT.items():
        found = Counter(
            bench.verdict(spoil(np.random.default_rng([3, cycle])), GateConfig(resamples=1000))
            for cycle in range(cycles.bad)
        )
        yield row(name, found, "none promoted")


def better(bench: Bench, cycles: Cycles) -> Iterator[str]:
    """Judge better candidates at the default settings, and compare with what `ratchet gate plan` predicts."""
    config = GateConfig(resamples=2000)
    for effect in (0.02, 0.03, 0.04):
        told = plan(effect, BATCHES, SEEN, GOLDEN, Spread(DIFFERING, 0.0), alpha_of(1, config), config).power
        found = Counter(
            bench.verdict(draw(np.random.default_rng([4, cycle, round(1000 * effect)]), effect), config)
            for cycle in range(cycles.better)
        )
        yield row(
            f"better by {effect:.2f}",
            found,
            f"{told:.0%} promoted by plan; measured {found['promote'] / cycles.better:.0%}",
        )


def repetition(bench: Bench, cycles: Cycles) -> Iterator[str]:
    """Judge series of thirty candidates that are no better, each on fresh rows, at the default settings.

    A series counts once if any of its candidates is promoted.
    """
    yield _series(
        "alpha budget 5 % (the default)",
        bench,
        cycles.series,
        GateConfig(resamples=2000),
        f"at most {limit(cycles.series, 0.05)} series",
    )
    yield _fast_series(
        "by the success metric's two tests alone, budget 5 %",
        cycles.fast,
        GateConfig(resamples=2000),
        f"at most {limit(cycles.fast, 0.05)} series",
    )


def unbudgeted(_: Bench, cycles: Cycles) -> Iterator[str]:
    """Run the same two tests with an error of 1 % at each look, without a budget."""
    yield _fast_series(
        "by the two tests alone, 1 % a look without a budget",
        cycles.fast,
        GateConfig(resamples=2000, alpha_budget=1.0),
        "1 - 0.99^30 = 26 %, to compare",
        counted=False,
    )


def _series(name: str, bench: Bench, series: int, config: GateConfig, wanted: str) -> str:
    through = 0
    for number in range(series):
        generator = np.random.default_rng([5, number])
        through += any(
            bench.verdict(draw(generator, light=True), config, looks=look) == "promote" for look in range(30)
        )
    return f"| thirty equal ones in a row, {name} | {series:,} series | {through} | | | | {wanted} |"


def _fast_series(name: str, series: int, config: GateConfig, wanted: str, *, counted: bool = True) -> str:
    """Run the functions that the gate calls, without tables and files.

    If looks are not `counted`, each is judged as the first one.
    """
    generator, through, rows = np.random.default_rng(7), 0, sum(BATCHES.values())
    for _ in range(series):
        for look in range(1, 31):
            won, lost, _ = generator.multinomial(rows, [DIFFERING / 2, DIFFERING / 2, 1 - DIFFERING])
            gains, alpha = (
                np.repeat([1.0, -1.0, 0.0], [won, lost, rows - won - lost]),
                alpha_of(look if counted else 1, config),
            )
            if (
                won > lost
                and chance_of(gains) <= alpha
                and bootstrap_mean(gains, alpha=alpha, resamples=config.resamples, seed=config.seed).low > 0
            ):
                through += 1
                break
    return (
        f"| thirty equal ones in a row, {name} | {series:,} series | {through:,} ({through / series:.1%}) | |"
        f" | | {wanted} |"
    )


def broken(bench: Bench, cycles: Cycles) -> Iterator[str]:
    """Judge a candidate that would be promoted, in evaluations that are incomplete or inconsistent."""
    table = draw(np.random.default_rng(6), 0.3)
    assert bench.verdict(table, GateConfig()) == "promote"
    mine = table.model == "candidate"
    faults: dict[str, tuple[pd.DataFrame, dict[str, object]]] = {
        "no rows of the candidate": (table[~mine], {}),
        "no rows of the champion": (table[table.model != "champion"], {}),
        "a row of the candidate is missing": (table.drop(table.index[mine][0]), {}),
        "a hundred rows of all models are missing": (
            table[~table.id.isin([f"row{number}" for number in range(100)])],
            {"rows": len(table) // 3},
        ),
        "a doubled row": (pd.concat([table, table[mine][:1]]), {}),
        "all rows twice": (pd.concat([table, table]), {"rows": len(table) // 3}),
        "NaN": (table.assign(exact_match=table.exact_match.mask(mine & (table.id == "row5"))), {}),
        "another champion": (table, {"champion": 6}),
        "another candidate": (table, {"candidate": "an earlier one"}),
        "audit without its rows": (table, {"pairs": 20}),
    }
    found = Counter(
        bench.verdict(spoilt, GateConfig(), evaluated=evaluated) for spoilt, evaluated in faults.values()
    )
    yield row(f"better by 0.30, in {len(faults)} kinds of broken evaluation", found, "no verdict at all")


# --- tables -------------------------------------------------------------------------------------------------


def draw(
    generator: np.random.Generator,
    effect: float = 0.0,
    *,
    right: float | None = None,
    nll: float = 1.0,
    light: bool = False,
) -> pd.DataFrame:
    """Draw scores of a candidate that is better by `effect`, or right at random in the share `right`.

    `light`: half of the test rows, no golden ones and no slices.
    """
    batches = [name for name, count in BATCHES.items() for _ in range(count // 2 if light else count)] + [
        "golden"
    ] * (0 if light else GOLDEN)
    rows = len(batches)
    champion = generator.random(rows) < RIGHT
    if right is None:
        # The candidate wins some of the rows that the champion got wrong and loses some of the others:
        # DIFFERING in all, `effect` more of them won than lost.
        differing = max(DIFFERING, abs(effect))
        turn = np.where(champion, (differing - effect) / 2 / RIGHT, (differing + effect) / 2 / (1 - RIGHT))
        candidate = champion ^ (generator.random(rows) < turn)
    else:
        candidate = generator.random(rows) < right
    sides = {
        "candidate": (candidate, nll),
        "champion": (champion, 1.0),
        "base": (generator.random(rows) < BASE, 2.0),
    }
    ids, topics = (
        [f"row{number}" for number in range(rows)],
        [f"topic {number % 6}" for number in range(rows)],
    )
    likelihood = generator.normal(0, 0.3, rows).round(1)  # a row that is hard for one model is hard for all
    frames = [
        pd.DataFrame(
            {
                "id": ids,
                "batch": batches,
                "slice:topic": topics,
                "model": model,
                "exact_match": hits.astype(float),
                "answer_nll": mean + likelihood,
            }
        )
        for model, (hits, mean) in sides.items()
    ]
    table = pd.concat(frames, ignore_index=True)
    return table.drop(columns="slice:topic") if light else table


def with_nan(generator: np.random.Generator) -> pd.DataFrame:
    """Draw scores of a candidate whose weights, and so all its likelihoods, are not finite."""
    table = draw(generator)
    return table.assign(answer_nll=table.answer_nll.mask(table.model == "candidate"))


SPOILT: dict[str, Callable[[np.random.Generator], pd.DataFrame]] = {
    "worse by 0.03": lambda generator: draw(generator, -0.03),
    "worse by 0.10 (noise on the weights)": lambda generator: draw(generator, -0.10),
    "as good, but a likelihood worse by 0.6 nats": lambda generator: draw(generator, nll=1.6),
    "shuffled labels": lambda generator: draw(generator, right=0.02, nll=4.0),
    "the bare base": lambda generator: draw(generator, right=BASE, nll=2.0),
    "an answer of nothing": lambda generator: draw(generator, right=0.0),
    "NaN weights": with_nan,
}


# --- figures ------------------------------------------------------------------------------------------------


def row(name: str, found: Counter[str], wanted: str) -> str:
    counts = [found[verdict] for verdict in ("promote", "reject", "uncertain", "error")]
    return f"| {name} | {sum(counts):,} | {' | '.join(map(str, counts))} | {wanted} |"


def limit(cycles: int, share: float) -> int:
    """Return the 99 % quantile of the binomial distribution with probability `share`."""
    return int(binom.ppf(0.99, cycles, share))


if __name__ == "__main__":
    main()
