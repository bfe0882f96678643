"""Measure false alarms and power of the monitor's verdict on real text, and Evidently's defaults beside it.

    python -m benchmarks.drift [--windows 400] [--corpus pydoc|clinc150] [--kinds [PATTERN]]

Null windows: for each window, the held-out rows are split at random into a window and its reference. Every
family is judged, as in the monitor: prompts and answers are real; latency, errors, feedback and NLL are drawn
from the same distributions on both sides. New subjects: a share of the window is of subjects that the
training rows never held (`pydoc`: packages; `clinc150`: one of five domains, in turn), answered like known
rows, so that only the prompts can show it. Then the other kinds of drift, each by itself.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom, norm
from threadpoolctl import threadpool_limits

from ratchet.config.data import PydocSource
from ratchet.config.monitoring import MonitorConfig
from ratchet.monitoring.drift import WEIGHTS, judge
from ratchet.monitoring.families import Answered, Reference, all_families
from ratchet.monitoring.novelty import Familiar
from ratchet.monitoring.request_records import Feedback, Logged
from ratchet.sources.pydoc import harvest

CLINC = Path(__file__).parents[2] / "shared/data/clinc150"
NEW_PACKAGES = ["numpy", "pandas", "sklearn"]
CONFIG = MonitorConfig(resamples=500)
PICTURED = ("pictures", "recordings", "what pictures show")
CELLS = ((200, 0.0), (500, 0.0), (2000, 0.0), (500, 0.05), (500, 0.1), (500, 0.25), (200, 0.1), (200, 0.25))
EARLIER, PROCESSES = 1000, 2
Chance = np.random.Generator


class Row(NamedTuple):
    text: str
    answer: str


Change = Callable[
    [list[Row], list[Row], Chance], tuple[list[Row], list[Row]]
]  # of a window and its reference


class Corpus(NamedTuple):
    training: list[str]
    pool: list[Row]  # held out, of the same subjects as the training rows
    new: list[list[str]]  # the texts of each subject that they never held


class Service(NamedTuple):
    """How requests are drawn: the shares of errors and of right answers, the latency's factor, and the nats
    added to the prompt's NLL.
    """

    errors: float = 0.01
    right: float = 0.8
    slower: float = 1.0
    nll: float = 0.0


class Seen(NamedTuple):
    drift: bool
    low: list[str]  # columns whose own p is at most the rate
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--windows",
        type=int,
        default=400,
        help="null windows of each size; of new subjects a quarter as many, of other kinds an eighth",
    )
    parser.add_argument("--corpus", choices=["pydoc", "clinc150"], default="pydoc")
    parser.add_argument(
        "--evidently", type=int, default=10, help="windows for Evidently, which takes a second each"
    )
    parser.add_argument(
        "--kinds",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="only the other kinds whose names match, with the monitor's own number of draws",
    )
    options = parser.parse_args()
    started = time.perf_counter()
    corpus = read_pydoc() if options.corpus == "pydoc" else read_clinc()
    rows = (
        f"{len(corpus.training)} training rows, {len(corpus.pool)} held out, {sum(map(len, corpus.new))} of"
        " new subjects"
    )
    print(
        f"{options.corpus}: {rows}; false_alarm_rate {CONFIG.false_alarm_rate}; {CONFIG.resamples} draws a"
        " window; the seed is the window's number\n"
    )
    _given.update(corpus=corpus, familiar=measured(corpus))
    if options.kinds is not None:
        _given["config"] = MonitorConfig()
        tell_kinds(options.windows // 8, options.kinds)
        return
    print(
        "| requests | of new subjects | windows | drift found | single columns with p ≤ 0.05 | Evidently's"
        " preset | seconds a window |\n|---|---|---|---|---|---|---|"
    )
    for size, share in CELLS:
        found = look(size, share, "none", options.windows if share == 0 else options.windows // 4)
        theirs = [
            evidently_says(*draw_rows(corpus, size, share, number))
            for number in range(options.evidently if size == 500 else 0)
        ]
        print(
            f"| {size} | {share:.0%} | {cells(found)} | {f'{sum(theirs)} of {len(theirs)}' if theirs else ''}"
            f" | {np.mean([one.seconds for one in found]):.2f} |",
            flush=True,
        )
    tell_kinds(options.windows // 8)
    print(
        f"\nOf {options.windows} null windows {binom.ppf(0.99, options.windows, CONFIG.false_alarm_rate):.0f}"
        " alarms are within the binomial 99 % limit."
    )
    print(f"{time.perf_counter() - started:.0f} s, {PROCESSES} processes.")


def tell_kinds(windows: int, pattern: str = "") -> None:
    print(
        "\n| another kind, 500 requests | best possible | windows | drift found"
        " | single columns with p ≤ 0.05 |\n|---|---|---|---|---|"
    )
    for name, kind in KINDS.items():
        if name != "none" and re.search(pattern, name):
            best = f"{kind.bound():.0%}" if kind.bound else ""
            print(f"| {name} | {best} | {cells(look(500, 0.0, name, windows))} |", flush=True)


def best_of_means(
    family: str, fallen: float, spread: tuple[float, float], rows: tuple[int, int]
) -> Callable[[], float]:
    """Return the power of the best test of two means, at the family's share of the error.

    `spread` is the standard deviation of a row before and now, `rows` the numbers of rows now and before.
    """

    def power() -> float:
        texts = [name for name in WEIGHTS if name not in PICTURED]
        rate = CONFIG.false_alarm_rate * WEIGHTS[family] / sum(WEIGHTS[name] for name in texts)
        still = spread[0] * np.sqrt(1 / rows[0] + 1 / rows[1])
        moved = np.sqrt(spread[1] ** 2 / rows[0] + spread[0] ** 2 / rows[1])
        return float(norm.cdf((fallen - norm.isf(rate) * still) / moved))

    return power


def measured(corpus: Corpus) -> Familiar:
    """Measure the novelty of all texts once, before the processes are forked."""
    familiar = Familiar(corpus.training)
    familiar.columns([row.text for row in corpus.pool] + [text for subject in corpus.new for text in subject])
    return familiar


_given: dict[str, Any] = {}  # inherited by forked processes


def look(size: int, share: float, kind: str, windows: int) -> list[Seen]:
    with get_context("fork").Pool(PROCESSES) as pool:
        return pool.starmap(_judge, [(size, share, kind, number) for number in range(windows)], chunksize=5)


def _judge(size: int, share: float, kind: str, number: int) -> Seen:
    corpus, familiar = _given["corpus"], _given["familiar"]
    change, service, _, before = KINDS[kind]
    config = _given.get("config", CONFIG)
    chance = np.random.default_rng([number, size, 1])
    window, reference = draw_rows(corpus, size, share, number)
    window, reference = change(window, reference, chance)
    requests, feedback = asked(window, chance, service)
    earlier, earlier_feedback = asked(window[:1] * before, chance, Service())
    known = Reference(
        familiar,
        [],
        [row.text for row in reference],
        [Answered(row.answer, chance.normal(3.0, 0.5)) for row in reference],
    )
    started = time.perf_counter()
    with threadpool_limits(1):
        families, missing = all_families(requests, feedback | earlier_feedback, earlier, known, config)
        assert not missing, missing
        found = judge(families, rate=config.false_alarm_rate, resamples=config.resamples, seed=number)
    return Seen(
        found.drift,
        [
            column.name
            for column in found.columns
            if column.p is not None and column.p <= CONFIG.false_alarm_rate
        ],
        time.perf_counter() - started,
    )


def draw_rows(corpus: Corpus, size: int, share: float, number: int) -> tuple[list[Row], list[Row]]:
    """Return (window, reference) without a common row; a `share` of the window is of a new subject."""
    chance, new = np.random.default_rng([number, size, round(100 * share)]), round(size * share)
    order, subject = chance.permutation(len(corpus.pool)), corpus.new[number % len(corpus.new)]
    rows = [corpus.pool[place] for place in order]
    arrived = [
        Row(subject[place], rows[count].answer)
        for count, place in enumerate(chance.permutation(len(subject))[:new])
    ]
    return rows[: size - new] + arrived, rows[size:]


def asked(
    rows: list[Row], chance: Chance, service: Service
) -> tuple[list[Logged], dict[str, list[Feedback]]]:
    """Make one request per row, every second one with feedback."""
    failed, right = chance.random(len(rows)) < service.errors, chance.random(len(rows)) < service.right
    latency, nll, salt = (
        service.slower * chance.lognormal(4.0, 0.5, len(rows)),
        chance.normal(3.0 + service.nll, 0.5, len(rows)),
        chance.integers(1 << 40),
    )
    requests = [
        Logged(
            f"{salt}-{place}",
            float(place),
            "",
            "champion",
            1,
            messages=(("user", row.text),),
            answer=row.answer,
            status=502 if failed[place] else 200,
            latency_ms=latency[place],
            prompt_nll=nll[place],
        )
        for place, row in enumerate(rows)
    ]
    return requests, {
        request.id: [Feedback(request.id, "", 0.0, float(right[place]))]
        for place, request in enumerate(requests)
        if place % 2
    }


# --- the other kinds ----------------------------------------------------------------------------------------


def same(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
    return window, reference


def more_of_one(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
    """Replace a tenth of the window by rows of the reference, of one of its five commonest subjects."""
    common = [name for name, _ in Counter(subject(row) for row in reference).most_common(5)]
    chosen = common[chance.integers(5)]
    extra = [row for row in reference if subject(row) == chosen][: len(window) // 10]
    taken = {row.text for row in extra}
    return [*window[len(extra) :], *extra], [
        *(row for row in reference if row.text not in taken),
        *window[: len(extra)],
    ]


def subject(row: Row) -> str:
    return DOMAINS.get(row.answer, row.answer)


def shorter(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
    """Cut half of the words from a quarter of the prompts."""
    cut = len(window) // 4
    return [
        *(
            Row(" ".join(row.text.split()[: max(1, len(row.text.split()) // 2)]), row.answer)
            for row in window[:cut]
        ),
        *window[cut:],
    ], reference


def longer(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
    """Append another prompt to a quarter of the prompts."""
    cut = len(window) // 4
    return [
        *(
            Row(f"{one.text} {other.text}", one.answer)
            for one, other in zip(window[:cut], reference, strict=False)
        ),
        *window[cut:],
    ], reference


def answering(text: str, share: float) -> Change:
    """Replace a share of the answers by `text`; "commonest" stands for the reference's commonest answer."""

    def change(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
        said = Counter(row.answer for row in reference).most_common(1)[0][0] if text == "commonest" else text
        cut = round(share * len(window))
        return [*(Row(row.text, said) for row in window[:cut]), *window[cut:]], reference

    return change


def one_question(window: list[Row], reference: list[Row], chance: Chance) -> tuple[list[Row], list[Row]]:
    """Let a fifth of the requests ask the same new question, which is no drift and must not look like it."""
    text = _given["corpus"].new[0][int(chance.integers(50))]
    cut = len(window) // 5
    return [*window[cut:], *[Row(text, window[0].answer)] * cut], reference


class Kind(NamedTuple):
    """A kind of drift; `earlier` requests of the same champion are known."""

    change: Change
    service: Service = Service()
    bound: Callable[[], float] | None = None
    earlier: int = EARLIER


WORSE, HALF = Service(right=0.7), 500 // 2
SPREAD = ((0.8 * 0.2) ** 0.5, (0.7 * 0.3) ** 0.5)  # of a vote, at 80 % and at 70 %
KINDS: dict[str, Kind] = {
    "none": Kind(same),
    "10 points more of one known subject": Kind(more_of_one),
    "a quarter of the prompts half as long": Kind(shorter),
    "a quarter twice as long": Kind(longer),
    "a tenth of the answers the commonest one": Kind(answering("commonest", 0.1)),
    "3 % of the answers empty": Kind(answering("", 0.03)),
    "3 % of the answers refusals": Kind(answering("I cannot answer that.", 0.03)),
    "prompt NLL 0.1 up, its spread 0.5": Kind(
        same, Service(nll=0.1), best_of_means("prompt NLL", 0.1, (0.5, 0.5), (495, 1956))
    ),
    "right answers 80 % → 70 %, half with feedback": Kind(
        same, WORSE, best_of_means("feedback", 0.1, SPREAD, (HALF, EARLIER // 2))
    ),
    "the same, against ten windows, as the monitor reads": Kind(
        same, WORSE, best_of_means("feedback", 0.1, SPREAD, (HALF, 10 * HALF)), 10 * 500
    ),
    "errors 1 % → 4 %": Kind(same, Service(errors=0.04)),
    "latency up by a tenth": Kind(same, Service(slower=1.1)),
    "none: a fifth asks the same new question": Kind(one_question),
}


# --- Evidently, and the texts -------------------------------------------------------------------------------


def evidently_says(window: list[Row], reference: list[Row]) -> bool:
    """Return whether its default drift preset, a classifier of the two sides' texts, finds drift."""
    from evidently import DataDefinition, Dataset, Report
    from evidently.presets import DataDriftPreset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sides = [
            Dataset.from_pandas(
                pd.DataFrame({"prompt": [row.text for row in rows]}),
                data_definition=DataDefinition(text_columns=["prompt"]),
            )
            for rows in (window, reference)
        ]
        found: Any = json.loads(Report([DataDriftPreset()]).run(*sides).json())
    return bool(
        next(metric["value"]["count"] for metric in found["metrics"] if "count" in str(metric.get("value")))
    )


def cells(found: list[Seen]) -> str:
    drift, low = sum(one.drift for one in found), Counter(name for one in found for name in one.low)
    told = ", ".join(
        f"{name} {count / len(found):.0%}" for name, count in low.most_common() if count >= 0.1 * len(found)
    )
    return f"{len(found)} | {drift} ({drift / len(found):.1%}) | {told or 'none in a tenth of the windows'}"


def read_pydoc() -> Corpus:
    """Read the standard library's rows, 60 % of them for training; the answer is the module."""
    known = rows_of(["stdlib"])
    return split(known, [[row.text for row in rows_of(NEW_PACKAGES)]])


def rows_of(packages: list[str]) -> list[Row]:
    turns = (row["messages"] for row in harvest(PydocSource(packages=packages, min_objects=1, summaries=0.0)))
    return list(
        {
            question["content"]: Row(question["content"], answer["content"]) for question, answer in turns
        }.values()
    )


DOMAINS: dict[str, str] = {}  # intent → domain


def read_clinc() -> Corpus:
    """Read CLINC150: five domains are known, the other five new; the answer is the intent."""
    data, domains = (
        json.loads((CLINC / name).read_text(encoding="utf-8")) for name in ("data_full.json", "domains.json")
    )
    DOMAINS.update({intent: name for name in domains for intent in domains[name]})
    rows = [Row(text, intent) for part in ("train", "val", "test") for text, intent in data[part]]
    known, new = list(domains)[:5], list(domains)[5:]
    return split(
        [row for row in rows if subject(row) in known],
        [[row.text for row in rows if subject(row) == name] for name in new],
    )


def split(known: list[Row], new: list[list[str]]) -> Corpus:
    shuffled = [known[place] for place in np.random.default_rng(0).permutation(len(known))]
    edge = int(0.6 * len(shuffled))
    return Corpus([row.text for row in shuffled[:edge]], shuffled[edge:], new)


if __name__ == "__main__":
    main()
