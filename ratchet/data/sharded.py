"""Check rows and find near rows by many workers, with datatrove's executors.

The rules are those of one process: workers call `check_lines`, `shingles_of` and `sketch_of`. What depends on
the order of rows is still decided by one process (tasks/prepare.py), row by row; the costly part, checking
texts and comparing rows, is done before. Two steps write into a folder that all workers share:

    check   a shard of lines → its rows, checked; the shingles of each; its bands of LSH, by part
    pair    a part of the bands, from all shards → the pairs that are alike enough to matter
    (the deciding process reads both)

Rows with the same shingles count once, so that a question that stands there a million times makes no pairs.
A shard that was finished is not worked on again, also by a later run with the same rows and settings.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import multiprocessing.connection
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import xxhash

from ratchet.config.data import DatatroveConfig, PrepareConfig
from ratchet.data.dedup import (
    HashTable,
    PlacedRows,
    bands_for,
    least_alike,
    shingles_of,
    sketch_of,
)
from ratchet.data.examples import Example, RowError, encode_line
from ratchet.data.validation import Checked, Origin, Validator, check_lines
from ratchet.errors import ConfigError, ServiceError
from ratchet.files import write_bytes

ROWS_OF_A_PART = 500_000  # whose bands one worker holds when it looks for pairs, about 24 bytes each
PAIRS_AT_ONCE = 1_000_000
POLL_SECONDS = 1.0
GOLDEN = "golden"

BAND = np.dtype([("band", "u8"), ("key", "u8"), ("shard", "u4"), ("at", "u4")])
PAIR = np.dtype([("left", "u8"), ("right", "u8"), ("alike", "f8")])


class Shard(NamedTuple):
    """Lines of one batch: bytes `start` to `end` of `path`, the first of which is line `first`."""

    path: str
    origin: Origin
    start: int
    end: int
    first: int


class Line(msgspec.Struct, frozen=True, array_like=True):
    """A checked line: a row, or the reason why it is none."""

    number: int
    example: Example | None = None
    boilerplate: bool = False
    sanitised: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""

    def result(self) -> Checked | RowError:
        if self.example is None:
            return RowError(self.reason, self.message)
        return Checked(self.example, self.boilerplate, self.sanitised)


class Source(NamedTuple):
    """A file of rows, with the hash of its content."""

    origin: Origin
    path: Path
    sha256: str


@dataclass(frozen=True)
class CheckShard:
    """Check the lines of a shard; a step of datatrove's, called with the shard's number as `rank`."""

    folder: Path
    shards: list[Shard]
    config: PrepareConfig
    parts: int

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        shard, seen = self.shards[rank], Signatures(self.config, rank)
        out = shard_folder(self.folder, rank)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        found = check_lines(Validator(self.config), lines_of(shard), shard.origin)
        write_bytes(out / "rows.jsonl", (encode_line(self._take(*one, seen)) for one in found))
        if self.config.near_search:
            seen.write(out, self.parts)

    def _take(self, number: int, result: Checked | RowError, seen: Signatures) -> Line:
        if isinstance(result, RowError):
            return Line(number, reason=result.reason, message=str(result))
        seen.add(result.example)
        return Line(number, result.example, result.boilerplate, result.sanitised)


class Signatures:
    """The different sets of shingles in a shard, and their bands of LSH."""

    def __init__(self, config: PrepareConfig, shard: int) -> None:
        self._bands = bands_for(least_alike(config))
        self._shard = shard
        self._keys: dict[int, int] = {}  # key of a set → its place in the shard
        self._shingles: list[np.ndarray[Any, Any]] = []
        self._found: list[np.ndarray[Any, Any]] = []

    def add(self, example: Example) -> None:
        shingles = shingles_of(example)
        hashes = hashes_of(shingles)
        if (key := key_of(hashes)) in self._keys:
            return
        at = self._keys[key] = len(self._keys)
        self._shingles.append(hashes)
        bands = np.empty(self._bands, BAND)
        values = np.array(sketch_of(shingles).digest(), np.uint64).astype("<u8").reshape(self._bands, -1)
        bands["band"] = [
            xxhash.xxh3_64_intdigest(row.tobytes(), seed=number) for number, row in enumerate(values)
        ]
        bands["key"], bands["shard"], bands["at"] = key, self._shard, at
        self._found.append(bands)

    def write(self, out: Path, parts: int) -> None:
        """Write the shingles, and the bands of each part into a file of its own."""
        ends = np.cumsum([0, *map(len, self._shingles)], dtype=np.int64)
        np.save(out / "ends.npy", ends)
        np.save(out / "shingles.npy", np.concatenate([*self._shingles, np.empty(0, np.uint64)]))
        bands = np.concatenate([*self._found, np.empty(0, BAND)])
        part = bands["band"] % np.uint64(parts)
        for number in range(parts):
            np.save(out / f"bands-{number:05}.npy", bands[part == number])


@dataclass(frozen=True)
class PairPart:
    """Compare the sets that share a band of part `rank`; a step of datatrove's."""

    folder: Path
    shards: int
    config: PrepareConfig

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        files = [shard_folder(self.folder, shard) / f"bands-{rank:05}.npy" for shard in range(self.shards)]
        bands = np.concatenate(list(map(np.load, files)))
        bands = bands[np.argsort(bands["band"], kind="stable")]
        least, compare = least_alike(self.config), Shingles(self.folder)
        found = [pair for pair in self._pairs(bands, compare) if pair[2] >= least]
        path = pairs_file(self.folder, rank)
        path.parent.mkdir(exist_ok=True)
        filling = path.with_suffix(".tmp")
        with filling.open("wb") as handle:
            np.save(handle, np.array(found, PAIR))
        filling.replace(path)

    def _pairs(self, bands: np.ndarray[Any, Any], shingles: Shingles) -> Iterator[tuple[int, int, float]]:
        done: set[tuple[int, int]] = set()
        borders = np.flatnonzero(np.diff(bands["band"])) + 1
        starts, ends = np.r_[0, borders], np.r_[borders, len(bands)]
        for start, end in zip(*(part[ends - starts > 1] for part in (starts, ends)), strict=True):
            sets = {int(one["key"]): (int(one["shard"]), int(one["at"])) for one in bands[start:end]}
            keys = sorted(sets)
            for number, left in enumerate(keys):
                for right in keys[number + 1 :]:
                    if (left, right) not in done:
                        done.add((left, right))
                        yield left, right, shingles.alike(sets[left], sets[right])
            if len(done) > PAIRS_AT_ONCE:  # some are compared twice, and memory stays bounded
                done.clear()


class Shingles:
    """The shingles of the sets in all shards, read where they stand."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}

    def alike(self, left: tuple[int, int], right: tuple[int, int]) -> float:
        """Return the Jaccard similarity of two sets, as `ratchet.data.dedup.jaccard` has it."""
        one, other = self._of(*left), self._of(*right)
        shared = len(np.intersect1d(one, other, assume_unique=True))
        return shared / (len(one) + len(other) - shared)

    def _of(self, shard: int, at: int) -> np.ndarray[Any, Any]:
        if shard not in self._opened:
            out = shard_folder(self._folder, shard)
            self._opened[shard] = (np.load(out / "ends.npy"), np.load(out / "shingles.npy", mmap_mode="r"))
        ends, shingles = self._opened[shard]
        return shingles[ends[at] : ends[at + 1]]


class PairedRows(PlacedRows[int]):
    """Placed rows whose near rows were found before, as pairs of sets of shingles.

    All rows of one set stand on one side, or are refused: so the first placed row of a set stands for all.
    """

    def __init__(self, pairs: Sequence[np.ndarray[Any, Any]]) -> None:
        super().__init__()
        self._first = HashTable()  # key of a set → place of its first row
        self._alike: dict[int, dict[int, float]] = {}
        for left, right, alike in (pair.item() for part in pairs for pair in part):
            self._alike.setdefault(left, {})[right] = alike
            self._alike.setdefault(right, {})[left] = alike

    def sign(self, example: Example) -> int:
        return key_of(hashes_of(shingles_of(example)))

    def close(self, signed: int) -> list[tuple[int, float]]:
        found = [(self._first.get(signed), 1.0)]
        found += [(self._first.get(other), alike) for other, alike in self._alike.get(signed, {}).items()]
        return sorted((place, alike) for place, alike in found if place is not None)

    def add(self, example: Example, side: str, signed: int) -> int:
        place = super().add(example, side, signed)
        self._first.put(signed, place)
        return place


class ShardedRows:
    """What the workers found: the checked lines of each batch, and the near rows."""

    def __init__(self, folder: Path, shards: list[Shard], parts: int) -> None:
        self._folder, self._shards, self._parts = folder, shards, parts

    def of(self, batch: str) -> Iterator[tuple[int, Checked | RowError]]:
        """Yield the checked lines of a batch, in their order."""
        decoder = msgspec.json.Decoder(Line)
        for number, shard in enumerate(self._shards):
            if shard.origin.batch == batch:
                with (shard_folder(self._folder, number) / "rows.jsonl").open("rb") as lines:
                    for raw in lines:
                        line = decoder.decode(raw)
                        yield line.number, line.result()

    @cached_property
    def near(self) -> PairedRows:
        return PairedRows([np.load(pairs_file(self._folder, part)) for part in range(self._parts)])

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def shard_rows(
    sources: Sequence[Source], config: PrepareConfig, home: Path, tell: Callable[[str], object]
) -> ShardedRows:
    """Let workers check the rows of `sources` and find which are near; wait for them.

    What they make stands under `home`, and what an earlier run with the same rows and settings finished there
    is taken over. Raises ConfigError without datatrove, ServiceError when a shard fails for good.
    """
    require_datatrove(config.datatrove)
    folder = home / identity_of(sources, config)
    for other in home.glob("*") if home.exists() else []:
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)  # of other rows or settings
    shards = [shard for source in sources for shard in cut(source, config.datatrove.shard_rows)]
    rows = len(shards) * config.datatrove.shard_rows
    parts = max(8, rows // ROWS_OF_A_PART) if config.near_search else 0
    steps: list[tuple[str, Callable[..., None], int]] = [
        ("check", CheckShard(folder, shards, config, parts), len(shards)),
        ("pair", PairPart(folder, len(shards), config), parts),
    ]
    for name, step, tasks in steps:
        began = time.monotonic()
        done = run_step(step, tasks, folder / "logs" / name, config.datatrove)
        tell(
            f"prepare: {name}: {done} of {tasks} shards in {time.monotonic() - began:.0f} s, "
            f"{config.datatrove.workers} workers ({config.datatrove.executor}); the others were done before"
        )
    return ShardedRows(folder, shards, parts)


def require_datatrove(config: DatatroveConfig) -> None:
    try:
        import datatrove.executor  # noqa: F401
    except ImportError:
        raise ConfigError(
            "prepare.engine is `datatrove`, and the package datatrove is not installed",
            remedy="uv pip install 'datatrove>=0.10.1' (the extra `scale`), or set prepare.engine: local",
        ) from None
    if config.executor == "ray":
        try:
            import ray  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            raise ConfigError(
                "prepare.datatrove.executor is `ray`, and the package ray is not installed",
                remedy="uv pip install 'ray[default]', on every node, or choose another executor",
            ) from None
    if config.executor == "slurm" and not shutil.which("sbatch"):
        raise ConfigError(
            "prepare.datatrove.executor is `slurm`, and there is no command sbatch",
            remedy="run it on a machine that may submit jobs, or choose another executor",
        )


def identity_of(sources: Sequence[Source], config: PrepareConfig) -> str:
    """Return a name for what the workers make: from the rows, the settings, and this package's code."""
    asked = config.model_dump(mode="json", exclude={"engine": True, "datatrove": {*_NOT_IDENTITY}})
    hashed = hashlib.sha256(msgspec.json.encode([asked, [(*one.origin, one.sha256) for one in sources]]))
    for path in sorted(Path(__file__).parent.glob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


_NOT_IDENTITY = ("executor", "workers", "tries", "partition", "time_limit")


def cut(source: Source, rows: int) -> Iterator[Shard]:
    """Cut a file into shards of `rows` lines."""
    start = end = 0
    first = number = 1
    with source.path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            end += len(line)
            if number - first + 1 == rows:
                yield Shard(str(source.path.resolve()), source.origin, start, end, first)
                start, first = end, number + 1
    if end > start:
        yield Shard(str(source.path.resolve()), source.origin, start, end, first)


def lines_of(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line without its end) of a shard."""
    with Path(shard.path).open("rb") as handle:
        handle.seek(shard.start)
        number, left = shard.first, shard.end - shard.start
        while left > 0:
            line = handle.readline()
            left -= len(line)
            yield number, line.rstrip(b"\n")
            number += 1


def hashes_of(shingles: frozenset[str]) -> np.ndarray[Any, Any]:
    """Return the shingles as sorted hashes of 64 bits."""
    return np.unique(np.array([xxhash.xxh3_64_intdigest(one.encode()) for one in shingles], np.uint64))


def key_of(hashes: np.ndarray[Any, Any]) -> int:
    """Return 64 bits that stand for a set of shingles."""
    return xxhash.xxh3_64_intdigest(hashes.tobytes())


def shard_folder(folder: Path, shard: int) -> Path:
    return folder / "shards" / f"{shard:06}"


def pairs_file(folder: Path, part: int) -> Path:
    return folder / "pairs" / f"{part:05}.npy"


# --- executors ----------------------------------------------------------------------------------------------


def run_step(step: Callable[..., None], tasks: int, logs: Path, config: DatatroveConfig) -> int:
    """Run a step for each shard that is not done, and return how many that were. Raises ServiceError."""
    run = {"local": _run_here, "slurm": _run_by_slurm, "ray": _run_by_ray}[config.executor]
    left = before = unfinished(step, tasks, logs)
    for _ in range(config.tries):
        if not left:
            break
        run(step, tasks, logs, config)
        left = unfinished(step, tasks, logs)
    if left:
        raise ServiceError(
            f"{len(left)} of {tasks} shards failed {config.tries} times, the first is {left[0]}",
            remedy=f"{logs / 'logs'} says why; what is done stays done when you run it again",
        )
    return len(before)


def unfinished(step: Callable[..., None], tasks: int, logs: Path) -> list[int]:
    if not tasks:
        return []
    return list(_local(step, tasks, logs).get_incomplete_ranks())


def _local(step: Callable[..., None], tasks: int, logs: Path) -> Any:
    from datatrove.executor import LocalPipelineExecutor

    return LocalPipelineExecutor([step], tasks=tasks, workers=1, logging_dir=str(logs))


def _run_here(step: Callable[..., None], tasks: int, logs: Path, config: DatatroveConfig) -> None:
    """Run each shard in a process of its own, `workers` at a time.

    datatrove's own pool waits for ever for a worker that was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__, "datatrove.executor"])
    waiting, running = unfinished(step, tasks, logs), dict[int, Any]()
    try:
        while waiting or running:
            while waiting and len(running) < config.workers:
                rank = waiting.pop(0)
                running[rank] = context.Process(target=_run_rank, args=(step, tasks, logs, rank))
                running[rank].start()
            multiprocessing.connection.wait([one.sentinel for one in running.values()])
            for rank in [rank for rank, one in running.items() if not one.is_alive()]:
                running.pop(rank).close()
    finally:
        for one in running.values():
            one.terminate()
            one.join()


def _run_rank(step: Callable[..., None], tasks: int, logs: Path, rank: int) -> None:
    _local(step, tasks, logs)._run_for_rank(rank, local_rank=1)  # 1: the log goes to a file alone


def _run_by_slurm(step: Callable[..., None], tasks: int, logs: Path, config: DatatroveConfig) -> None:
    """Submit an array of jobs, and wait until Slurm knows none of them any more."""
    from datatrove.executor import SlurmPipelineExecutor

    executor = SlurmPipelineExecutor(
        [step],
        tasks=tasks,
        workers=config.workers,
        time=config.time_limit,
        partition=config.partition,
        job_name=f"ratchet-{logs.name}",
        logging_dir=str(logs),
        venv_path=str(Path(sys.prefix) / "bin" / "activate"),
        qos="",
    )
    executor.run()
    while unfinished(step, tasks, logs):
        time.sleep(POLL_SECONDS)
        asked = ["squeue", "--noheader", "--jobs", str(executor.job_id)]
        listed = subprocess.run(asked, check=False, capture_output=True, text=True)
        if listed.returncode or not listed.stdout.strip():
            return


def _run_by_ray(step: Callable[..., None], tasks: int, logs: Path, config: DatatroveConfig) -> None:
    from datatrove.executor import RayPipelineExecutor

    RayPipelineExecutor([step], tasks=tasks, workers=config.workers, logging_dir=str(logs)).run()
