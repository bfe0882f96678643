"""Measure what a row costs in each step of a preparation by workers, and what a request costs its client.

    python -m benchmarks.scale [--rows 100000] [--requests 1000]

Rows are those of `benchmarks.prepare`. Each step runs in this process, on one core, without datatrove around
it: CPU seconds a row, bytes a row that it writes, and the memory that the deciding process takes a row. The
requests go to two servers that answer at once, each in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.prepare import fill
from ratchet.config.data import PrepareConfig
from ratchet.config.synthesis import TeacherConfig
from ratchet.data.batches import Batch, read_manifest
from ratchet.data.erasure import Forgotten
from ratchet.data.examples import encode_line
from ratchet.data.sharded import CheckShard, PairPart, Shard, ShardedRows, Source, cut
from ratchet.llm.budget import Budget
from ratchet.llm.client import Teacher
from ratchet.llm.prompts import Prompt
from ratchet.llm.replies import Score
from tasks.prepare import Incoming, origin_of, prepare, sort_batches

SHARD, PARTS = 25_000, 8
CONFIG = PrepareConfig(min_rows=1)
SERVER = """
import json, socket, uvicorn
text = json.dumps({"score": 0.5, "reason": "it says what the question asks for"})
choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
usage = {"prompt_tokens": 100, "completion_tokens": 16}
answer = json.dumps({"choices": [choice], "usage": usage}).encode()
async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    head = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": answer})
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off")).run(sockets=[listener])
"""


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
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    rows = arguments.rows
    print("| step | CPU µs a row | bytes a row on the disk | bytes a row in memory |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for cost in measure(Path(folder), rows):
            print(
                f"| {cost.step} | {cost.seconds / rows * 1e6:,.0f} | {cost.size / rows:,.0f} | "
                f"{f'{cost.mib * 2**20 / rows:,.0f}' if cost.mib else ''} |",
                flush=True,
            )
    seconds = measure_client(arguments.requests)
    print(f"\na request to a model: {seconds / arguments.requests * 1e3:.2f} ms of the client's CPU")


def measure_client(requests: int) -> float:
    """Return the CPU seconds that the client takes for so many requests."""
    servers = [
        subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        urls = [f"{server.stdout.readline().strip()}/v1" for server in servers if server.stdout]
        return asyncio.run(ask(urls, requests))
    finally:
        for server in servers:
            server.kill()
            server.communicate()


async def ask(urls: list[str], requests: int) -> float:
    config = TeacherConfig(url=urls[0], more_urls=urls[1:], model="m", parallel=16)
    teacher = Teacher(config, Budget(max_cost=0, max_tokens=sys.maxsize))
    prompt = Prompt("p", "Score the answer.", "Is hail covered? " * 20)
    try:
        await teacher.ask(prompt, Score, seed=0)
        began = time.process_time()
        for start in range(0, requests, 100):
            numbers = range(start, min(start + 100, requests))
            await asyncio.gather(*(teacher.ask(prompt, Score, seed=number) for number in numbers))
        return time.process_time() - began
    finally:
        await teacher.close()


def measure(folder: Path, rows: int) -> list[Cost]:
    """Run the steps over `rows` rows, and return what each cost; a few rows before warm the process."""
    work(folder / "warm", 500)
    costs = work(folder / "real", rows)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as apart:  # so that its memory is its own
        apart.submit(decide, folder / "warm").result()
        costs.append(apart.submit(decide, folder / "real").result())
    whole = partial(
        prepare, folder / "real" / "raw", folder / "none.jsonl", folder / "real" / "local", CONFIG
    )
    return [*costs, timed("the engine `local`, all steps", whole, folder / "real")]


def work(folder: Path, rows: int) -> list[Cost]:
    """Do the workers' part of a preparation of `rows` rows."""
    fill(folder / "raw", rows)
    _, shards = read(folder)
    check = CheckShard(folder / "work", shards, CONFIG, PARTS)
    pair = PairPart(folder / "work", len(shards), CONFIG)

    def each(step: Callable[..., None], tasks: int) -> None:
        for rank in range(tasks):
            step(None, rank)

    return [
        Cost("raw rows", 0.0, size_of(folder / "raw")),
        timed("check (workers)", partial(each, check, len(shards)), folder / "work"),
        timed("pair (workers)", partial(each, pair, PARTS), folder / "work"),
    ]


def read(folder: Path) -> tuple[list[Batch], list[Shard]]:
    manifest = read_manifest(folder / "raw")
    sources = [Source(origin_of(batch), folder / "raw" / batch.name, batch.sha256) for batch in manifest]
    return manifest, [shard for source in sources for shard in cut(source, SHARD)]


def decide(folder: Path) -> Cost:
    """Do the deciding process's part; `mib` is by how much its memory grew at most."""
    manifest, shards = read(folder)
    batches = [Incoming(origin_of(batch), batch.rows, ()) for batch in manifest]
    before, peak, kept = resident(), 0.0, 0

    def keep(_: str, row: object) -> None:
        nonlocal peak, kept
        kept += 1
        out.write(encode_line(row))
        if kept % 1000 == 0:
            peak = max(peak, resident() - before)

    def sort() -> None:
        sharded = ShardedRows(folder / "work", shards, PARTS)
        sort_batches(batches, folder / "golden.jsonl", CONFIG, Forgotten(), keep, sharded)

    with (folder / "out.jsonl").open("wb") as out:
        cost = timed("decide (one process)", sort, folder)
    return cost._replace(size=size_of(folder / "out.jsonl"), mib=peak)


def timed(step: str, work: Callable[[], object], folder: Path) -> Cost:
    """Run a step, and return its CPU time and by how much `folder` grew."""
    size, began = size_of(folder), time.process_time()
    work()
    return Cost(step, time.process_time() - began, size_of(folder) - size)


def size_of(folder: Path) -> int:
    files = [folder] if folder.is_file() else folder.rglob("*")
    return sum(path.stat().st_size for path in files if path.is_file())


def resident() -> float:
    """Return the resident set of this process, in MiB."""
    return float(psutil.Process().memory_info().rss) / 2**20


if __name__ == "__main__":
    main()
