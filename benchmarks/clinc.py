"""CLINC150 as the rows of real fine-tunes: a base of the demo's shape, pre-trained on four domains, and the
other domains for retrainings.

A query is the question, the name of its intent the answer, a domain a batch. Shared by
benchmarks/forgetting.py and benchmarks/gate_models.py.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ratchet.config.data import TokenizeConfig
from ratchet.config.evaluation import EvaluateConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig, BaseConfig, DemoBase, TrainConfig
from ratchet.data.examples import Example, Message, make_example
from ratchet.files import read_json, write_json

DATA = Path("../shared/data/clinc150")
READ = ("small_talk", "utility", "travel", "banking")  # domains that the base is pre-trained on


class Counts(NamedTuple):
    """Rows per intent."""

    train: int
    validation: int
    test: int


class Domain(NamedTuple):
    train: list[Example]
    validation: list[Example]
    test: list[Example]


def require_data(data: Path) -> None:
    if not (data / "data_full.json").exists():
        raise SystemExit(
            f"no CLINC150 in {data} (wanted data_full.json and domains.json): nothing is measured; name its"
            " folder with --data"
        )


def one_thread(folder: str) -> None:
    """Set up a benchmark's process: one thread, and checkpoints, if any, in a temporary folder."""
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TQDM_DISABLE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        RATCHET_ROOT=f"{folder}/{os.getpid()}",
    )
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    sys.stdout = sys.stderr
    import torch

    torch.set_num_threads(1)


def unread(data: Path) -> list[str]:
    """List the domains that the base is not pre-trained on."""
    return [name for name in read_json(data / "domains.json") if name not in READ]


def read_domain(data: Path, name: str, counts: Counts, seed: int, *, enough: bool = False) -> Domain:
    """Draw a domain's rows by `seed`; the domain is their batch.

    With `enough`, intents with fewer training queries than asked for are left out.
    """
    texts, intents = read_json(data / "data_full.json"), read_json(data / "domains.json")[name]
    drawn = Counter(label for query, label in texts["train"] if _is_drawn(query))
    intents = [intent for intent in intents if not enough or drawn[intent] >= counts.train]
    parts = []
    for split, count in (("train", counts.train), ("val", counts.validation), ("test", counts.test)):
        rows = []
        for intent in intents:
            asked = [
                query
                for query, label in texts[split]
                if label == intent and (split != "train" or _is_drawn(query))
            ]
            for query in random.Random(f"{seed} {intent}").sample(asked, count):
                rows.append(
                    make_example(
                        [Message("user", query), Message("assistant", intent.replace("_", " "))],
                        {"batch": name},
                    )
                )
        parts.append(rows)
    return Domain(*parts)


def settings(steps: int, epochs: float, seed: int, **train: Any) -> Config:
    """Return a config with `steps` of the base's pre-training and at most `epochs` of a retraining."""
    return Config(
        base=BaseConfig(demo=DemoBase(steps=steps)),
        tokenize=TokenizeConfig(max_length=96, window=256),
        train=TrainConfig(
            epochs=epochs,
            learning_rate=2e-3,
            batch_windows=2,
            evaluations=4,
            patience=3,
            seed=seed,
            checkpoint_minutes=1e6,
            **train,
        ),
        adapter=AdapterConfig(rank=32, alpha=64.0),
        evaluate=EvaluateConfig(max_new_tokens=12),
    )


def make_base(folder: Path, data: Path, counts: Counts, config: BaseConfig, *, names: bool = False) -> None:
    """Pre-train a base on four domains.

    It also learns to repeat queries of the others, which are used for nothing else, so that it knows their
    words but not their intents; with `names` it also repeats the names of their intents, ten times each.
    """
    from ratchet.demo.base_model import make_tokenizer, pretrain
    from ratchet.models.chat_template import ChatFormat
    from ratchet.models.loading import MANIFEST

    texts, intents = read_json(data / "data_full.json"), read_json(data / "domains.json")
    read = [row for name in READ for row in read_domain(data, name, counts, 0).train]
    others = {intent for name, part in intents.items() if name not in READ for intent in part}
    spoken = [query for query, intent in texts["train"] if intent in others and not _is_drawn(query)]
    spoken = random.Random(0).sample(spoken, min(len(spoken), 4 * len(read)))
    spoken += [intent.replace("_", " ") for intent in sorted(others)] * 10 if names else []
    read += [
        make_example([Message("user", f"Repeat: {query}"), Message("assistant", query)], {"batch": "base"})
        for query in spoken
    ]
    tokenizer = make_tokenizer(read, config.demo)
    tokenizer.save_pretrained(folder)
    pretrain(read, ChatFormat(tokenizer), config).save_pretrained(folder, safe_serialization=True)
    write_json(folder / MANIFEST, {"model": "demo", "revision": None, "context": config.demo.context})


def _is_drawn(query: str) -> bool:
    """Tell whether a training query is for the retrainings, as half are; the others are for the base."""
    return hashlib.sha256(query.encode()).digest()[0] % 2 == 0
