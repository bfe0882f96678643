"""Measure what a loop of continuous retraining is worth, and each of its parts: docs/loopbench.md.

    python -m benchmarks.loopbench [--seeds 5] [--weeks 26] [--policies ours,weekly] [--quick] [--json]

Real small models are trained on CLINC150 for a simulated half-year; preparation, training, evaluation, gate,
rollout and monitor are the project's own functions. A seed gives the same table each time, apart from the
seconds. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from benchmarks.clinc import DATA, one_thread, require_data
from benchmarks.loopbench.policies import POLICIES, Policy
from benchmarks.loopbench.scores import Score, score_all
from benchmarks.loopbench.simulate import simulate
from benchmarks.loopbench.tables import tables
from benchmarks.loopbench.workshop import Workshop, require_base
from benchmarks.loopbench.world import Size, make_world

QUICK = Size(weeks=3, first=6, golden=20, batch=60, questions=60, requests=300, base_steps=30, epochs=1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _read(arguments)
    require_data(options.data)
    size = QUICK if options.quick else Size()
    size = size._replace(weeks=options.weeks or size.weeks)
    chosen = [POLICIES[name] for name in options.policies.split(",")]
    started, told = time.perf_counter(), sys.stdout
    found: list[Score] = []
    with _folder(options.models) as folder, redirect_stdout(sys.stderr):
        one_thread(str(folder))
        base = require_base(folder, options.data, size)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            scores = run_seed(options.data, base, size, seed, chosen)
            found += scores
            for score in scores if options.json else ():
                print(json.dumps(score._asdict()), file=told, flush=True)
    if not options.json:
        print("\n".join(tables(found, size)), file=told)
    print(f"\n{time.perf_counter() - started:.0f} s, {time.process_time():.0f} of a core", file=sys.stderr)


def run_seed(data: Path, base: Path, size: Size, seed: int, policies: Sequence[Policy]) -> list[Score]:
    """Run all policies in the world of one seed."""
    world = make_world(data, size, seed)
    with tempfile.TemporaryDirectory(prefix="ratchet-loopbench-") as name:
        workshop = Workshop(Path(name), base, world)
        names = {-1: workshop.add_batch(world.first, 0)}
        arrived = [(at, tick.batch) for at, tick in enumerate(world.ticks) if tick.batch]
        names |= {at: workshop.add_batch(batch, at + 1) for at, batch in arrived}
        runs = []
        for policy in policies:
            began = time.process_time()
            runs.append(simulate(policy, workshop, names))
            share = sum(runs[-1].right) / sum(runs[-1].requests)
            print(
                f"loopbench: seed {seed}, {policy.name}: right {share:.3f},"
                f" {time.process_time() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return score_all(runs, workshop)


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loopbench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--weeks", type=int, help="26 by default; the mishaps keep their places in the time")
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help="with commas; the oracle is always there"
    )
    parser.add_argument("--models", type=Path, help="folder that keeps the base, and is used again")
    parser.add_argument("--quick", action="store_true", help="three weeks and hardly any training: it runs")
    parser.add_argument("--json", action="store_true", help="one line for each policy and seed")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.policies.split(",") if name not in POLICIES]:
        parser.error(f"no policy {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    return options


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="ratchet-loopbench-base-") as name:
        yield Path(name)


if __name__ == "__main__":
    main()
