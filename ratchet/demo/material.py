"""What a demo is about: its rows, the questions of its clients, and the words that tell its story."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ratchet.config.params import Config, load_config
from ratchet.demo.charts import Asked, Kind, Painter, draw, write_rows
from ratchet.demo.clients import Question
from ratchet.sources.pydoc import harvest

Command = Callable[..., object]  # runs a `ratchet` command in the demo's checkout


class Words(NamedTuple):
    """The titles of the steps, which differ from one material to the other."""

    rows: str
    base: str
    reason: str  # of the first retraining
    known: str
    new: str


class Material(Protocol):
    """Rows to learn from, and questions that are in none of them."""

    words: Words
    writes: bool  # whether a teacher can write rows out of documents for it

    def take_in(self, home: Path, golden_rows: int, ratchet: Command) -> None:
        """Ingest the golden set and the first batch."""

    def make_base(self, home: Path) -> list[str]:
        """Return the command that makes the base in the demo's checkout, if one has to be run."""

    def questions(self, home: Path, *, new: bool) -> Iterator[Question]:
        """Ask without end about what the first version knows, or about what is new to it."""


SECOND = "numpy,jinja2,rich"


class Documentation:
    """Which module of which package does this text document?"""

    writes = True

    def __init__(self, base: str) -> None:
        self.words = Words(
            rows="The standard library's documentation comes in: a frozen golden set, then the first batch",
            base=base,
            reason="first model of the standard library",
            known="Clients ask v1 about the standard library; what they ask was kept out of every batch",
            new=f"Half of the clients come with packages that v1 has never seen: {SECOND}",
        )

    def take_in(self, home: Path, golden_rows: int, ratchet: Command) -> None:
        ratchet("ingest", "--packages", "stdlib", "--golden", str(golden_rows))
        ratchet("ingest", "--packages", "stdlib")

    def make_base(self, home: Path) -> list[str]:
        return []

    def questions(self, home: Path, *, new: bool) -> Iterator[Question]:
        packages, kind = (SECOND.split(","), "new packages") if new else (["stdlib"], "the standard library")
        kept = _kept_out(packages, kind, load_config(home / "params.yaml"))
        chance = random.Random(2 + new)  # noqa: S311 (no secret: the order of the questions)
        while True:
            yield chance.choice(kept)


def _kept_out(packages: list[str], kind: str, config: Config) -> list[Question]:
    """Return the questions of these packages that `ingest.pydoc.share` keeps out of every batch."""
    settings = config.ingest.pydoc.model_copy(update={"packages": packages})
    taken = {row["messages"][0]["content"] for row in harvest(settings)}
    every = harvest(settings.model_copy(update={"share": 1.0}))
    return [
        Question(question, answer, kind)
        for question, answer in (
            (row["messages"][0]["content"], row["messages"][1]["content"]) for row in every
        )
        if question not in taken
    ]


CHARTS = Path(".ratchet/charts")  # in the demo's checkout: its base, and the files that people bring
CHART_BASE = CHARTS / "base"
BARS = 900  # rows of the first batch
TAUGHT = "shown"  # the question
GOLDEN_SEED, BATCH_SEED, CLIENT_SEED = 100_000, 200_000, 300_000


class Charts:
    """What does this chart show? v1 learns it for bars; then lines come, with the same questions."""

    writes = False
    words = Words(
        rows="Bar charts come in, a folder of pictures and a CSV: a frozen golden set, then the first batch",
        base="The base, a small LLaVA, is pre-trained here on charts of its own",
        reason="first model of bar charts",
        known="Clients show v1 bar charts that are in no batch, and correct it where it is wrong",
        new="Half of the clients come with line charts, of which v1 was taught nothing; they ask the same",
    )

    def take_in(self, home: Path, golden_rows: int, ratchet: Command) -> None:
        for name, first, count in (("golden", GOLDEN_SEED, golden_rows), ("bars", BATCH_SEED, BARS)):
            charts = draw("bar", range(first, first + count))
            asked = [Asked(chart, TAUGHT) for chart in charts]
            path = write_rows(home / CHARTS, name, asked).relative_to(home)
            ratchet("ingest", "--path", str(path), *(("--golden", str(count)) if name == "golden" else ()))

    def make_base(self, home: Path) -> list[str]:
        return [sys.executable, "-m", "ratchet.demo.chart_base", "--out", str(CHART_BASE)]

    def questions(self, home: Path, *, new: bool) -> Iterator[Question]:
        kind: Kind = "line" if new else "bar"
        painter, number = Painter(kind), 0
        while True:
            asked = Asked(painter.draw(CLIENT_SEED + number), TAUGHT)
            yield Question(asked.text, asked.answer, f"{kind}s", asked.chart.png)
            number += 1
