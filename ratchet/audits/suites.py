"""Public test suites, run by lm-evaluation-harness (the extra `suites`): guardrails against the loss of
abilities that the project's own rows do not test.

A suite is a YAML task file of the harness in `metrics/suites/`, with its data beside it: nothing is
downloaded and no code of the file is run (`!function` is refused). A document's score is that of the first
metric in `metric_list`. Prompts are the suite's own text, without a chat template.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.errors import ConfigError, DataError
from ratchet.evaluation.report import Suite
from ratchet.evaluation.statistics import estimate
from ratchet.files import read_json
from ratchet.models.loading import MANIFEST, quiet

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "suites"
LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, for files
LIMIT = "evaluate.suites"
TaskConfig = dict[str, Any]  # a task of the harness, as its file says


class Line(NamedTuple):
    """A document's score; higher is better."""

    suite: str
    id: str
    score: float


def read_suites(own: Path, names: Sequence[str]) -> dict[str, TaskConfig]:
    """Read the task configs, and make the paths of their data files absolute.

    Raises ConfigError without the harness, DataError for a file that is no suite.
    """
    if names and find_spec("lm_eval") is None:
        raise ConfigError(
            f"{LIMIT} names {', '.join(names)}, and lm-evaluation-harness is not installed",
            remedy=f"pip install 'ratchet[suites]', or set `{LIMIT}: []`",
        )
    return {name: _read(own / FOLDER / f"{name}.yaml", own) for name in names}


def check_measurable(folder: Path) -> None:
    """Check that the harness can measure the adapter.

    Raises ConfigError for prompt tuning: its output begins with the logits of the virtual tokens, and the
    harness counts positions from the front.
    """
    if (method := read_json(folder / MANIFEST).get("adapter", {}).get("method")) == "prompt":
        raise ConfigError(
            f"{LIMIT} cannot be measured with adapter.method {method!r}",
            remedy=f"set `{LIMIT}: []`, or take another method",
        )


def _read(path: Path, own: Path) -> TaskConfig:
    remedy = (
        "wanted: a task of lm-evaluation-harness with `dataset_path: json`, `dataset_kwargs: {data_files:"
        " {test: rows.jsonl}}` beside it, and a `metric_list`"
    )
    try:
        found = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{LIMIT} names {path.stem!r}, but there is no {path}", remedy=remedy) from None
    except (YAMLError, ValueError) as error:
        tag = "!function" in path.read_text(encoding="utf-8", errors="replace")
        why = (
            "it names Python (`!function`), which is never run from a task file"
            if tag
            else f"it is no plain YAML: {' '.join(str(error).split())}"
        )
        raise DataError(f"{path}: {why}", remedy=remedy) from None
    metrics = found.get("metric_list") if isinstance(found, dict) else None
    if (
        not isinstance(metrics, list)
        or not metrics
        or not isinstance(metrics[0], dict)
        or not isinstance(metrics[0].get("metric"), str)
    ):
        raise DataError(f"{path} names no metric in `metric_list`", remedy=remedy)
    if found.get("dataset_path") not in LOADERS:
        raise DataError(
            f"{path}: `dataset_path` is {found.get('dataset_path')!r}, which would be downloaded; a file is"
            f" one of {', '.join(LOADERS)}",
            remedy=remedy,
        )
    kwargs = found.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if not isinstance(files, dict | str) or not files:
        raise DataError(f"{path} names no `data_files` in `dataset_kwargs`", remedy=remedy)
    placed = (
        {split: _place(file, path, own) for split, file in files.items()}
        if isinstance(files, dict)
        else _place(files, path, own)
    )
    return {**found, "task": path.stem, "dataset_kwargs": {**kwargs, "data_files": placed}}


def _place(file: object, path: Path, own: Path) -> str:
    """Return the absolute path of a suite's data file.

    The file has to be in the folder of the project's own metrics, which DVC tracks, so that a changed file is
    a changed input. Raises DataError.
    """
    found = (path.parent / str(file)).resolve()
    if not found.is_file() or own.resolve() not in found.parents:
        raise DataError(f"{path}: the data file {file!r} is not in {own}", remedy="put it beside the suite")
    return str(found)


def run_suites(model: Any, tokenizer: Any, suites: dict[str, TaskConfig], *, batch_size: int) -> list[Line]:
    """Return one line per suite and document: suite, id, score (higher is better).

    Raises DataError for a suite that the harness cannot run.
    """
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _silence():
        harness, known = (
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            TaskManager(include_defaults=False),
        )
    return [line for name, suite in suites.items() for line in _run(harness, known, name, suite)]


def _run(harness: Any, known: Any, name: str, suite: TaskConfig) -> list[Line]:
    from lm_eval import simple_evaluate

    metric = suite["metric_list"][0]["metric"]
    with tempfile.TemporaryDirectory(prefix="ratchet-suite-") as cache:
        task = {**suite, "dataset_kwargs": {**suite["dataset_kwargs"], "cache_dir": cache}}
        try:
            with _silence():
                found = simple_evaluate(
                    model=harness, tasks=[task], task_manager=known, bootstrap_iters=0, log_samples=True
                )
        except Exception as error:
            raise DataError(
                f"the suite {name!r} does not run: {type(error).__name__}:"
                f" {' '.join(str(error).split())[:300]}",
                remedy=f"metrics/{FOLDER}/{name}.yaml",
            ) from error
    samples = found["samples"][name] if found else []
    first = samples[0]["filter"] if samples else ""  # a task may score each document by several filters
    kept = [sample for sample in samples if sample["filter"] == first]
    try:
        sign = 1.0 if found["higher_is_better"][name][metric] else -1.0
        scores = [sign * float(sample[metric]) for sample in kept]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"the suite {name!r} gives no score a document named {metric!r}",
            remedy="name a metric such as acc, acc_norm or exact_match first in `metric_list`",
        ) from None
    if not scores or not all(map(math.isfinite, scores)):
        raise DataError(
            f"the suite {name!r} has {len(scores)} documents, and scores that are not finite or none",
            remedy=f"metrics/{FOLDER}/{name}.yaml",
        )
    return [
        Line(name, f"{sample['doc_id']} {sample['doc_hash'][:16]}", score)
        for sample, score in zip(kept, scores, strict=True)
    ]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence the progress bars and notes of the harness and of `datasets`; errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def describe_suites(table: pd.DataFrame, suites: dict[str, TaskConfig]) -> dict[str, Suite]:
    """Return suite → mean score of each model, with 95 % intervals."""
    found = {}
    for name, suite in suites.items():
        part = table[table.suite == name]
        models = {
            str(model): estimate(rows.score.to_numpy(dtype=np.float64))
            for model, rows in part.groupby("model")
        }
        found[name] = Suite(suite["metric_list"][0]["metric"], part.id.nunique(), models)
    return found
