"""Measure the gate on real models: how often it promotes one that is no better, and whether it promotes one
that is spoilt.

    python -m benchmarks.gate_models [--quick] [--data ../shared/data/clinc150] [--jobs 1] [--json]

The models are a base of the demo's shape, a champion that learned five domains of CLINC150, and twins of the
champion by other seeds; a sixth domain is new to all.

A/A: real scores on all rows that no model was trained on, of which every cycle draws its own test and golden
rows; a gate of 5 % without a budget. Two trainings are never quite equal, and the gate is right to promote
the better one. So "at most 5 %" is tested only where it must hold: for twins that are *exchanged*, where a
coin per row decides whose score is the candidate's, so that the expected gain is zero in every cycle; and for
twins as they are, in those cycles in which the candidate is no better over all rows.

Forgetting: in one of the domains that the champion knows, some rows of a better twin, drawn anew in each
cycle, get the scores of a model that was trained for a quarter of the time, so many that the expected loss
against the champion is 5 points there. Answers and likelihoods are taken from it, or the answers alone.

Known bad: each candidate is made anew, goes through `tasks.evaluate` and `tasks.gate` at the default
settings, and is asked the rows of one of a few draws. Serve parity is taken as passed, so that only the
scores decide. Not covered: rows of another domain, larger models.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from msgspec.structs import replace

from benchmarks import clinc
from benchmarks.clinc import DATA, Counts, make_base, one_thread, read_domain, require_data, unread
from benchmarks.gate import HEADER, Bench, limit, passing_parity, row
from ratchet.config.evaluation import GateConfig
from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, encode_line, make_example, read_examples
from ratchet.errors import RatchetError
from ratchet.files import read_json, write_bytes, write_json
from ratchet.models.loading import MANIFEST, WEIGHTS, adapter_sha256

SCORES = ["exact_match", "answer_nll"]
LOST = 0.05  # in one domain
SCALES = (
    0.5,
    0.6,
    0.8,
    1.0,
)  # of noise, in standard deviations of each matrix: from 0.5 on, each costs over five points
AT_MOST = GateConfig(alpha=0.05, alpha_budget=1.0, resamples=1000)
CHAMPION, BASE, CACHE, POOL, LOOKS = "models/champion", "models/base", "cache", "pool", "looks.json"


class Size(NamedTuple):
    known: int  # domains of the champion
    counts: Counts
    validation: int  # rows an intent; the rest of `counts.validation` is held out
    steps: int  # of the base's pre-training
    epochs: float
    twins: int
    cycles: int
    drawn: tuple[int, int]  # test and golden rows of a cycle
    bad: int  # candidates of a kind
    draws: int
    asked: tuple[int, int]  # test and golden rows of a draw
    spoiling: float  # epochs of the trainings on spoilt rows
    forgotten: int  # cycles in which a domain is forgotten


FULL = Size(5, Counts(30, 20, 30), 4, 600, 8.0, 4, 1000, (1200, 400), 40, 10, (400, 150), 1.0, 500)
QUICK = Size(1, Counts(10, 6, 8), 2, 20, 2.0, 1, 10, (220, 60), 1, 1, (210, 50), 1.0, 0)
CHUNK = 100  # cycles that a process takes at once


class Line(NamedTuple):
    """A line of the table.

    For each candidate with a verdict, `lost` is the champion's accuracy minus its own, and `empty` the share
    of its answers that are empty.
    """

    name: str
    found: Counter[str]
    wanted: str
    lost: list[float]
    empty: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--quick", action="store_true", help="hardly any training and few cycles: shows that it runs"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    require_data(arguments.data)
    started = time.perf_counter()
    for part in measure(arguments.data, QUICK if arguments.quick else FULL, arguments.jobs):
        if isinstance(part, Line):
            print(
                (
                    json.dumps(part._asdict())
                    if arguments.json
                    else row(part.name, part.found, part.wanted + told(part))
                ),
                flush=True,
            )
        else:
            print(json.dumps(part) if arguments.json else f"{described(part)}\n\n{HEADER}", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s", file=sys.stderr if arguments.json else sys.stdout)


def measure(data: Path, size: Size, jobs: int) -> Iterator[dict[str, Any] | Line]:
    """Yield the models' accuracy first, then the lines of the table."""
    with tempfile.TemporaryDirectory(prefix="ratchet-gate-") as name:
        folder = Path(name)
        with ProcessPoolExecutor(
            jobs, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread, initargs=(name,)
        ) as pool:
            pool.submit(make_models, folder, data, size).result()
            list(pool.map(make_twin, [folder] * size.twins, [size] * size.twins, range(1, size.twins + 1)))
            pool.submit(make_twin, folder, size, WEAK, size.epochs / 4).result()
            yield accuracies(folder, size)
            yield from same_and_twins(folder, size, pool)
            yield from known_bad(folder, size, pool)


# --- rows and models ----------------------------------------------------------------------------------------


def make_models(folder: Path, data: Path, size: Size) -> None:
    """Make the rows, the base and the champion."""
    names = unread(data)[: size.known + 1]
    domains = [read_domain(data, name, size.counts, 0) for name in names]
    parts = {
        "train": [domain.train for domain in domains],
        "validation": [
            [
                each
                for place, each in enumerate(domain.validation)
                if place % size.counts.validation < size.validation
            ]
            for domain in domains
        ],
    }
    for split, rows in parts.items():
        write_rows(
            folder / "known" / f"{split}.jsonl", [each for part in rows[: size.known] for each in part]
        )
        write_rows(folder / "arrived" / f"{split}.jsonl", [each for part in rows for each in part])
    used = {each.id for rows in parts.values() for part in rows for each in part}
    held_out = {
        each.id: each
        for domain in domains
        for each in (*domain.test, *domain.validation)
        if each.id not in used
    }
    pool = list(held_out.values())
    write_rows(folder / POOL / "test.jsonl", pool)
    write_rows(folder / POOL / "golden.jsonl", [])
    for number in range(size.draws):
        drawn = random.Random(f"rows {number}").sample(pool, sum(size.asked))
        write_rows(folder / f"draw-{number}" / "test.jsonl", drawn[: size.asked[0]])
        write_rows(
            folder / f"draw-{number}" / "golden.jsonl",
            [replace(each, meta={**each.meta, "batch": "golden"}) for each in drawn[size.asked[0] :]],
        )
    write_json(folder / "nobody" / MANIFEST, {"version": None, "batches": []})
    write_json(folder / LOOKS, {"judged": {}})
    make_base(folder / BASE, data, size.counts, settings(size, 0).base)
    learn(folder, folder / "known", folder / "nobody", folder / CHAMPION, settings(size, 0))
    write_json(folder / CHAMPION / MANIFEST, {**read_json(folder / CHAMPION / MANIFEST), "version": 1})


def make_twin(folder: Path, size: Size, seed: int, epochs: float | None = None) -> None:
    """Repeat the champion's training with another seed; score twin and champion on all held-out rows."""
    out, config = folder / f"models/twin-{seed}", settings(size, seed, epochs)
    learn(folder, folder / "known", folder / "nobody", out, config)
    score(folder, out, folder / f"twin-{seed}", config)


def score(folder: Path, candidate: Path, out: Path, config: Config) -> None:
    """Score candidate, champion and base on all held-out rows."""
    from tasks.evaluate import evaluate

    evaluate(
        folder / POOL,
        folder / BASE,
        folder / CHAMPION,
        candidate,
        out,
        config,
        cache=folder / CACHE,
    )


def learn(folder: Path, rows: Path, incumbent: Path, out: Path, config: Config) -> None:
    from tasks.tokenize import tokenize
    from tasks.train import train

    tokens = out.with_name(f"{out.name}-tokens")
    for split in ("test", "golden"):  # test and golden rows are asked from other folders
        write_rows(rows / f"{split}.jsonl", [])
    tokenize(rows, folder / BASE, incumbent, tokens, config)
    train(tokens, folder / BASE, incumbent, out, out.with_name(f"{out.name}-reports"), config)


def settings(size: Size, seed: int, epochs: float | None = None) -> Config:
    """Return the project's settings, without those parts of the evaluation that decide on no candidate."""
    config = clinc.settings(size.steps, epochs or size.epochs, seed)
    return config.model_copy(
        update={
            "evaluate": config.evaluate.model_copy(
                update={"simple_baseline": False, "metrics": ["exact_match"]}
            )
        }
    )


def write_rows(path: Path, rows: list[Example]) -> None:
    write_bytes(path, map(encode_line, rows))


# --- A/A ----------------------------------------------------------------------------------------------------


def same_and_twins(folder: Path, size: Size, pool: ProcessPoolExecutor) -> Iterator[Line]:
    for kind in (itself, exchanged, as_they_are, forgetful, forgetful_in_answers):
        starts = range(0, size.forgotten if kind in FORGETFUL else size.cycles, CHUNK)
        found: dict[str, Counter[str]] = {}
        for part in pool.map(
            cycles_of, [folder] * len(starts), [size] * len(starts), [kind] * len(starts), starts
        ):
            for name, verdicts in part.items():
                found[name] = found.get(name, Counter()) + verdicts
        for name, verdicts in sorted(found.items()):
            passed = verdicts.pop(PASSED, 0)
            yield Line(
                name, verdicts, WANTED[name].format(limit(verdicts.total(), AT_MOST.alpha), passed), [], []
            )


WEAK = 99  # the seed, and the name, of the model that was trained for a quarter of the time
ITSELF, EXCHANGED = "the champion itself, real rows", "a twin by another seed, exchanged row by row"
FORGOT = f"a better twin that lost {LOST:g} in one domain"
FORGOT_IN_ANSWERS = f"{FORGOT}, which its likelihoods do not show"
NO_BETTER, BETTER = (
    "a twin as it is: no better over all rows",
    "a twin as it is: the better one over all rows",
)
PASSED = "passed"  # by the success metric, whatever the guardrails say
WANTED = {
    ITSELF: "none promoted",
    EXCHANGED: "at most {} promoted ({} by the success metric alone)",
    NO_BETTER: "at most {} promoted ({} by the success metric alone)",
    BETTER: "at least 80 % of the {1} that the success metric alone sees",
    FORGOT: "at most {} promoted ({} by the success metric alone)",
    FORGOT_IN_ANSWERS: "at most {} promoted ({} by the success metric alone)",
}


def cycles_of(
    folder: Path, size: Size, kind: Callable[[Models, np.random.Generator], Pair], start: int
) -> dict[str, Counter[str]]:
    models = read_scores(folder, size)
    bench = Bench(
        folder / f"bench-{kind.__name__}-{start}", seen=read_json(folder / CHAMPION / MANIFEST)["batches"]
    )
    found: dict[str, Counter[str]] = {}
    for cycle in range(start, min(start + CHUNK, size.forgotten if kind in FORGETFUL else size.cycles)):
        generator = np.random.default_rng([8, cycle])
        pair = kind(models, generator)
        verdicts = found.setdefault(pair.name, Counter())
        verdicts[bench.verdict(drawn(pair, models.base, generator, size.drawn), AT_MOST)] += 1
        verdicts[PASSED] += bench.passed
    return found


class Pair(NamedTuple):
    name: str
    candidate: pd.DataFrame
    champion: pd.DataFrame


class Models(NamedTuple):
    """Scores of the held-out rows, a line a row, in the same order: champion and twins, weak model, base."""

    twins: list[pd.DataFrame]
    weak: pd.DataFrame
    base: pd.DataFrame
    known: list[str]  # domains of the champion


def itself(models: Models, _: np.random.Generator) -> Pair:
    return Pair(ITSELF, models.twins[0], models.twins[0])


def exchanged(models: Models, generator: np.random.Generator) -> Pair:
    """Decide by a coin per row which of two twins is the candidate; its scores of a row stay together."""
    first, second = two_of(models, generator)
    coin = generator.random(len(first)) < 0.5
    one, other = (model[SCORES].to_numpy() for model in (first, second))
    sides = (np.where(coin[:, None], *both) for both in ((one, other), (other, one)))
    return Pair(EXCHANGED, *(first.assign(**dict(zip(SCORES, side.T, strict=True))) for side in sides))


def as_they_are(models: Models, generator: np.random.Generator) -> Pair:
    candidate, champion = two_of(models, generator)
    better = candidate.exact_match.mean() > champion.exact_match.mean()
    return Pair(BETTER if better else NO_BETTER, candidate, champion)


def forgetful(models: Models, generator: np.random.Generator) -> Pair:
    return Pair(FORGOT, *forgotten(models, generator, SCORES))


def forgetful_in_answers(models: Models, generator: np.random.Generator) -> Pair:
    return Pair(FORGOT_IN_ANSWERS, *forgotten(models, generator, SCORES[:1]))


FORGETFUL = (forgetful, forgetful_in_answers)


def forgotten(
    models: Models, generator: np.random.Generator, scores: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a better twin with `scores` of the weak model on some rows of one domain, and its champion."""
    for _ in range(1000):
        champion, candidate = sorted(two_of(models, generator), key=lambda model: model.exact_match.mean())
        domain = np.flatnonzero(candidate.batch == generator.choice(models.known))
        means = [model.exact_match.iloc[domain].mean() for model in (candidate, champion, models.weak)]
        share = (means[0] - means[1] + LOST) / max(means[0] - means[2], 1e-9)
        if 0 < share <= 1:
            break
    else:
        raise SystemExit(f"no twin can lose {LOST:g} in a domain: the models are too weak")
    chosen = domain[generator.random(len(domain)) < share]
    spoilt = candidate.copy()
    for name in scores:
        values = spoilt[name].to_numpy(copy=True)
        values[chosen] = models.weak[name].to_numpy()[chosen]
        spoilt[name] = values
    return spoilt, champion


def two_of(models: Models, generator: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    first, second = generator.choice(len(models.twins), 2, replace=False)
    return models.twins[first], models.twins[second]


def drawn(
    pair: Pair, base: pd.DataFrame, generator: np.random.Generator, counts: tuple[int, int]
) -> pd.DataFrame:
    """Draw a table of scores as the evaluation leaves it, on rows drawn without replacement."""
    places = generator.choice(len(base), sum(counts), replace=False)
    golden = np.arange(sum(counts)) >= counts[0]
    sides = {"candidate": pair.candidate, "champion": pair.champion, "base": base}
    table = pd.concat(
        [frame.iloc[places].assign(model=name) for name, frame in sides.items()], ignore_index=True
    )
    return table.assign(batch=table.batch.mask(np.tile(golden, len(sides)), "golden"))


def read_scores(folder: Path, size: Size) -> Models:
    tables = [
        pd.read_parquet(folder / f"twin-{seed}" / "scores.parquet")
        for seed in (*range(1, size.twins + 1), WEAK)
    ]
    kept = ["id", "batch", *(name for name in tables[0] if str(name).startswith("slice:")), *SCORES]
    sides = {
        name: [table[table.model == name][kept].sort_values("id", ignore_index=True) for table in tables]
        for name in ("candidate", "champion", "base")
    }
    *twins, weak = sides["candidate"]
    known = read_json(folder / CHAMPION / MANIFEST)["batches"]
    return Models([sides["champion"][0], *twins], weak, sides["base"][0], known)


def accuracies(folder: Path, size: Size) -> dict[str, Any]:
    models = read_scores(folder, size)
    champion, *twins = (float(model.exact_match.mean()) for model in models.twins)
    base = models.base
    return {"rows": len(base), "base": float(base.exact_match.mean()), "champion": champion, "twins": twins}


# --- known bad ----------------------------------------------------------------------------------------------


def known_bad(folder: Path, size: Size, pool: ProcessPoolExecutor) -> Iterator[Line]:
    for kind in KINDS:
        found: dict[str, list[Judged]] = {}
        for each in pool.map(
            judged, [folder] * size.bad, [size] * size.bad, [kind] * size.bad, range(size.bad)
        ):
            found.setdefault(each.name, []).append(each)
        for name, part in found.items():
            whole = [each for each in part if each.verdict != "error"]
            yield Line(
                name,
                Counter(each.verdict for each in part),
                "none promoted",
                [each.lost for each in whole],
                [each.empty for each in whole],
            )


class Judged(NamedTuple):
    name: str
    verdict: str
    lost: float = 0.0
    empty: float = 0.0


def judged(folder: Path, size: Size, kind: str, number: int) -> Judged:
    """Make and judge one candidate, and remove it afterwards."""
    from tasks.evaluate import evaluate
    from tasks.gate import judge

    place = folder / f"{kind}-{number}"
    candidate, evaluation, config = place / "candidate", place / "evaluation", settings(size, number)
    name = KINDS[kind](folder, candidate, number, size)
    try:
        metrics = evaluate(
            folder / f"draw-{number % size.draws}",
            folder / BASE,
            folder / CHAMPION,
            candidate,
            evaluation,
            config,
            cache=folder / CACHE,
        )
        write_json(place / "parity.json", passing_parity(adapter_sha256(candidate)))
        verdict = judge(
            evaluation,
            candidate,
            folder / CHAMPION,
            place / "parity.json",
            folder / LOOKS,
            place / "gate.json",
            config.gate,
        ).verdict
    except RatchetError as error:
        print(f"{name}, {number}: {error}", file=sys.stderr)
        return Judged(name, "error")
    else:
        test, scores = metrics.slices["test"], pd.read_parquet(evaluation / "scores.parquet")
        lost = test["champion"].scores["exact_match"].mean - test["candidate"].scores["exact_match"].mean
        return Judged(name, verdict, lost, float((scores[scores.model == "candidate"].answer == "").mean()))
    finally:
        shutil.rmtree(place)


def noise(folder: Path, out: Path, number: int, _: Size) -> str:
    scale, generator = SCALES[number % len(SCALES)], np.random.default_rng([9, number])
    change_weights(
        folder / CHAMPION,
        out,
        lambda _, weight: (
            weight + generator.normal(0, scale * weight.std(), weight.shape).astype(weight.dtype)
        ),
    )
    return f"noise on the weights, {scale:g} times their spread"


def shuffled(folder: Path, out: Path, number: int, size: Size) -> str:
    """Continue from the champion, as a retraining does, on rows whose answers are shuffled."""
    generator = random.Random(number)

    def spoil(rows: list[Example]) -> list[Example]:
        answers = generator.sample([each.answer for each in rows], len(rows))
        return [
            make_example([*each.prompt, Message("assistant", answer)], each.meta)
            for each, answer in zip(rows, answers, strict=True)
        ]

    retrain(folder, out, number, size, spoil)
    return "shuffled labels"


def nothing(folder: Path, out: Path, number: int, size: Size) -> str:
    """Retrain on rows with empty answers, which preparation would reject: only the turn's end is learned."""

    def spoil(rows: list[Example]) -> list[Example]:
        return [Example(each.id, (*each.prompt, Message("assistant", "")), each.meta) for each in rows]

    retrain(folder, out, number, size, spoil)
    return "an answer of nothing"


def bare(folder: Path, out: Path, number: int, _: Size) -> str:
    """Make an adapter as it is before its first training step."""
    generator = np.random.default_rng([10, number])

    def begin(name: str, weight: Any) -> Any:
        return (
            np.zeros_like(weight)
            if "lora_B" in name
            else generator.normal(0, weight.std(), weight.shape).astype(weight.dtype)
        )

    change_weights(folder / CHAMPION, out, begin)
    return "the bare base (an untrained adapter)"


def not_a_number(folder: Path, out: Path, number: int, _: Size) -> str:
    """Set to NaN, in turn, one value of one weight, a whole weight, or all weights."""
    generator = np.random.default_rng([11, number])
    names = sorted(read_weights(folder / CHAMPION))
    chosen = names[generator.integers(len(names))]

    def spoil(name: str, weight: Any) -> Any:
        spoilt = weight.copy()
        if number % 3 == 2 or name == chosen:
            spoilt.reshape(-1)[slice(None) if number % 3 else generator.integers(spoilt.size)] = np.nan
        return spoilt

    change_weights(folder / CHAMPION, out, spoil)
    return "NaN weights (one value, one matrix, all)"


KINDS: dict[str, Callable[[Path, Path, int, Size], str]] = {
    "noise": noise,
    "shuffled": shuffled,
    "bare": bare,
    "nan": not_a_number,
    "nothing": nothing,
}


def retrain(
    folder: Path, out: Path, number: int, size: Size, spoil: Callable[[list[Example]], list[Example]]
) -> None:
    rows = out.with_name("rows")
    for split in ("train", "validation"):
        write_rows(rows / f"{split}.jsonl", spoil(list(read_examples(folder / "arrived" / f"{split}.jsonl"))))
    learn(folder, rows, folder / CHAMPION, out, settings(size, number, size.spoiling))


def read_weights(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(folder / WEIGHTS)


def change_weights(source: Path, out: Path, change: Callable[[str, Any], Any]) -> None:
    """Copy an adapter with changed weights, and with the manifest that a training would write."""
    from safetensors.numpy import save_file

    shutil.copytree(source, out)
    save_file(
        {name: change(name, weight) for name, weight in read_weights(source).items()},
        out / WEIGHTS,
        metadata={"format": "pt"},
    )
    manifest = {key: value for key, value in read_json(source / MANIFEST).items() if key != "version"}
    write_json(out / MANIFEST, manifest | {"run_key": out.parent.name, "adapter_sha256": adapter_sha256(out)})


# --- the table ----------------------------------------------------------------------------------------------


def described(found: dict[str, Any]) -> str:
    twins = found["twins"]
    return (
        f"{found['rows']:,} rows held out; right on them: base {found['base']:.3f}, champion"
        f" {found['champion']:.3f}, {len(twins)} twins {min(twins):.3f} to {max(twins):.3f}"
    )


def told(line: Line) -> str:
    lost = (
        f"; exact match lost: {statistics.mean(line.lost):.3f}, least {min(line.lost):.3f}"
        if line.lost
        else ""
    )
    return lost + (
        f"; at least {min(line.empty):.0%} of the answers empty"
        if line.empty and min(line.empty) > 0.5
        else ""
    )


if __name__ == "__main__":
    main()
