"""Measure what differential privacy costs on CLINC150: accuracy, exposure of canaries and time, by ε.

    python -m benchmarks.privacy [--data ../shared/data/clinc150] [--epsilons 1,3,8] [--seeds 1] [--quick]

The base has the demo's shape and has read 30 queries of each of 60 intents, the public rows. The private rows
are the other training queries of the same intents, up to 70 each; each arm trains on all of them from the
base by the project's own stages tokenize and train. `before` is the base's accuracy on the test rows, `none`
the plain training with as many passes, in the smaller steps that suit it. Of the canaries of the audit each
is planted with probability one half; `exposed` is the share of right guesses among them for the fifth of
which the model seems surest, and `ε or more` the lower bound that follows from all guesses at 5 % error, the
highest of all seeds. Seconds are of one core. Intervals are of 95 %, over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import clinc
from benchmarks.clinc import DATA, READ, Counts, make_base, one_thread, read_domain, require_data
from benchmarks.forgetting import accuracy, interval
from ratchet.config.params import Config
from ratchet.data.examples import Example, Message, encode_line, make_example
from ratchet.files import read_json, write_bytes, write_json

NONE = "none"
PLAIN_RATE, PRIVATE_RATE = 2e-3, 3e-3  # learning rates; a private training has few and large steps


class Size(NamedTuple):
    """`counts`: rows per intent that the base reads; `private`: those that are trained on, at most."""

    counts: Counts
    private: int
    steps: int  # of the base's pre-training
    epochs: float
    canaries: int
    batch_rows: int


FULL = Size(Counts(30, 4, 10), 70, 600, 6.0, 200, 600)
QUICK = Size(Counts(6, 2, 2), 6, 20, 1.0, 40, 100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epsilons", default="1,3,8")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="hardly any training: shows that it runs")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    require_data(arguments.data)
    size = QUICK if arguments.quick else FULL
    arms = [*arguments.epsilons.split(","), NONE]
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        one_thread(folder)
        make_base(Path(folder) / "base", arguments.data, size.counts, settings(NONE, 0, size).base)
        before = asked_of_base(Path(folder), arguments.data, size)
        print(f"before: {before:.3f}", file=sys.stderr, flush=True)
        for seed in range(arguments.seeds):
            for arm in arms:
                found.append(run(Path(folder), arguments.data, arm, seed, size))
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print("\n".join(map(json.dumps, found) if arguments.json else table(found, arms, before)))


def asked_of_base(folder: Path, data: Path, size: Size) -> float:
    """Return the base's accuracy on the test rows."""
    from ratchet.evaluation.scoring import Asked, Models, Player, answer

    rows = [row for name in READ for row in read_domain(data, name, size.counts, 0).test]
    base, asked = folder / "base", Asked(rows, [str(row.meta["batch"]) for row in rows])
    given = answer(Player("base", base, None, base), Models(), asked, settings(NONE, 0, size).evaluate)
    return statistics.mean(said == row.answer for said, row in zip(given.answers, rows, strict=True))


def settings(arm: str, seed: int, size: Size) -> Config:
    """Return the settings of an arm; the patience of the plain training never ends it."""
    private: dict[str, Any] = (
        {} if arm == NONE else {"privacy": {"epsilon": float(arm), "batch_rows": size.batch_rows}}
    )
    config = clinc.settings(
        size.steps, size.epochs, seed, start_from="base", rows="all", schedule="constant", **private
    )
    evaluate = config.evaluate.model_copy(update={"audit_canaries": size.canaries})
    rate = PLAIN_RATE if arm == NONE else PRIVATE_RATE
    train = config.train.model_copy(
        update={"patience": 1000, "evaluations": 1, "learning_rate": rate, "precision": "float32"}
    )
    adapter = config.adapter.model_copy(update={"rank": 8, "alpha": 16.0})
    return config.model_copy(update={"evaluate": evaluate, "train": train, "adapter": adapter})


def run(folder: Path, data: Path, arm: str, seed: int, size: Size) -> dict[str, Any]:
    from ratchet.models.loading import MANIFEST
    from tasks.tokenize import tokenize
    from tasks.train import train

    config, base, place = settings(arm, seed, size), folder / "base", folder / f"{arm}-{seed}"
    domains = {name: read_domain(data, name, size.counts, 0) for name in READ}
    nobody = place / "nobody"
    write_json(nobody / MANIFEST, {"version": None, "batches": []})
    parts = {
        "train": private_rows(data, domains, size.private),
        "validation": [row for domain in domains.values() for row in domain.validation],
        **{"test": [], "golden": []},  # test rows are asked below
    }
    for split, rows in parts.items():
        write_bytes(place / f"prepared/{split}.jsonl", map(encode_line, rows))
    tokenize(place / "prepared", base, nobody, place / "tokens", config)
    began = time.process_time()
    figures = train(place / "tokens", base, nobody, place / "candidate", place / "reports/train", config)
    seconds = time.process_time() - began
    tests = {name: domain.test for name, domain in domains.items()}
    right = accuracy(base, place / "candidate", tests, config)
    promise = read_json(place / "candidate" / MANIFEST).get("privacy")
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": statistics.mean(right.values()),
        "seconds": seconds,
        "steps": figures["steps"],
        "rows": figures["rows"]["rows"],
        "noise": promise["mechanism"]["noise_multiplier"] if promise else 0.0,
        **audit(base, place / "candidate", config, delta=config.train.privacy.delta),
    }


def private_rows(data: Path, public: dict[str, clinc.Domain], most: int) -> list[Example]:
    """Return the training queries that the base has not read, `most` an intent."""
    texts, intents = read_json(data / "data_full.json"), read_json(data / "domains.json")
    rows = []
    for name, domain in public.items():
        read = {row.messages[0].content for row in domain.train}
        for intent in intents[name]:
            asked = [query for query, label in texts["train"] if label == intent and query not in read]
            turns = [
                [Message("user", query), Message("assistant", intent.replace("_", " "))] for query in asked
            ]
            rows += [make_example(pair, {"batch": name}) for pair in turns[:most]]
    return rows


def audit(base: Path, candidate: Path, config: Config, *, delta: float) -> dict[str, float]:
    import numpy as np

    from ratchet.audits.memorization import measure_losses
    from ratchet.evaluation.canaries import make_audit_canaries
    from ratchet.models.adapters import load_trained
    from ratchet.models.loading import load_base, load_chat
    from ratchet.privacy.audit import lower_bound

    coins, chat = make_audit_canaries(config.evaluate.audit_canaries, ""), load_chat(base)
    canaries, planted = [canary for canary, _ in coins], np.array([coin for _, coin in coins])
    before, after = (
        np.array(measure_losses(model, chat, canaries, batch_size=32))
        for model in (load_base(base), load_trained(base, candidate))
    )
    surest = np.argsort(before - after)
    side = max(1, len(coins) // 10)
    right = planted[surest[-side:]].sum() + (~planted[surest[:side]]).sum()
    bound = lower_bound(before - after, planted, delta=delta, alpha=0.05)
    return {"exposed": float(right) / (2 * side), "epsilon_low": bound.epsilon}


def table(found: list[dict[str, Any]], arms: list[str], before: float) -> list[str]:
    lines = [
        "| ε | accuracy | exposed | ε or more | noise | steps | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| before | {before:.3f} | | | | | |",
    ]
    for arm in arms:
        runs = [run for run in found if run["arm"] == arm]
        mean = {key: told([run[key] for run in runs]) for key in ("accuracy", "exposed")}
        low, noise = (max(run[key] for run in runs) for key in ("epsilon_low", "noise"))
        steps, seconds = (statistics.mean(run[key] for run in runs) for key in ("steps", "seconds"))
        lines.append(
            f"| {arm} | {mean['accuracy']} | {mean['exposed']} | {low:.2f} | {noise:.2f} | {steps:.0f} "
            f"| {seconds:.0f} |"
        )
    return lines


def told(values: list[float]) -> str:
    """Return the mean of the seeds, with its interval where there are two or more."""
    found = interval(values)
    between = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['mean']:.3f}{between}"


if __name__ == "__main__":
    main()
