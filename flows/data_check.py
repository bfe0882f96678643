"""Apply preparation's checks to a file that is no batch yet, and again to rejected rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.data.batches import Batch, check_batch, raw_lines, read_manifest
from ratchet.data.erasure import GOLDEN, Forgotten
from ratchet.data.examples import Example, RowError, count_reasoned
from ratchet.data.profile import BatchProfile, check_limits
from ratchet.data.validation import Origin, Validator
from ratchet.errors import DataError, RatchetError, UserError
from ratchet.evaluation.metrics import Proposal, propose_metrics
from ratchet.models.lengths import Lengths, check_dropped, describe_lengths, known_tokens
from ratchet.models.manifests import read_base_manifest
from ratchet.sources.jsonl import Place, shown
from ratchet.sources.preview import Preview, preview_rows, tell_reasoning
from tasks.ingest import Pulled, pull
from tasks.prepare import Incoming, Rejection, origin_of, sort_batches

BASE = Path("models/base")
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
    """The result for one file: its counts, as in profile.json, and why it would fail, if it would."""

    path: str
    counts: BatchProfile
    rejected: list[Rejection]  # their `line` is the row's number
    places: dict[int, Place]  # number of a rejected row → where it stands in its file
    failure: str | None
    said: list[str]  # alarms and warnings
    tokens: Lengths | None  # of the accepted rows, by the chosen base
    unmeasured: str  # why `tokens` is None
    preview: list[Preview]
    metrics: Proposal | None  # metrics that suit the accepted answers


class Resubmitted(NamedTuple):
    """Reason → number of rows; rows whose reason depends on other rows are not tried again here."""

    fit: Counter[str]
    unfit: Counter[str]
    not_tried: Counter[str]


def check_file(
    path: str,
    golden: Path,
    config: Config,
    *,
    time: str,
    base: Path = BASE,
    query: str | None = None,
    preview: bool = False,
) -> Verdict:
    """Check a file, or the result of a database query, by itself.

    Duplicates of rows in batches are found only at the ingest. Raises DataError for a file without rows, and
    for a golden set that is broken.
    """
    pulled, name = pull(config, path=path, query=query), shown(path)
    lines = pulled.lines
    settings = config.prepare.model_copy(update={"test_share": 0.0, "validation_share": 0.0, "min_rows": 1})
    origin = Origin(name, pulled.source, pulled.form, time, config.ingest.licence)
    rejected: list[Rejection] = []
    chat, unmeasured = known_tokens(base, config.base, pulled.media)
    lengths: list[int] = []
    references: list[str] = []
    judged: Counter[str] = Counter()
    reasoned = 0
    unwritable: list[str] = []

    def keep(side: str, row: Example | Rejection) -> None:
        nonlocal reasoned
        if isinstance(row, Rejection):
            rejected.append(row)
        elif side != GOLDEN:
            judged["pairs" if row.rejected else "" if row.desirable else "bad answers"] += 1
            reasoned += count_reasoned([row])
            if row.desirable:
                references.append(row.answer)
            if chat:
                try:
                    lengths.append(len(chat.encode(row).ids))
                except RatchetError as error:  # the template cannot write its tools or calls
                    unwritable.append(" ".join(str(error).split()))

    gathered = sort_batches(
        [Incoming(origin, len(lines), enumerate(lines, start=1), pulled.media)],
        golden,
        settings,
        Forgotten(),
        keep,
    )
    profile, failure, said, tokens = gathered.profile(), None, [*pulled.said], None
    try:
        said += check_limits(profile, gathered.first, settings, lambda _, row: str(pulled.place_of(row)))
    except DataError as error:
        failure = str(error).partition("\n")[0]  # without the remedy, which is for a committed batch
    if (found := {name: count for name, count in judged.items() if name}) and config.train.objective == "sft":
        told = " and ".join(f"{count} {name}" for name, count in found.items())
        said.append(
            f"{told}: `train.objective: dpo` or `kto` learns from them, "
            "with `preference` in `evaluate.metrics`"
        )
    if reasoned:
        said.append(f"{name}: {reasoned} rows have reasoning: {tell_reasoning(chat)}")
    if lengths:
        context = read_base_manifest(base).context
        tokens = describe_lengths(lengths, context, config.tokenize)
        try:
            dropped = {"too_long": tokens.too_long}
            check_dropped("rows", tokens.rows, dropped, lengths, tokens.max_length, context, settings)
        except DataError as error:
            failure = failure or str(error)
    if len(unwritable) > settings.may_drop(len(lines)):
        failure = failure or f"{len(unwritable)} of {len(lines)} rows cannot be learned: {unwritable[0]}"
    elif unwritable:
        said.append(f"{len(unwritable)} rows cannot be learned: {unwritable[0]}")
    shown_rows = preview_rows(lines, origin, settings, chat, pulled.media) if preview else []
    return Verdict(
        name,
        profile.batches[name],
        rejected,
        {row.line: pulled.place_of(row.line) for row in rejected},
        failure,
        said,
        tokens,
        unmeasured,
        shown_rows,
        propose_metrics(references),
    )


def preview_pulled(pulled: Pulled, config: Config, base: Path) -> tuple[list[Preview], str]:
    """Return the first valid rows as the model will see them, and why there are no tokens, if so."""
    chat, why = known_tokens(base, config.base, pulled.media)
    origin = Origin(pulled.label, pulled.source, pulled.form, "", config.ingest.licence)
    return preview_rows(pulled.lines, origin, config.prepare, chat, pulled.media), why


def read_rejected(path: Path) -> list[Rejection]:
    """Read the rejected rows of a preparation. Raises UserError when there is no such file."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist",
            remedy="`dvc checkout data/prepared` brings it; before the first retraining there is none "
            "(ratchet data check FILE looks at a file)",
        )
    return [msgspec.json.decode(line, type=Rejection) for line in path.read_bytes().split(b"\n") if line]


def resubmit(root: Path, config: Config) -> Resubmitted:
    """Validate the rejected rows under today's settings. Raises UserError, DataError: a batch is missing."""
    found = Resubmitted(Counter(), Counter(), Counter())
    validator = Validator(config.prepare)
    batches = {batch.name: batch for batch in read_manifest(root / "data/raw")}
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
    """Find a row by `BATCH:LINE`, or by the start of the batch's name, and why it was rejected, if it was.

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
