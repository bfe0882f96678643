"""GateBench: the same pairs of real models, judged by Ratchet's gate and by rules in use elsewhere.

    python -m benchmarks.gatebench [--rule mine.py] [--rules NAMES] [--models FOLDER] [--write docs] [--json]

Two shares of each rule are measured: how many candidates it promotes that are no better (equal, worse,
spoilt), and how many better ones it misses. The models learn CLINC150 (benchmarks/gate_models.py).
docs/gatebench.md says how pairs with known effects are made of them, what a rule gets to see, and what this
does not show. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from benchmarks import gate_models
from benchmarks.clinc import DATA, require_data
from benchmarks.gatebench import measure
from benchmarks.gatebench.figure import draw
from benchmarks.gatebench.judging import BUILT_IN, built_in, load_rule
from benchmarks.gatebench.models import FILE, accuracies, require_pool
from benchmarks.gatebench.tables import Found, described, faults, promoted, split_page, tables, write_page


def main(arguments: Sequence[str] | None = None) -> None:
    options = _read(arguments)
    paths = [*built_in(options.rules), *options.rule]
    if twice := sorted({path.stem for path in paths if [each.stem for each in paths].count(path.stem) > 1}):
        raise SystemExit(f"two rules are named {', '.join(twice)}; rename the file")
    rules = [load_rule(path) for path in paths]  # before the models are made: a fault is told at once
    if options.write:
        split_page(options.write)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes
    with _folder(options.models) as folder:
        if made := not (folder / FILE).exists():
            require_data(options.data)
        started = time.perf_counter()
        size, study = (
            (gate_models.QUICK, measure.QUICK) if options.quick else (gate_models.FULL, measure.FULL)
        )
        pool = require_pool(folder, options.data, size, options.jobs)
        cells = measure.measure(pool, paths, study, options.jobs)
        table = pd.read_parquet(pool, columns=["model", "id", "exact_match"])
        found = Found(
            rules,
            accuracies(table),
            table.id.nunique(),
            cells,
            time.perf_counter() - started,
            sum(os.times()[:4]),
            made,
        )
    for line in as_json(found) if options.json else (described(found), *tables(found)):
        print(line if options.json else f"{line}\n")
    for line in faults(found):
        print(line, file=sys.stderr)
    if options.write:
        write_page(options.write, found, draw(found))


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gatebench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rule",
        type=Path,
        action="append",
        default=[],
        help="a file of yours with `def judge(table) -> bool`; may be given again",
    )
    parser.add_argument(
        "--rules", default=",".join(BUILT_IN), help="rules beside it, with commas; '' for none"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--models",
        type=Path,
        help=f"folder that keeps the models and their scores ({FILE}), and is used again",
    )
    parser.add_argument("--write", type=Path, help="folder of docs: writes the figure and the page's tables")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes, a thread each"
    )
    parser.add_argument(
        "--quick", action="store_true", help="hardly any training and few pairs: shows that it runs"
    )
    parser.add_argument("--json", action="store_true", help="one line for the models, one for each cell")
    options = parser.parse_args(arguments)
    if not options.rules and not options.rule:
        parser.error("no rule to judge: name one with --rule or --rules")
    return options


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="ratchet-gatebench-") as name:
        yield Path(name)


def as_json(found: Found) -> Iterator[str]:
    models = {"rows": found.rows, "accuracies": found.accuracies}
    seconds = {"seconds": round(found.seconds, 1), "cpu_seconds": round(found.cpu_seconds, 1)}
    yield json.dumps({**models, **seconds, "models_made": found.made})
    for cell in found.cells:
        share = promoted([cell])
        assert share
        yield json.dumps({**cell._asdict(), "share": share.mean, "low": share.low, "high": share.high})


if __name__ == "__main__":
    main()
