"""Measure the rows per second and the memory of `prepare`, with and without the search for near duplicates.

    python -m benchmarks.prepare [--rows 1000000] [--near-rows 100000]

Rows are questions of 12 words and answers of 6, drawn from the words of the standard library's documentation
by their frequency; one in a hundred repeats the row before, one in a thousand is broken. Each measurement is
a process of its own; its memory is the peak resident set minus that of a process that prepared a hundred
rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ratchet.config.data import PrepareConfig, PydocSource
from ratchet.data.batches import write_batch
from ratchet.data.words import words_of
from ratchet.sources.pydoc import harvest
from tasks.prepare import prepare

BATCH = 250_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--near-rows", type=int, default=100_000)
    parser.add_argument("--one", nargs=2, metavar=("RAW", "NEAR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(Path(arguments.one[0]), near=arguments.one[1] == "near")
        return
    print(
        "| rows | near duplicates | seconds | rows a second | accepted | rejected | duplicates | MiB over the"
        " least |\n|---|---|---|---|---|---|---|---|"
    )
    least = 0.0
    for rows, near in (
        (100, "no"),
        (arguments.rows // 4, "no"),
        (arguments.rows, "no"),
        (arguments.near_rows, "near"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder) / "raw", rows)
            found = json.loads(
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.prepare", "--one", folder, near],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.splitlines()[-1]
            )
        if rows == 100:
            least = found["mib"]
            continue
        speed = rows / found["seconds"]
        print(
            f"| {rows:,} | {near} | {found['seconds']:.1f} | {speed:,.0f} | {found['accepted']:,} |"
            f" {found['rejected']:,} | {found['duplicate']:,} | {found['mib'] - least:.0f} |",
            flush=True,
        )


def fill(raw: Path, rows: int) -> None:
    """Write `rows` rows, in batches of BATCH."""
    lines = make_rows(rows)
    for number, start in enumerate(range(0, rows, BATCH)):
        taken = [next(lines) for _ in range(min(BATCH, rows - start))]
        write_batch(
            raw,
            taken,
            source="jsonl",
            label=f"b{number}",
            time=f"2026-01-01T00:{number:02}:00Z",
            licence="CC0-1.0",
            who="benchmark",
            form="completion",
        )


def make_rows(count: int) -> Iterator[bytes]:
    chance = random.Random(7)
    frequency = Counter(
        word
        for row in harvest(PydocSource(packages=["stdlib"]))
        for word in words_of(row["messages"][0]["content"])
    )
    words, weights = list(frequency), list(frequency.values())
    drawn = chance.choices(words, weights, k=2_000_000)
    last = b"{}"
    for number in range(count):
        if number % 100 == 99:
            yield last
            continue
        at = chance.randrange(len(drawn) - 18)
        question = f"{' '.join(drawn[at : at + 6])} {number} {' '.join(drawn[at + 6 : at + 12])}"
        last = msgspec.json.encode({"prompt": question, "completion": " ".join(drawn[at + 12 : at + 18])})
        yield last[:-5] if number % 1000 == 500 else last


def measure(folder: Path, *, near: bool) -> None:
    began = time.perf_counter()
    profile = prepare(
        folder / "raw", folder / "golden.jsonl", folder / "out", PrepareConfig(near_search=near, min_rows=1)
    )
    seconds, total = time.perf_counter() - began, profile.total
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "seconds": seconds,
                "mib": mib,
                **{group: getattr(total, group)["rows"] for group in ("accepted", "rejected", "duplicate")},
            }
        )
    )


if __name__ == "__main__":
    main()
