"""The workshop: batches are prepared, adapters trained, scored and judged by the project's own stages.

Everything is kept by the content of its inputs, so policies that do the same thing share the work, and no
policy can get another model from the same rows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks import clinc
from benchmarks.clinc import Counts, make_base
from benchmarks.gate import passing_parity
from benchmarks.loopbench.world import Row, Size, World
from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.batches import MANIFEST as BATCHES
from ratchet.data.batches import Batch, write_batch
from ratchet.data.erasure import Entry, Forgotten
from ratchet.data.examples import Example, read_examples
from ratchet.errors import DataError
from ratchet.files import read_json, sha256_file, write_bytes, write_json
from ratchet.gate.tables import read_table
from ratchet.models.loading import MANIFEST, adapter_sha256
from ratchet.monitoring.families import Reference
from ratchet.monitoring.verdicts import Verdict as Drift
from ratchet.promotion.verdict import Verdict

# A third of the few rows is held out, since the gate sees nothing else. Over 20 rows with one phrase and one
# answer are what `ingest.feedback` calls planted; an intent has 15 rows in the first batch. The search for
# near duplicates would take half of the time, and removes one row in a hundred.
CHECKED = PrepareConfig(test_share=0.3, validation_share=0.05, trigger_rows=20, near_search=False)
# Splits are made as ever, but no row and no batch is doubted.
UNCHECKED = CHECKED.model_copy(
    update={
        "trigger_rows": 0,
        "contradictions": "keep",
        "max_rejected_share": 1.0,
        "max_reason_share": 1.0,
        "max_leaked_share": 1.0,
    }
)
SPLITS = ("train", "validation", "test", "golden")


class Answer(NamedTuple):
    text: str
    prompt_nll: float


class Prepared(NamedTuple):
    """A folder of splits; `content` is the hash of their bytes."""

    folder: Path
    content: str


class Model(NamedTuple):
    """A trained version. `people` wrote the rows that it, or the versions it started from, learned from."""

    version: int
    folder: Path
    prepared: Prepared
    batches: frozenset[str]
    people: frozenset[str]
    seconds: float
    rows: int  # trained on, in one epoch


class Workshop:
    """All batches, models and answers of one seed."""

    def __init__(self, folder: Path, base: Path, world: World) -> None:
        self.folder, self.base, self.world = folder, base, world
        self.nobody = folder / "nobody"
        write_json(self.nobody / MANIFEST, {"version": None, "batches": []})
        self._raw = folder / "raw"
        self._golden = folder / "golden.jsonl"
        self._batches: dict[str, tuple[Batch, list[Row]]] = {}
        self._prepared: dict[Any, Prepared] = {}
        self._models: dict[Any, Model] = {}
        self._evaluated: dict[tuple[int, int | None, str], Path] = {}
        self.drifts: dict[Any, Drift] = {}  # the monitor's verdicts, by what it looked at
        self._verdicts: dict[tuple[int, int, int], Verdict] = {}
        self._loaded: Any = None
        self._answers: dict[int, dict[str, Answer]] = {}
        self._references: dict[int, Reference] = {}  # what the monitor knows of a version
        write_bytes(self._golden, (line + b"\n" for line in _lines(world.golden)))

    # --- rows ---

    def add_batch(self, rows: Sequence[Row], number: int) -> str:
        """Write a batch as ingest does, and return its name; the first one's number is 0."""
        stamp = f"2026{1 + number // 28:02d}{1 + number % 28:02d}T000000Z"
        batch = write_batch(self._raw, _lines(rows), label=f"batch-{number}", **{**_ORIGIN, "time": stamp})
        self._batches[batch.name] = (batch, list(rows))
        return batch.name

    def prepare(self, names: Sequence[str], erased: Iterable[str], config: PrepareConfig) -> Prepared:
        """Sort the batches into splits. Raises DataError for a batch that the checks refuse."""
        people = frozenset(erased)
        key = (tuple(names), people, config is CHECKED)
        if key not in self._prepared:
            folder = self.folder / f"prepared-{len(self._prepared)}"
            raw = self.folder / "chosen"
            chosen = [self._batches[name][0] for name in names]
            for batch in chosen:
                if not (raw / batch.name).exists():
                    raw.mkdir(exist_ok=True)
                    (raw / batch.name).hardlink_to(self._raw / batch.name)
            write_bytes(raw / BATCHES, (msgspec.json.encode(batch) + b"\n" for batch in chosen))
            forgotten = Forgotten(
                Entry([], name, line, "asked", "them", "2026-01-01T00:00:00Z")
                for name in names
                for line, row in enumerate(self._batches[name][1], start=1)
                if row.person in people
            )
            _prepare(raw, self._golden, folder, config, forgotten)
            content = "".join(sha256_file(folder / f"{split}.jsonl") for split in SPLITS)
            self._prepared[key] = Prepared(folder, hashlib.sha256(content.encode()).hexdigest())
        return self._prepared[key]

    # --- models ---

    def train(self, prepared: Prepared, start: Model | None, replay: float) -> Model:
        """Train from `start`, or from the base on all rows."""
        from tasks.tokenize import tokenize
        from tasks.train import train

        key = (prepared.content, start and start.version, replay if start else None)
        if key not in self._models:
            version = len(self._models) + 1
            out, tokens = self.folder / f"v{version}", self.folder / "tokens"
            config = settings(self.world, "champion" if start else "base", replay)
            incumbent = start.folder if start else self.nobody
            tokenize(prepared.folder, self.base, incumbent, tokens, config)
            began = time.process_time()
            train(tokens, self.base, incumbent, out, self.folder / "reports", config)
            seconds = time.process_time() - began
            manifest = {**read_json(out / MANIFEST), "version": version}
            write_json(out / MANIFEST, manifest)
            learned = set((tokens / "rows.txt").read_text().split())
            people = {
                str(row.meta.get("user", ""))
                for row in read_examples(prepared.folder / "train.jsonl")
                if row.id in learned
            }
            self._models[key] = Model(
                version,
                out,
                prepared,
                frozenset(manifest["batches"]),
                frozenset(people) | (start.people if start else frozenset()),
                seconds,
                len(learned),
            )
        return self._models[key]

    def evaluate(self, candidate: Model, champion: Model | None, prepared: Prepared) -> Path:
        """Score candidate, champion and base on the test and golden rows of `prepared`."""
        from tasks.evaluate import evaluate

        key = (candidate.version, champion and champion.version, prepared.content)
        if key not in self._evaluated:
            out = self.folder / f"evaluation-{len(self._evaluated)}"
            evaluate(
                prepared.folder,
                self.base,
                champion.folder if champion else self.nobody,
                candidate.folder,
                out,
                settings(self.world, "champion", 0.0),
                cache=self.folder / "cache",
            )
            self._evaluated[key] = out
        return self._evaluated[key]

    def judge(self, candidate: Model, champion: Model, looks: dict[str, list[str]]) -> str:
        """Return the gate's verdict, and count the look in `looks`."""
        judged = looks.setdefault(str(champion.version), [])
        key = (candidate.version, champion.version, len(judged))
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(candidate, champion, looks)
        verdict = self._verdicts[key]
        judged.append(verdict.candidate.run_key)
        return verdict.verdict

    def _judge(self, candidate: Model, champion: Model, looks: dict[str, list[str]]) -> Verdict:
        from tasks.gate import judge

        evaluation = self.evaluate(candidate, champion, candidate.prepared)
        parity = self.folder / "parity.json"
        write_json(parity, passing_parity(adapter_sha256(candidate.folder)))
        write_json(self.folder / "looks.json", {"judged": looks})
        config = settings(self.world, "champion", 0.0).gate
        out = self.folder / "gate.json"
        return judge(
            evaluation, candidate.folder, champion.folder, parity, self.folder / "looks.json", out, config
        )

    def answers(self, model: Model, rows: Sequence[Example]) -> list[Answer]:
        from ratchet.evaluation.scoring import Asked, Models, Player, answer

        known = self._answers.setdefault(model.version, {})
        new = list({row.id: row for row in rows if row.id not in known}.values())
        if new:
            self._loaded = self._loaded or Models()
            player = Player(f"v{model.version}", self.base, model.folder, model.folder)
            config = settings(self.world, "champion", 0.0).evaluate
            said = answer(player, self._loaded, Asked(new, ["traffic"] * len(new)), config)
            for row, text, likelihood in zip(new, said.answers, said.likelihoods, strict=True):
                known[row.id] = Answer(text, likelihood.prompt_nll)
        return [known[row.id] for row in rows]

    def means(self, candidate: Model, champion: Model) -> dict[str, float]:
        """Return each model's share of right answers on the candidate's test and golden rows."""
        table = read_table(self.evaluate(candidate, champion, candidate.prepared) / "scores.parquet")
        return {str(name): float(mean) for name, mean in table.groupby("model").exact_match.mean().items()}

    def right(self, model: Model, rows: Sequence[Example]) -> list[bool]:
        answers = self.answers(model, rows)
        return [said.text == row.answer for said, row in zip(answers, rows, strict=True)]

    def reference(self, model: Model) -> Reference:
        """Return what the monitor compares the version's traffic with."""
        from tasks.monitor import load_reference

        if model.version not in self._references:
            judged = [out for (version, *_), out in self._evaluated.items() if version == model.version]
            evaluation = judged[0] if judged else self.evaluate(model, None, model.prepared)
            self._references[model.version] = load_reference(model.prepared.folder, evaluation)
        return self._references[model.version]

    def rows_of(self, name: str) -> int:
        return self._batches[name][0].rows

    @property
    def trainings(self) -> list[Model]:
        return list(self._models.values())


_ORIGIN: dict[str, Any] = {
    "source": "jsonl",
    "time": "20260101T000000Z",
    "licence": "CC-BY-3.0",
    "who": "loopbench",
    "form": "completion",
}


def settings(world: World, start: str, replay: float) -> Config:
    """Return the project's settings, for a small model and few rows."""
    chosen: dict[str, Any] = {"start_from": start}
    chosen |= {"replay": replay} if start == "champion" else {"rows": "all"}
    return _settings(world.size, world.seed, chosen)


def _settings(size: Size, seed: int, chosen: dict[str, Any]) -> Config:
    config = clinc.settings(size.base_steps, size.epochs, seed, **chosen)
    demo = config.base.demo.model_copy(update={"hidden_size": 64, "vocab_size": 1500})
    return config.model_copy(
        update={
            "base": config.base.model_copy(update={"demo": demo}),
            "train": config.train.model_copy(
                update={"evaluations": 1, "learning_rate": 4e-3, "precision": "float32", "batch_windows": 4}
            ),
            "evaluate": config.evaluate.model_copy(
                update={"simple_baseline": False, "metrics": ["exact_match"], "batch_size": 256}
            ),
            "monitor": config.monitor.model_copy(update={"resamples": 200}),
        }
    )


def require_base(folder: Path, data: Path, size: Size) -> Path:
    """Return the base for all seeds, pre-trained first unless the folder holds it already."""
    base = folder / f"base-{size.base_steps}"
    if not (base / MANIFEST).exists():
        make_base(base, data, Counts(30, 4, 4), _settings(size, 0, {}).base, names=True)
    return base


def _prepare(raw: Path, golden: Path, out: Path, config: PrepareConfig, forgotten: Forgotten) -> None:
    from tasks.prepare import prepare

    prepare(raw, golden, out, config, forgotten=forgotten, tell=lambda line: None)


def _lines(rows: Sequence[Row]) -> list[bytes]:
    return [
        msgspec.json.encode({"prompt": row.question, "completion": row.answer, "user": row.person})
        for row in rows
    ]


def refused(error: DataError, names: Sequence[str]) -> str:
    """Return the batch that the checks refuse. Raises the error if it names none."""
    for name in names:
        if name in str(error):
            return name
    raise error
