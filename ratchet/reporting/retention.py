"""Build the retention table from recorded evaluations: every version on the test rows of every batch and on
the golden set.

An evaluation is kept with its commit (`reports/gate.json` in git, `reports/evaluation` in DVC). It scores
candidate, champion and base on all test rows of that day. Test rows never move, so a version keeps its cell
for a batch. While it is the champion, each later evaluation adds cells for the batches that came since. Cells
that nobody measured are empty; `tasks.retention` fills them. Summaries are cached under
`.ratchet/cache/ledger` by DVC's hash of the evaluation.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ratchet.errors import CheckoutError, CommandError, RatchetError
from ratchet.evaluation.statistics import Estimate, estimate
from ratchet.files import write_json
from ratchet.pipeline.checkout import git
from ratchet.pipeline.workspace import get_output
from ratchet.promotion.champion import read_ledger
from ratchet.promotion.verdict import decode_verdict

if TYPE_CHECKING:
    import pandas as pd

CACHE = Path(".ratchet/cache/ledger")  # an old name, kept because each filled cell in it cost an evaluation
SAVED = Path(".ratchet/retention.json")
OLD_SAVED = Path(".ratchet/ledger.json")  # the old place of SAVED; read until the next table is written
GATE, EVALUATION, GOLDEN, BASE = "reports/gate.json", "reports/evaluation", "golden", "base"
MODELS = ("candidate", "champion", BASE)


class Evaluation(NamedTuple):
    """One evaluation whose verdict was committed.

    `digest` is DVC's hash of the table of scores, `adapter` the sha256 of the candidate's weights.
    """

    commit: str
    at: str
    digest: str
    adapter: str
    rival: int | None


class Cell(Estimate, frozen=True, omit_defaults=True):
    """A version's score on a slice; `from_` is the commit that measured it, or `filled`."""

    from_: str = msgspec.field(name="from", default="")


class VersionRow(msgspec.Struct, frozen=True):
    """The cells of a version by slice; a cell is None where the version was never asked these rows."""

    name: str
    version: int | None
    adapter: str
    commit: str
    at: str
    cells: dict[str, Cell | None]


class Retention(msgspec.Struct, frozen=True):
    """The table: first the base, then versions from the oldest; `rows` counts the rows of each slice."""

    metric: str
    slices: list[str]
    rows: dict[str, int]
    versions: list[VersionRow]
    faults: list[str]

    @property
    def unasked(self) -> list[tuple[VersionRow, list[str]]]:
        """Return (version, the slices on which it was never asked)."""
        return [
            (row, empty)
            for row in self.versions
            if row.name != BASE and (empty := [name for name, cell in row.cells.items() if cell is None])
        ]


def read_evaluations(root: Path, *, tip: str = "HEAD") -> list[Evaluation]:
    """Read the evaluations in git's history, the newest first.

    A commit whose files cannot be read is skipped.
    """
    try:
        log = git(root, "log", "--format=%H %cI", tip, "--", GATE).split("\n")
    except CommandError:  # no commit yet
        return []
    found = (_evaluation(root, *line.split(" ", 1)) for line in log if line)
    return list({each.digest: each for each in reversed([each for each in found if each])}.values())[::-1]


def _evaluation(root: Path, commit: str, at: str) -> Evaluation | None:
    try:
        verdict = decode_verdict(json.loads(git(root, "show", f"{commit}:{GATE}")))
        lock: Any = YAML(typ="safe").load(git(root, "show", f"{commit}:dvc.lock"))
        digest = next(
            str(out["md5"]) for out in lock["stages"]["evaluate"]["outs"] if out["path"] == EVALUATION
        )
        return Evaluation(commit, at, digest, verdict.candidate.adapter_sha256, verdict.rival.version)
    except (RatchetError, YAMLError, ValueError, KeyError, TypeError, StopIteration):
        return None


def numbers_of(root: Path) -> dict[str, int]:
    """Map an adapter's sha256 to its version, for versions that were ever in charge; needs only git."""
    return {entry.adapter_sha256: entry.version for _, entry in read_ledger(root)}


def registered_numbers(name: str) -> dict[str, int]:
    """Map an adapter's sha256 to its version, for each version that MLflow knows, including rejected ones.

    Raises ServiceError.
    """
    from ratchet.tracking.registry import list_versions

    return {
        sha: version.number for version in list_versions(name) if (sha := version.tags.get("adapter_sha256"))
    }


def build(
    root: Path, metric: str, numbers: dict[str, int], evaluations: list[Evaluation] | None = None
) -> Retention:
    """Build the table; `evaluations`: the newest first."""
    evaluations = read_evaluations(root) if evaluations is None else evaluations
    faults: list[str] = []
    rows: dict[str, VersionRow] = {}
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
                for name, cell in cells.items():
                    row.cells[name] = msgspec.structs.replace(cell, from_=found.commit[:8])
            for name, cell in cells.items():
                order.setdefault(name, len(order))
                newest[name] = cell.rows
    slices = sorted(order, key=lambda name: (name == GOLDEN, order[name]))
    versions = []
    for row in sorted(rows.values(), key=lambda row: (row.name != BASE, row.at)):
        known = read_filled(root, row.adapter, metric)
        # Rows may have been erased since: a filled cell counts only if it has today's number of rows.
        filled = {name: cell for name, cell in known.items() if cell.rows == newest.get(name)}
        whole: dict[str, Cell | None] = {name: row.cells.get(name) or filled.get(name) for name in slices}
        versions.append(msgspec.structs.replace(row, cells=whole))
    return Retention(metric, slices, newest, versions, faults)


def _row(
    rows: dict[str, VersionRow], model: str, found: Evaluation, numbers: dict[str, int]
) -> VersionRow | None:
    """Return the row of that model of an evaluation; make it if it is new.

    The champion's row was made by its own evaluation. Return None when that evaluation is gone.
    """
    if model == BASE:
        return rows.setdefault(BASE, VersionRow(BASE, None, "", "", "", {}))
    if model == "champion":
        adapters = [sha for sha, number in numbers.items() if number == found.rival]
        return next((rows[sha] for sha in adapters if sha in rows), None)
    number = numbers.get(found.adapter)
    name = f"v{number}" if number is not None else f"unnumbered {found.commit[:8]}"
    return rows.setdefault(found.adapter, VersionRow(name, number, found.adapter, found.commit, found.at, {}))


def summarise(root: Path, found: Evaluation, metric: str) -> dict[str, dict[str, Cell]]:
    """Summarise an evaluation as model → slice → cell.

    Raises CheckoutError when the table cannot be read or lacks the metric.
    """
    kept = root / CACHE / f"{found.digest}-{metric}.json"
    if kept.exists():
        try:
            return msgspec.json.decode(kept.read_bytes(), type=dict[str, dict[str, Cell]])
        except msgspec.MsgspecError:
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
    write_json(kept, msgspec.to_builtins(summary))
    return summary


def read_scores(root: Path, commit: str) -> pd.DataFrame:
    """Read the table of scores of the evaluation at a commit. Raises CheckoutError."""
    import pandas as pd

    with tempfile.TemporaryDirectory(prefix="ratchet-retention-") as scratch:
        try:
            get_output(root, commit, EVALUATION, Path(scratch) / "evaluation")
            return pd.read_parquet(Path(scratch) / "evaluation/scores.parquet")
        except (CommandError, OSError, ValueError) as error:
            raise CheckoutError(
                f"the scores of {commit[:8]} cannot be had: {' '.join(str(error).split())[:200]}",
                remedy="dvc pull brings what another machine made",
            ) from None


def cells_of(scores: pd.DataFrame, metric: str) -> dict[str, Cell]:
    """Estimate the cell of each slice from the scores of one model."""
    found = {}
    for name, part in scores.groupby("batch"):
        values = part[metric].to_numpy(dtype=np.float64)
        if np.isfinite(values).all():
            found[str(name)] = Cell(**msgspec.structs.asdict(estimate(values)))
    return found


# --- cells that were filled ---------------------------------------------------------------------------------


def filled_file(root: Path, adapter: str, metric: str) -> Path:
    return root / CACHE / f"filled-{adapter[:32]}-{metric}.json"


def read_filled(root: Path, adapter: str, metric: str) -> dict[str, Cell]:
    """Return the cells that `ratchet retention --fill` measured; none where the file is missing or broken."""
    try:
        return msgspec.json.decode(filled_file(root, adapter, metric).read_bytes(), type=dict[str, Cell])
    except (FileNotFoundError, msgspec.MsgspecError):
        return {}
