"""The retention table: every version by the test rows of every batch and by the golden set, from what
evaluations recorded.

An evaluation stands with its commit (`reports/gate.json` in git, `reports/evaluation` in DVC) and scores
candidate, champion and base on all test rows of that day. Test rows never move, so a version keeps its cell
for a batch from then on; as long as it is the champion, each later evaluation adds cells for the batches that
came after it. What nobody ever measured is empty; `tasks.ledger` fills it. Summaries are kept under
`.ratchet/cache/ledger` by DVC's hash of the evaluation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.errors import CheckoutError, CommandError, RatchetError
from ratchet.evaluation.statistics import bootstrap_mean, wilson
from ratchet.files import read_json, write_json
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.promotion.champion import read_ledger

if TYPE_CHECKING:
    import pandas as pd

CACHE, SAVED = Path(".ratchet/cache/ledger"), Path(".ratchet/retention.json")
OLD_SAVED = Path(".ratchet/ledger.json")  # where SAVED stood before; read until the next table is written
GATE, EVALUATION, GOLDEN, BASE = "reports/gate.json", "reports/evaluation", "golden", "base"
MODELS = ("candidate", "champion", BASE)


class Evaluation(NamedTuple):
    """One verdict that landed.

    `digest` is DVC's hash of the table of scores, `adapter` the sha256 of the candidate's weights.
    """

    commit: str
    at: str
    digest: str
    adapter: str
    rival: int | None


def read_evaluations(root: Path, *, tip: str = "HEAD") -> list[Evaluation]:
    """The newest first. Commits whose files cannot be read give none."""
    try:
        log = git(root, "log", "--format=%H %cI", tip, "--", GATE).split("\n")
    except CommandError:  # no commit yet
        return []
    found = (_evaluation(root, *line.split(" ", 1)) for line in log if line)
    return list({each.digest: each for each in reversed([each for each in found if each])}.values())[::-1]


def _evaluation(root: Path, commit: str, at: str) -> Evaluation | None:
    try:
        gate = json.loads(git(root, "show", f"{commit}:{GATE}"))
        lock: Any = YAML(typ="safe").load(git(root, "show", f"{commit}:dvc.lock"))
        digest = next(
            str(out["md5"]) for out in lock["stages"]["evaluate"]["outs"] if out["path"] == EVALUATION
        )
        return Evaluation(
            commit, at, digest, str(gate["candidate"]["adapter_sha256"]), gate["rival"]["version"]
        )
    except (CommandError, YAMLError, ValueError, KeyError, TypeError, StopIteration):
        return None


def numbers_of(root: Path) -> dict[str, int]:
    """Adapter's sha256 → number, of the versions that were ever in charge: told by git alone."""
    return {entry.adapter_sha256: entry.version for _, entry in read_ledger(root)}


def registered_numbers(name: str) -> dict[str, int]:
    """The same of every version that MLflow knows, rejected ones too. Raises ServiceError."""
    from ratchet.tracking.registry import list_versions

    return {
        sha: version.number for version in list_versions(name) if (sha := version.tags.get("adapter_sha256"))
    }


def build(
    root: Path, metric: str, numbers: dict[str, int], evaluations: list[Evaluation] | None = None
) -> dict[str, Any]:
    """{metric, slices, versions: [{name, version, adapter, commit, at, cells: {slice: cell}}], faults}: the
    base first, then the oldest version.

    A cell is {rows, mean, low, high, from}, or None where that version was never asked these rows.
    `evaluations`: the newest first.
    """
    evaluations = read_evaluations(root) if evaluations is None else evaluations
    faults: list[str] = []
    rows: dict[str, dict[str, Any]] = {}
    order: dict[str, int] = {}
    newest: dict[str, int] = {}
    for found in reversed(evaluations):
        try:
            summary = summarise(root, found, metric)
        except RatchetError as error:
            faults.append(str(error).splitlines()[0])
            continue
        for model, cells in summary.items():
            if row := _row(rows, model, found, numbers):
                row["cells"] |= {name: {**cell, "from": found.commit[:8]} for name, cell in cells.items()}
            for name, cell in cells.items():
                order.setdefault(name, len(order))
                newest[name] = cell["rows"]
    slices = sorted(order, key=lambda name: (name == GOLDEN, order[name]))
    versions = sorted(rows.values(), key=lambda row: (row["name"] != BASE, row["at"]))
    for row in versions:
        row["cells"] = {
            **{name: None for name in slices},
            **_filled(root, row["adapter"], metric, slices, newest),
            **{name: row["cells"][name] for name in slices if name in row["cells"]},
        }
    return {"metric": metric, "slices": slices, "rows": newest, "versions": versions, "faults": faults}


def _row(
    rows: dict[str, dict[str, Any]], model: str, found: Evaluation, numbers: dict[str, int]
) -> dict[str, Any] | None:
    """Of that model of an evaluation.

    The champion's is there since its own evaluation, or that one is gone.
    """
    if model == BASE:
        return rows.setdefault(
            BASE, {"name": BASE, "version": None, "adapter": "", "commit": "", "at": "", "cells": {}}
        )
    if model == "champion":
        adapters = [sha for sha, number in numbers.items() if number == found.rival]
        return next((rows[sha] for sha in adapters if sha in rows), None)
    number = numbers.get(found.adapter)
    name = f"v{number}" if number is not None else f"unnumbered {found.commit[:8]}"
    return rows.setdefault(
        found.adapter,
        {
            "name": name,
            "version": number,
            "adapter": found.adapter,
            "commit": found.commit,
            "at": found.at,
            "cells": {},
        },
    )


def summarise(root: Path, found: Evaluation, metric: str) -> dict[str, dict[str, Any]]:
    """model → slice → {rows, mean, low, high}.

    Raises CheckoutError when the table cannot be had, or lacks the metric.
    """
    kept = root / CACHE / f"{found.digest}-{metric}.json"
    if kept.exists():
        try:
            return dict(read_json(kept))
        except RatchetError:
            kept.unlink()
    table = read_scores(root, found.commit)
    if metric not in table:
        raise CheckoutError(
            f"the evaluation of {found.commit[:8]} has no {metric}",
            remedy="name a metric that it has with --metric",
        )
    summary = {
        model: cells_of(table[table.model == model], metric)
        for model in MODELS
        if (table.model == model).any()
    }
    write_json(kept, summary)
    return summary


def read_scores(root: Path, commit: str) -> pd.DataFrame:
    """Raises CheckoutError."""
    import pandas as pd

    with tempfile.TemporaryDirectory(prefix="ratchet-ledger-") as scratch:
        try:
            get_output(root, commit, EVALUATION, Path(scratch) / "evaluation")
            return pd.read_parquet(Path(scratch) / "evaluation/scores.parquet")
        except (CommandError, OSError, ValueError) as error:
            raise CheckoutError(
                f"the scores of {commit[:8]} cannot be had: {' '.join(str(error).split())[:200]}",
                remedy="dvc pull brings what another machine made",
            ) from None


def cells_of(scores: pd.DataFrame, metric: str) -> dict[str, dict[str, Any]]:
    """Slice → cell, of the scores of one model. 95 % intervals: Wilson's for shares, the bootstrap's for
    other scores.
    """
    return {
        str(name): cell_of(part[metric].to_numpy(dtype=np.float64))
        for name, part in scores.groupby("batch")
        if np.isfinite(part[metric].to_numpy(dtype=np.float64)).all()
    }


def cell_of(values: Any) -> dict[str, Any]:
    found = (
        wilson(values, alpha=0.025)
        if np.isin(values, (0.0, 1.0)).all()
        else bootstrap_mean(values, alpha=0.025, resamples=1000, seed=0)
    )
    return {"rows": len(values), **found._asdict()}


# --- cells that were filled ---------------------------------------------------------------------------------


def filled_file(root: Path, adapter: str, metric: str) -> Path:
    return root / CACHE / f"filled-{adapter[:32]}-{metric}.json"


def _filled(
    root: Path, adapter: str, metric: str, slices: Iterable[str], rows: dict[str, int]
) -> dict[str, Any]:
    """Those of as many rows as the newest evaluation has: some may have been forgotten since."""
    try:
        kept = read_json(filled_file(root, adapter, metric)) if adapter else {}
        return {name: kept[name] for name in slices if name in kept and kept[name]["rows"] == rows[name]}
    except (RatchetError, KeyError, TypeError):  # none yet
        return {}


def missing(ledger: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    """(version, the slices on which it was never asked)."""
    return [
        (row, empty)
        for row in ledger["versions"]
        if row["name"] != BASE and (empty := [name for name, cell in row["cells"].items() if cell is None])
    ]
