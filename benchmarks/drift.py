"""False alarms and power of the drift verdict on real text, with Evidently's defaults in the same run.

    python -m benchmarks.drift [--windows 400] [--corpus pydoc|clinc150]

Null windows: the held-out rows are split afresh, at random, into a window and its reference, for each of them. Drifted windows: a
share of the window is of a subject that the training rows never held (`pydoc`: packages; `clinc150`: a domain, each of them in turn).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom

from ratchet.config import MonitorConfig, PydocSource
from ratchet.drift import judge
from ratchet.sources.pydoc import harvest
from ratchet.surprise import Familiar
from tasks.monitor import input_families

CLINC = Path(__file__).parents[2] / "shared/data/clinc150"
NEW_PACKAGES = ["numpy", "pandas", "sklearn"]


class Corpus(NamedTuple):
    training: list[str]
    pool: list[str]  # held out, like the training rows
    new: list[list[str]]  # subjects that they never held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=400, help="null windows of each size; a quarter as many drifted ones")
    parser.add_argument("--corpus", choices=["pydoc", "clinc150"], default="pydoc")
    parser.add_argument("--evidently", type=int, default=20, help="windows for Evidently, which takes seconds each")
    options = parser.parse_args()
    corpus, config = (read_pydoc() if options.corpus == "pydoc" else read_clinc()), MonitorConfig(resamples=500)
    print(
        f"{options.corpus}: {len(corpus.training)} training rows, {len(corpus.pool)} held out, {sum(map(len, corpus.new))} of new subjects; false_alarm_rate {config.false_alarm_rate}\n"
    )
    print("| n | of a new subject | windows | drift found | p of single columns ≤ 0.05: share of windows | Evidently's preset | seconds a window |\n|---|---|---|---|---|---|---|")
    familiar = Familiar(corpus.training)
    for size, share in ((200, 0.0), (500, 0.0), (2000, 0.0), (500, 0.1), (500, 0.25), (200, 0.1), (200, 0.25)):
        if size <= len(corpus.pool) - 200:
            print(row(corpus, familiar, config, size, share, options.windows if share == 0 else options.windows // 4, options.evidently if size == 500 else 0), flush=True)
    print(f"\n{options.windows} null windows: {binom.ppf(0.99, options.windows, config.false_alarm_rate):.0f} alarms are within the binomial 99 % limit")


def row(corpus: Corpus, familiar: Familiar, config: MonitorConfig, size: int, share: float, windows: int, evidently: int) -> str:
    chance, started = np.random.default_rng([size, int(share * 100)]), time.perf_counter()
    found, single, theirs = 0, Counter[str](), 0
    for number in range(windows):
        window, reference = cut(corpus, chance, size, share, number)
        verdict, _, columns = judge(input_families(window, reference, familiar, config), rate=config.false_alarm_rate, resamples=config.resamples, seed=number)
        found += verdict == "drift"
        single.update(column.name for column in columns if column.p <= config.false_alarm_rate)
        if number == windows - 1:
            seconds = (time.perf_counter() - started) / windows
    for number in range(evidently):
        theirs += evidently_says(*cut(corpus, chance, size, share, number))
    told = ", ".join(f"{name} {count / windows:.0%}" for name, count in sorted(single.items(), key=lambda pair: -pair[1]))
    return f"| {size} | {share:.0%} | {windows} | {found} ({found / windows:.1%}) | {told} | {f'{theirs} of {evidently}' if evidently else ''} | {seconds:.2f} |"


def cut(corpus: Corpus, chance: np.random.Generator, size: int, share: float, number: int) -> tuple[list[str], list[str]]:
    """(window, reference), no row in both."""
    order, new = chance.permutation(len(corpus.pool)), round(size * share)
    subject = corpus.new[number % len(corpus.new)]
    window = [corpus.pool[place] for place in order[: size - new]] + [subject[place] for place in chance.permutation(len(subject))[:new]]
    return window, [corpus.pool[place] for place in order[size - new :]]


def evidently_says(window: list[str], reference: list[str]) -> bool:
    """Its drift preset on the text itself, as it comes (a classifier of the two sides)."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sides = [Dataset.from_pandas(pd.DataFrame({"prompt": texts}), data_definition=DataDefinition(text_columns=["prompt"])) for texts in (window, reference)]
        found: Any = json.loads(Report([DataDriftPreset()]).run(*sides).json())
    return bool(next(metric["value"]["count"] for metric in found["metrics"] if "count" in str(metric.get("value"))))


def read_pydoc() -> Corpus:
    """60 % of the standard library's rows are trained on."""
    known, order = asked(["stdlib"]), np.random.default_rng(0)
    shuffled = [known[place] for place in order.permutation(len(known))]
    edge = int(0.6 * len(shuffled))
    return Corpus(shuffled[:edge], shuffled[edge:], [asked(NEW_PACKAGES)])


def asked(packages: list[str]) -> list[str]:
    return list(dict.fromkeys(row["messages"][0]["content"] for row in harvest(PydocSource(packages=packages, min_objects=1, summaries=0.0))))


def read_clinc() -> Corpus:
    """Five domains are known, the other five are new, one after another."""
    data, domains = (json.loads((CLINC / name).read_text(encoding="utf-8")) for name in ("data_full.json", "domains.json"))
    names = list(domains)
    domain = {intent: name for name in names for intent in domains[name]}
    rows = [(text, domain[intent]) for split in ("train", "val", "test") for text, intent in data[split]]
    known = [text for text, name in rows if name in names[:5]]
    shuffled = [known[place] for place in np.random.default_rng(0).permutation(len(known))]
    edge = int(0.6 * len(shuffled))
    return Corpus(shuffled[:edge], shuffled[edge:], [[text for text, name in rows if name == new] for new in names[5:]])


if __name__ == "__main__":
    main()
