"""Preparation's verdicts for a file that is no batch yet, and for rows that were rejected once."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ratchet.config.data import JsonlSource
from ratchet.config.params import Config
from ratchet.data.batches import Batch, check_batch, raw_lines, read_manifest, write_batch
from ratchet.data.examples import RowError
from ratchet.data.validation import Validator
from ratchet.errors import DataError, UserError
from ratchet.files import read_json
from ratchet.sources.jsonl import read_lines, shown
from tasks.ingest import form_of
from tasks.prepare import Rejection, origin_of, prepare

REJECTED = Path("data/prepared/rejected.jsonl")
DEPEND_ON_OTHERS = frozenset(
    {
        "contradiction",
        "straddles",
        "near_golden",
        "superseded",
        "too_many_of_user",
        "too_many_of_source",
        "trigger",
        "boilerplate",
        "forgotten",
    }
)


class Verdict(NamedTuple):
    """Of one file: its counts, as in profile.json; why it would fail, if it would."""

    path: str
    counts: dict[str, Any]
    rejected: list[Rejection]
    failure: str | None
    said: list[str]  # alarms and warnings


class Replayed(NamedTuple):
    """Reason → rows; what depends on other rows is not tried again here."""

    fit: Counter[str]
    unfit: Counter[str]
    not_tried: Counter[str]


def check_file(path: str, golden: Path, config: Config, *, time: str) -> Verdict:
    """Without the batches that stand already: duplicates of them are told when it is ingested.

    Raises DataError for what is no file of rows.
    """
    lines = list(read_lines(JsonlSource(path=path)))
    if not lines:
        raise DataError(f"{shown(path)} holds no rows", remedy="a batch needs at least one")
    form = form_of(lines[0], path) if config.ingest.jsonl.form == "auto" else config.ingest.jsonl.form
    settings = config.prepare.model_copy(update={"test_share": 0.0, "validation_share": 0.0, "min_rows": 1})
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "prepared"
        batch = write_batch(
            raw,
            lines,
            source="jsonl",
            label="checked",
            time=time,
            licence=config.ingest.licence,
            who="",
            form=form,
        )
        failure, said = None, list[str]()
        try:
            prepare(raw, golden, out, settings, tell=said.append)
        except DataError as error:
            failure = str(error).partition("\n")[0]  # its remedy is for a batch that was committed
        if not (out / "profile.json").exists():
            raise DataError(failure or f"{path} cannot be checked")
        counts = read_json(out / "profile.json")["batches"][batch.name]
        path = shown(path)
        return Verdict(
            path,
            counts,
            read_rejected(out / "rejected.jsonl"),
            failure.replace(batch.name, path) if failure else None,
            [line.replace(batch.name, path) for line in said],
        )


def read_rejected(path: Path) -> list[Rejection]:
    """Raises UserError when there is no such file."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist",
            remedy="`dvc checkout data/prepared` brings it; before the first retraining there is none "
            "(ratchet data check FILE looks at a file)",
        )
    return [msgspec.json.decode(line, type=Rejection) for line in path.read_bytes().split(b"\n") if line]


def replay(root: Path, config: Config) -> Replayed:
    """The rejected rows under today's settings. Raises UserError, DataError: a batch is missing."""
    found = Replayed(Counter(), Counter(), Counter())
    validator, batches = (
        Validator(config.prepare),
        {batch.name: batch for batch in read_manifest(root / "data/raw")},
    )
    wanted: dict[str, dict[int, str]] = {}
    for row in read_rejected(root / REJECTED):
        if row.reason in DEPEND_ON_OTHERS:
            found.not_tried[row.reason] += 1
        else:
            wanted.setdefault(row.batch, {})[row.line] = row.reason
    for name, lines in wanted.items():
        batch = _batch(batches, name)
        for number, line in raw_lines(check_batch(root / "data/raw", batch)):
            if number in lines:
                try:
                    validator.check(line, origin_of(batch))
                    found.fit[lines[number]] += 1
                except RowError:
                    found.unfit[lines[number]] += 1
    return found


def raw_row(root: Path, place: str) -> tuple[bytes, Rejection | None]:
    """A row by `BATCH:LINE`, or by the start of the batch's name; and why it was rejected, if it was.

    Raises UserError, DataError.
    """
    name, _, number = place.rpartition(":")
    batches = {batch.name: batch for batch in read_manifest(root / "data/raw")}
    matching = [batch for batch in batches if name and batch.startswith(name)]
    if len(matching) != 1 or not number.isdecimal():
        raise UserError(
            f"{place!r} names {len(matching)} batches"
            if number.isdecimal()
            else f"{place!r} is no BATCH:LINE",
            remedy=f"batches: {', '.join(batches) or 'none'}; then a colon and the line",
        )
    batch = batches[matching[0]]
    line = next(
        (line for at, line in raw_lines(check_batch(root / "data/raw", batch)) if at == int(number)), None
    )
    if line is None:
        raise UserError(f"{batch.name} has {batch.rows} rows, wanted row {number}")
    rejected = read_rejected(root / REJECTED) if (root / REJECTED).exists() else []
    return line, next((row for row in rejected if (row.batch, row.line) == (batch.name, int(number))), None)


def _batch(batches: dict[str, Batch], name: str) -> Batch:
    if name not in batches:
        raise DataError(
            f"the manifest does not list {name}, whose rows were rejected",
            remedy="ratchet retrain prepares the data anew",
        )
    return batches[name]
