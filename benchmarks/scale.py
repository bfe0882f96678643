"""Measure what a row costs in each step of a preparation by many workers, as docs/scale.md uses it.

    python -m benchmarks.scale [--rows 100000]

Rows are those of `benchmarks.prepare`. Each step runs in this process, on one core, without datatrove around
it: CPU seconds a row, bytes a row that it writes, and the memory that the deciding process takes a row.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.prepare import fill
from ratchet.config.data import PrepareConfig
from ratchet.data.batches import read_manifest
from ratchet.data.erasure import Forgotten
from ratchet.data.examples import encode_line
from ratchet.data.sharded import CheckShard, PairPart, ShardedRows, Source, cut
from tasks.prepare import Incoming, origin_of, sort_batches

SHARD, PARTS = 25_000, 8


class Cost(NamedTuple):
    """The cost of a step: CPU seconds, bytes on the disk, MiB of memory that it added."""

    step: str
    seconds: float
    size: int
    mib: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    print("| step | CPU µs a row | bytes a row on the disk | bytes a row in memory |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as warm:
        measure(Path(warm), 500)  # loads what is loaded once
    with tempfile.TemporaryDirectory() as folder:
        for cost in measure(Path(folder), rows):
            print(
                f"| {cost.step} | {cost.seconds / rows * 1e6:,.0f} | {cost.size / rows:,.0f} | "
                f"{f'{cost.mib * 2**20 / rows:,.0f}' if cost.mib else ''} |",
                flush=True,
            )


def measure(folder: Path, rows: int) -> list[Cost]:
    """Run the steps over `rows` rows, and return what each cost."""
    raw, work, config = folder / "raw", folder / "work", PrepareConfig(min_rows=1)
    fill(raw, rows)
    manifest = read_manifest(raw)
    sources = [Source(origin_of(batch), raw / batch.name, batch.sha256) for batch in manifest]
    shards = [shard for source in sources for shard in cut(source, SHARD)]
    check = CheckShard(work, shards, config, PARTS)
    pair = PairPart(work, len(shards), config)
    costs = [Cost("raw rows", 0.0, size_of(raw))]

    def each(step: Callable[..., None], tasks: int) -> None:
        for rank in range(tasks):
            step(None, rank)

    costs.append(timed("check (workers)", partial(each, check, len(shards)), work))
    costs.append(timed("pair (workers)", partial(each, pair, PARTS), work))
    out, before = folder / "out.jsonl", resident()
    sharded = ShardedRows(work, shards, PARTS)
    batches = [Incoming(origin_of(batch), batch.rows, ()) for batch in manifest]

    def decide() -> None:
        with out.open("wb") as handle:
            sort_batches(
                batches,
                folder / "golden.jsonl",
                config,
                Forgotten(),
                lambda _, row: handle.write(encode_line(row)),
                sharded,
            )

    found = timed("decide (one process)", decide, work)
    costs.append(found._replace(size=out.stat().st_size, mib=resident() - before))
    return costs


def timed(step: str, work: Callable[[], object], folder: Path) -> Cost:
    """Run a step, and return its CPU time and by how much `folder` grew."""
    size, began = size_of(folder), time.process_time()
    work()
    return Cost(step, time.process_time() - began, size_of(folder) - size)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def resident() -> float:
    """Return the largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
