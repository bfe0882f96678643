"""Measure what replay keeps: CLINC150's domains arrive one after the other, each starts a retraining, and at
the end all earlier domains are tested again.

    python -m benchmarks.forgetting [--data ../shared/data/clinc150] [--quick] [--jobs 2] [--json]

Every arrival takes the project's own path: `tasks.tokenize` chooses the rows (those of the new domain and the
replayed share of the seen ones), `tasks.train` trains on them from the champion's adapter, and the new
adapter becomes the champion. The arm `all` trains on all rows from the base each time. The base has the
demo's shape and is pre-trained on four other domains; queries are the questions, intents' names the answers.
A seed draws the order of domains, the rows and the order of windows, the same for all arms. `kept` is the
accuracy on the test rows of the domains before the last one, `newest` that on the last one's; `forgotten` is
the accuracy that a domain lost since it was learned. Intervals are 95 % over seeds (Student's t); `against
all` is the difference of `kept` within a seed. Each job has one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import clinc
from benchmarks.clinc import DATA, READ, Counts, make_base, one_thread, read_domain, require_data, unread
from ratchet.config.params import Config
from ratchet.data.examples import Example, encode_line
from ratchet.files import read_json, write_bytes, write_json

ARMS = ("0", "0.05", "0.1", "0.25", "0.5", "1", "all")
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds


class Size(NamedTuple):
    """`train`, `validation`, `test`: rows per intent."""

    domains: int
    seeds: int
    train: int
    validation: int
    test: int
    steps: int  # of the base's pre-training
    epochs: float

    @property
    def counts(self) -> Counts:
        return Counts(self.train, self.validation, self.test)


FULL, QUICK = Size(6, 3, 20, 4, 10, 600, 8.0), Size(2, 1, 6, 2, 2, 20, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--quick", action="store_true", help="two domains, one seed, hardly any training: shows that it runs"
    )
    parser.add_argument("--domains", type=int, help="arriving domains, 6 at most")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--runs",
        type=Path,
        help="file to keep each arm and seed in, as it ends; what stands in it is not measured again",
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    require_data(arguments.data)
    size = QUICK if arguments.quick else FULL
    size = size._replace(domains=arguments.domains or size.domains, seeds=arguments.seeds or size.seeds)
    with contextlib.redirect_stdout(sys.stderr):  # progress goes to stderr; only the table is the result
        found = measure(arguments.data, arguments.arms.split(","), size, arguments.jobs, arguments.runs)
    rows = [
        describe(
            arm, [run for run in found if run["arm"] == arm], [run for run in found if run["arm"] == "all"]
        )
        for arm in arguments.arms.split(",")
    ]
    if arguments.json:
        print("\n".join(json.dumps(row) for row in rows))
    else:
        print("\n".join(table(rows, size)))


def measure(
    data: Path, arms: list[str], size: Size, jobs: int, kept: Path | None = None
) -> list[dict[str, Any]]:
    """Return a dict per arm and seed."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept and kept.exists() else []
    known = {
        (run["arm"], run["seed"]): run
        for run in map(json.loads, lines)
        if run["size"] == list(size._replace(seeds=0))
    }
    wanted = [(arm, seed) for seed in range(size.seeds) for arm in reversed(arms)]
    found = [known[each] for each in wanted if each in known]
    if len(found) < len(wanted):
        with tempfile.TemporaryDirectory() as folder:
            make_base(Path(folder) / "base", data, size.counts, settings("all", 0, size).base)
            with ProcessPoolExecutor(
                jobs,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=one_thread,
                initargs=(folder,),
            ) as pool:
                for done in as_completed(
                    [
                        pool.submit(run, Path(folder), data, arm, seed, size)
                        for arm, seed in wanted
                        if (arm, seed) not in known
                    ]
                ):
                    found.append(_said(done.result(), kept))
    return found


def _said(run: dict[str, Any], kept: Path | None) -> dict[str, Any]:
    print(
        f"seed {run['seed']}, {run['arm']:>4}: kept {run['kept']:.3f}, newest {run['newest']:.3f},"
        f" {run['seconds']:.0f} s of training",
        file=sys.stderr,
        flush=True,
    )
    if kept:
        with kept.open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
    return run


def settings(arm: str, seed: int, size: Size) -> Config:
    chosen: dict[str, Any] = (
        {"start_from": "base", "rows": "all"}
        if arm == "all"
        else {"start_from": "champion", "replay": float(arm)}
    )
    return clinc.settings(size.steps, size.epochs, seed, **chosen)


# --- one arm ------------------------------------------------------------------------------------------------


def run(folder: Path, data: Path, arm: str, seed: int, size: Size) -> dict[str, Any]:
    from ratchet.models.loading import MANIFEST
    from tasks.tokenize import tokenize
    from tasks.train import train

    order = random.Random(seed).sample(unread(data), size.domains)
    domains = {name: read_domain(data, name, size.counts, seed) for name in order}
    own = {name: read_domain(data, name, size.counts, seed).test for name in READ}
    config, base, place = settings(arm, seed, size), folder / "base", folder / f"{arm}-{seed}"
    incumbent, learned, seconds, rows = place / "nobody", {}, [], []
    write_json(incumbent / MANIFEST, {"version": None, "batches": []})
    for number, name in enumerate(order, start=1):
        seen = [domains[each] for each in order[:number]]
        write_bytes(
            place / "prepared/train.jsonl", (encode_line(row) for domain in seen for row in domain.train)
        )
        write_bytes(
            place / "prepared/validation.jsonl",
            (encode_line(row) for domain in seen for row in domain.validation),
        )
        for split in ("test", "golden"):  # each domain's test rows are asked below
            write_bytes(place / f"prepared/{split}.jsonl", [])
        profile = tokenize(place / "prepared", base, incumbent, place / "tokens", config)
        began = time.perf_counter()
        train(place / "tokens", base, incumbent, place / f"v{number}", place / "reports", config)
        seconds.append(time.perf_counter() - began)
        rows.append(profile.train.rows)
        incumbent = place / f"v{number}"
        write_json(incumbent / MANIFEST, {**read_json(incumbent / MANIFEST), "version": number})
        learned[name] = accuracy(base, incumbent, {name: domains[name].test}, config)[name]
    end = accuracy(base, incumbent, {**{name: domains[name].test for name in order}, **own}, config)
    forgotten = {name: learned[name] - end[name] for name in order[:-1]}
    return {
        "arm": arm,
        "seed": seed,
        "size": list(size._replace(seeds=0)),
        "order": order,
        "kept": statistics.mean(end[name] for name in order[:-1]),
        "newest": end[order[-1]],
        "forgotten": statistics.mean(forgotten.values()),
        "forgotten_by_domain": forgotten,
        "base_domains": statistics.mean(end[name] for name in READ),
        "seconds": sum(seconds),
        "last_seconds": seconds[-1],
        "last_rows": rows[-1],
    }


def accuracy(base: Path, adapter: Path, tests: dict[str, list[Example]], config: Config) -> dict[str, float]:
    """Return the share of exactly right answers by domain."""
    from ratchet.evaluation.scoring import Asked, Models, Player, answer

    rows = [row for test in tests.values() for row in test]
    asked = Asked(rows, [str(row.meta["batch"]) for row in rows])
    given = iter(
        answer(Player("candidate", base, adapter, adapter), Models(), asked, config.evaluate).answers
    )
    return {name: statistics.mean(next(given) == row.answer for row in test) for name, test in tests.items()}


# --- the table ----------------------------------------------------------------------------------------------


def describe(arm: str, runs: list[dict[str, Any]], against: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an arm's means, with 95 % intervals over seeds."""
    whole = {run["seed"]: run["kept"] for run in against}
    measured = {
        key: interval([run[key] for run in runs]) for key in ("kept", "newest", "forgotten", "base_domains")
    }
    differences = [run["kept"] - whole[run["seed"]] for run in runs if run["seed"] in whole]
    domains = sorted({name for run in runs for name in run["forgotten_by_domain"]})
    return {
        "arm": arm,
        "seeds": len(runs),
        **measured,
        "against_all": interval(differences) if differences else None,
        "forgotten_by_domain": {
            name: statistics.mean(
                run["forgotten_by_domain"][name] for run in runs if name in run["forgotten_by_domain"]
            )
            for name in domains
        },
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "last_seconds": statistics.mean(run["last_seconds"] for run in runs),
        "last_rows": runs[0]["last_rows"],
    }


def interval(values: list[float]) -> dict[str, float | None]:
    mean = statistics.mean(values)
    if len(values) not in T:
        return {"mean": mean, "low": None, "high": None}
    half = T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def table(rows: list[dict[str, Any]], size: Size) -> list[str]:
    names = {"all": "everything from the base"}
    lines = [
        (
            "| replay | kept | against all | newest | forgotten a domain | worst domain | rows in the last |"
            " training s, all; last |"
        ),
        f"|{'---|' * 8}",
    ]
    for row in rows:
        worst = max(row["forgotten_by_domain"].items(), key=lambda item: item[1])
        lines.append(
            f"| {names.get(row['arm'], row['arm'])} | {_cell(row['kept'])} | {_cell(row['against_all'], '+')}"
            f" | {_cell(row['newest'])} | {_cell(row['forgotten'], '+')} | {worst[0]} {worst[1]:+.3f} |"
            f" {row['last_rows']} | {row['seconds']:.0f}; {row['last_seconds']:.0f} |"
        )
    return [
        (
            f"{size.domains} retrainings, {size.seeds} seeds, {15 * size.train} training and {15 * size.test}"
            " test rows a domain"
        ),
        "",
        *lines,
    ]


def _cell(found: dict[str, float | None] | None, sign: str = "") -> str:
    if not found:
        return ""
    low, high = found["low"], found["high"]
    return f"{found['mean']:{sign}.3f}" + (
        f" [{low:{sign}.3f}, {high:{sign}.3f}]" if low is not None and high is not None else ""
    )


if __name__ == "__main__":
    main()
