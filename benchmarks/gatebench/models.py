"""Make the real models and score each on the pool: all held-out rows of benchmarks/gate_models.py.

Models: a champion and its twins by other seeds (`twin-0` is the champion), the base, a weaker one (the same
training with half of the epochs) and spoilt ones of every kind.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from benchmarks import gate_models
from benchmarks.clinc import one_thread
from benchmarks.gate_models import CHAMPION, KINDS, Size, learn, make_models, make_twin, score, settings
from benchmarks.gatebench.pairs import BAD, BASE, SCORES, TWIN, WEAKER
from ratchet.errors import BaseModelError
from ratchet.files import read_json, write_bytes
from ratchet.models.loading import MANIFEST

FILE = "gatebench.parquet"
NOT_A_NUMBER = "nan"
SPOILT = (
    *[("noise", number) for number in range(4)],
    *[("shuffled", number) for number in range(2)],
    *[("nothing", number) for number in range(2)],
    ("bare", 0),
    (NOT_A_NUMBER, 2),
)
SEED = 100  # of the weaker model's training


class Job(NamedTuple):
    """A model to make and score; `kind` is `twin`, `weaker` or a kind of spoilt models."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        return {TWIN: f"{TWIN}-{self.number}", WEAKER: WEAKER}.get(
            self.kind, f"{BAD}-{self.kind}-{self.number}"
        )


def require_pool(folder: Path, data: Path, size: Size, jobs: int) -> Path:
    """Return the table of scores, made first unless the folder holds it already."""
    path = folder / FILE
    if not path.exists():
        make_pool(folder, data, size, jobs)
    return path


def make_pool(folder: Path, data: Path, size: Size, jobs: int) -> None:
    spoilt = SPOILT if size is gate_models.FULL else [(kind, 2) for kind in KINDS]
    size = size._replace(draws=0)  # all rows of the pool are asked, so no rows are drawn here
    wanted = [
        *(Job(TWIN, number) for number in range(1, size.twins + 1)),
        Job(WEAKER, SEED),
        *(Job(*each) for each in spoilt),
    ]
    with ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=one_thread,
        initargs=(str(folder),),
    ) as pool:
        pool.submit(make_models, folder, data, size).result()
        parts = list(pool.map(make_and_score, [folder] * len(wanted), [size] * len(wanted), wanted))
    seen = read_json(folder / CHAMPION / MANIFEST)["batches"]
    table = pd.concat(parts, ignore_index=True).drop_duplicates(["model", "id"])
    write_bytes(folder / FILE, [table.assign(seen=table.batch.isin(seen)).to_parquet(None, index=False)])


def make_and_score(folder: Path, size: Size, job: Job) -> pd.DataFrame:
    """Return a line a row of the model, of the champion (as `twin-0`) and of the base."""
    if job.kind == TWIN:
        make_twin(folder, size, job.number)
        return read(folder / f"twin-{job.number}", job.name)
    out = folder / job.name / "candidate"
    if job.kind == WEAKER:
        config = settings(size, job.number, size.epochs / 2)
        learn(folder, folder / "known", folder / "nobody", out, config)
    else:
        config = settings(size, job.number)
        KINDS[job.kind](folder, out, job.number, size)
    try:
        score(folder, out, folder / job.name / "scores", config)
    except BaseModelError as error:
        if job.kind != NOT_A_NUMBER:
            raise
        print(f"{job.name}: {error}", file=sys.stderr)
        return unscored(folder, job.name)
    return read(folder / job.name / "scores", job.name)


def read(folder: Path, name: str) -> pd.DataFrame:
    table = pd.read_parquet(folder / "scores.parquet")
    slices = [column for column in table if str(column).startswith("slice:")]
    kept = table[["id", "batch", "reference", *slices, "model", *SCORES]]
    return kept.assign(model=kept.model.map({"candidate": name, "champion": f"{TWIN}-0", "base": BASE}))


def unscored(folder: Path, name: str) -> pd.DataFrame:
    """Return what a model whose weights are not finite says: no likelihood is a number, no answer is right.

    Ratchet's evaluation stops at such a model, so there is no table; an evaluation that does not check has
    this one.
    """
    champion = read(folder / "twin-1", TWIN)
    rows = champion[champion.model == f"{TWIN}-0"]
    return rows.assign(model=name, exact_match=0.0, answer_nll=np.nan, answer="")


def accuracies(table: pd.DataFrame) -> dict[str, float]:
    return {str(name): float(mean) for name, mean in table.groupby("model").exact_match.mean().items()}
