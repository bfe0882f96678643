"""Pull rows from a source into one immutable batch under data/raw, or into the frozen golden set.

    python -m tasks.ingest --raw data/raw

Run by hand, it writes a batch from the source that params.yaml names and commits nothing; the flow `ingest`
commits the batch as well.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import xxhash

from ratchet.config.data import JsonlSource, PydocSource, SqlSource
from ratchet.config.params import Config
from ratchet.data.batches import (
    Batch,
    Original,
    content_hash,
    pictures_in,
    raw_lines,
    read_manifest,
    write_batch,
)
from ratchet.data.dedup import split_by_hash
from ratchet.data.examples import Example, RawRow, RowError, encode_line, make_raw_row
from ratchet.data.forms import MEDIA_KEYS, read_conversation, recognise_form, whole_rows
from ratchet.data.validation import Doubt, Origin, Validator
from ratchet.errors import DataError
from ratchet.files import write_bytes
from ratchet.media.store import MediaStore, write_shard
from ratchet.models.lengths import check_whole, known_tokens
from ratchet.models.manifests import read_base_manifest
from ratchet.monitoring.pictures import KeptPictures
from ratchet.pipeline.stage import project_root, run_stage, say
from ratchet.sources import feedback, jsonl, pydoc
from ratchet.sources import reviewed as review
from ratchet.sources.columns import listed
from ratchet.sources.media import MediaIntake
from ratchet.sources.sql import is_database

BASE = Path("models/base")
Tell = Callable[[str], object]
MEASURED = 100  # rows whose keys are taken for a table's columns
# Columns that cannot hold the answer to a column `text`.
BESIDE_TEXT = frozenset(
    {
        *("text", "id", "source", "licence", "license", "language", "user", "meta", "tags", "title", "url"),
        *("time", "timestamp", "created_at", "date", "review"),
        *MEDIA_KEYS,
    }
)


class Pulled(NamedTuple):
    """Raw lines as the source gave them, a label for people, and the rows' form.

    Reviewed drafts come with their reviewers and the batch that holds their rows already; files and databases
    with their names and hashes, the renamed columns, messages on what was left out (`said`), and the pictures
    to which the rows refer (`media`).
    """

    lines: list[bytes]
    source: str
    label: str
    form: str
    reviewers: tuple[str, ...] = ()
    drafts: tuple[tuple[str, str], ...] = ()  # (name, hash of its rows)
    batch: str = ""
    files: tuple[Original, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()
    query: str = ""
    said: tuple[str, ...] = ()
    media: Mapping[str, bytes] = MappingProxyType({})
    at: Sequence[int] = ()  # the line of its file on which each row begins; 0 where there are no lines

    def place_of(self, row: int) -> jsonl.Place:
        """Return where row number `row`, from 1, stands in its file."""
        return jsonl.find_place(row, self.files, self.at)


def pull(
    config: Config,
    *,
    root: Path | None = None,
    source: str | None = None,
    path: str | None = None,
    packages: list[str] | None = None,
    draft: str | None = None,
    columns: dict[str, str] | None = None,
    query: str | None = None,
) -> Pulled:
    """Read the rows of a source; `root` is the checkout, from which relative paths count.

    `path` names files or is a database's address; `columns` replaces `ingest.columns`. Raises DataError when
    nothing is found, the rows have no known form, or there are none.
    """
    named = "sql" if query or (path and is_database(path)) else "jsonl" if path else None
    chosen = source or named or ("pydoc" if packages else "review" if draft else config.ingest.source)
    if draft and chosen != "review":
        raise DataError(
            f"a draft is named ({draft}), but the source is {chosen}",
            remedy="drafts come from the source review: leave --source out",
        )
    if named and chosen != named:
        what = f"a path is named ({jsonl.shown(path)})" if path and not query else "a query is given"
        raise DataError(
            f"{what}, but the source is {chosen}",
            remedy=f"that is the source {named}: leave --source out",
        )
    mapping = config.ingest.columns if columns is None else columns
    if chosen == "pydoc":
        settings = config.ingest.pydoc.model_copy(update={"packages": packages} if packages else {})
        pulled = _pull_pydoc(settings)
    elif chosen == "jsonl":
        place = path or config.ingest.jsonl.path
        if root and place and "://" not in place:
            place = str(root / place)
        pulled = _pull_jsonl(
            config.ingest.jsonl.model_copy(update={"path": place}),
            mapping,
            config.prepare.extra_keys,
            MediaIntake(config.ingest.media, root),
        )
    elif chosen == "sql":
        given = {key: value for key, value in (("url", path), ("query", query)) if value}
        pulled = _pull_sql(
            config.ingest.sql.model_copy(update=given),
            root,
            mapping,
            config.prepare.extra_keys,
            MediaIntake(config.ingest.media, root),
        )
    elif chosen == "feedback":
        pulled = Pulled(
            [msgspec.json.encode(row) for row in feedback.harvest(project_root(root), config)],
            "feedback",
            "feedback",
            "messages",
            media=KeptPictures(project_root(root)),
        )
    elif chosen == "review":
        pulled = _pull_review(review.harvest(project_root(root), config.review, draft))
    else:
        raise DataError(f"source {chosen!r} is unknown", remedy="known: pydoc, jsonl, sql, feedback, review")
    if not pulled.media and any(map(pictures_in, pulled.lines)):
        # Rows that people judged show pictures of rows that came before.
        pulled = pulled._replace(media=MediaStore.read(project_root(root) / "data/raw"))
    if not pulled.lines:
        why = (
            feedback.tell_none(project_root(root), config)
            if chosen == "feedback"
            else "check the source's settings in `ingest`"
        )
        raise DataError(
            f"the source {pulled.source} ({pulled.label}) gave no rows",
            remedy=f"a batch needs at least one row; {why}",
        )
    return pulled


def check_rows(pulled: Pulled, config: Config) -> None:
    """Check each row by itself. Duplicates and what depends on other rows are found in preparation.

    Raises DataError when all rows are unfit, or more than `prepare.max_rejected_share` allows: once
    committed, they would stop every retraining.
    """
    if pulled.source not in ("jsonl", "sql"):  # the others are made or reviewed here
        return
    origin = Origin(pulled.label, pulled.source, pulled.form, "", config.ingest.licence)
    validator, reasons, first = Validator(config.prepare), Counter[str](), ""
    for row, line in enumerate(pulled.lines, start=1):
        try:
            validator.check(line, origin)
        except Doubt:  # a person may accept this row
            continue
        except RowError as error:
            first = first or f"{pulled.place_of(row)}: {error}"
            reasons[error.reason] += 1
    unfit = reasons.total()
    if unfit > config.prepare.may_drop(len(pulled.lines)) or unfit == len(pulled.lines):
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"{unfit} of {len(pulled.lines)} rows of {pulled.label} cannot be used ({told}); "
            f"the first: {first}",
            remedy="nothing was committed; `ratchet data check` lists the rows, `--columns "
            "prompt=NAME,completion=NAME` names columns, and prepare.max_rejected_share "
            f"({config.prepare.max_rejected_share:g}) is the share that may be unfit",
        )


def _pull_pydoc(settings: PydocSource) -> Pulled:
    return Pulled(
        [msgspec.json.encode(row) for row in pydoc.harvest(settings)],
        "pydoc",
        "-".join(settings.packages),
        "messages",
    )


def _pull_jsonl(
    settings: JsonlSource, mapping: dict[str, str], extra: list[str], pictures: MediaIntake
) -> Pulled:
    found = jsonl.read_files(settings.path, mapping, extra, pictures)
    path = jsonl.shown(settings.path)
    form = _form_of_all(found, path, mapping) if settings.form == "auto" else settings.form
    return Pulled(
        found.lines,
        "jsonl",
        label_of(settings.path),
        form,
        files=found.files,
        columns=tuple(mapping.items()),
        said=found.said,
        media=found.media,
        at=found.at,
    )


def _pull_sql(
    settings: SqlSource, root: Path | None, mapping: dict[str, str], extra: list[str], pictures: MediaIntake
) -> Pulled:
    found = jsonl.read_database(settings, project_root(root), mapping, extra, pictures)
    return Pulled(
        found.lines,
        "sql",
        label_of(settings.url),
        _form_of_all(found, found.files[0].name, mapping),
        files=found.files,
        columns=tuple(mapping.items()),
        query=settings.query,
        said=found.said,
        media=found.media,
    )


def _pull_review(found: review.Reviewed) -> Pulled:
    lines = [msgspec.json.encode(row) for row in found.rows]
    return Pulled(
        lines,
        "review",
        found.label,
        "messages",
        reviewers=found.reviewers,
        drafts=found.drafts,
        batch=found.batch,
    )


def label_of(path: str) -> str:
    """Return only the file's name: the label is committed, and a URL may hold a password or a signature."""
    name = urlsplit(path).path if "://" in path else path
    return Path(name).stem.replace("*", "") or "rows"


def _form_of_all(found: jsonl.Harvest, path: str, mapping: dict[str, str]) -> str:
    """Return the form that all files share, else `auto`. Raises DataError for a file without a known form."""
    forms, lines = set[str](), iter(found.lines)
    for file in found.files:
        name = path if len(found.files) == 1 else file.name
        if rows := list(islice(lines, file.rows)):
            forms.add(form := form_of(rows, name, mapping))
            if form == "text" and not mapping and file.format.partition(",")[0] != "JSON Lines":
                _check_plain_text(rows, name)
    return forms.pop() if len(forms) == 1 else "auto"


def _check_plain_text(rows: list[bytes], path: str) -> None:
    """Raise DataError for a table with a column beside `text` that could hold the answer to learn."""
    columns = dict.fromkeys(key for line in rows[:MEASURED] for key in _decoded(line) or ())
    if columns.keys() - BESIDE_TEXT:
        raise DataError(
            f"{path} has the columns {listed(columns)}: a text with its answer, or plain text to go on with?",
            remedy="say which: --columns prompt=text,completion=COLUMN, or --columns text=text "
            "(`ingest.columns` in params.yaml)",
        )


def form_of(lines: Iterable[bytes], path: str, mapping: dict[str, str] | None = None) -> str:
    """Return the form of all rows, or `auto` where they have several: preparation then recognises each row.

    Some rows without a known form are no error here: preparation rejects and counts them. Raises DataError
    where no row has a known form, and for a `mapping` that makes no row complete.
    """
    forms, whole = dict[str, RawRow](), False
    odd: tuple[RawRow, RowError] | None = None
    for line in lines:
        row = _decoded(line)
        if row is None:
            continue
        try:
            form = recognise_form(row)
            if form not in forms or (mapping and not whole):
                forms.setdefault(form, row)
                whole = whole or _is_whole(row, form)
        except RowError as error:
            odd = odd or (row, error)
    if odd and not forms:
        raise _unknown_form(*odd, path)
    if mapping and forms and not whole:
        row, keys = next(iter(forms.values())), ", ".join(mapping)
        raise DataError(
            f"{path}: with the keys {keys} no row is whole; one has {listed(row)}",
            remedy="name every key of a form: --columns prompt=COLUMN,completion=COLUMN",
        )
    return "auto" if odd or len(forms) != 1 else next(iter(forms))


def _decoded(line: bytes) -> RawRow | None:
    try:
        return msgspec.json.decode(line, type=dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _is_whole(row: RawRow, form: str) -> bool:
    try:
        read_conversation(row, form)
    except RowError as error:
        return error.reason not in ("no_answer", "missing_key")
    return True


def _unknown_form(row: RawRow, error: RowError, path: str) -> DataError:
    names = list(row)
    pairs = "prompt=COLUMN,completion=COLUMN"
    return DataError(
        f"{path}: {error}",
        remedy=f"say which column is what, of {listed(names)}: --columns {pairs} "
        "(or `ingest.columns` in params.yaml); where the rows have a form, name it in `ingest.jsonl.form`",
    )


def add_batch(
    raw: Path, pulled: Pulled, *, licence: str, who: str, held_out: bool = False, like: str = ""
) -> tuple[Batch, bool]:
    """Write a batch unless one holds the same rows; return the batch, and whether it is new.

    `held_out` and `like`: see `Batch`.
    """
    content = content_hash(pulled.lines)
    for batch in read_manifest(raw):
        if batch.content == content or batch.name == pulled.batch:
            return batch, False
    time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    return write_batch(
        raw,
        pulled.lines,
        source=pulled.source,
        label=pulled.label,
        time=time,
        licence=licence,
        who=who,
        form=pulled.form,
        files=pulled.files,
        columns=dict(pulled.columns),
        query=pulled.query,
        media=pulled.media,
        held_out=held_out,
        like=like,
    ), True


def count_new(root: Path, seen: set[str], pulled: list[Pulled]) -> int:
    """Count the distinct rows that are new to a champion which has `seen` these batches.

    They come from the checkout's other batches, and from `pulled` rows, which are in no batch yet. Golden
    rows do not count.
    """
    known, new = set[str](), set[str]()
    for batch in read_manifest(root / "data/raw"):
        if (path := root / "data/raw" / batch.name).exists():
            rows = whole_rows((line for _, line in raw_lines(path)), batch.form)
            (known if batch.name in seen else new).update(example.id for example in rows)
    if (golden := root / "data/golden.jsonl").exists():
        known.update(example.id for example in whole_rows(line for _, line in raw_lines(golden)))
    new.update(example.id for found in pulled for example in whole_rows(found.lines, found.form))
    return len(new - known)


def freeze_golden(
    path: Path, pulled: Pulled, config: Config, *, rows: int, base: Path = BASE, tell: Tell = say
) -> int:
    """Write the golden set once: `rows` of the pulled rows, chosen by hash, or fewer where fewer are fit.

    Pictures that they show go into a tar beside it, which git keeps too. Returns the number of rows. Raises
    DataError when a golden set exists, because versions can be compared only on the same rows; when no row is
    fit; and for a chosen row that is too long for `base`, because the gate needs every golden row. `tell` is
    called with the reason when the lengths cannot be measured yet.
    """
    if path.exists() and path.stat().st_size:
        raise DataError(
            f"{path} holds a golden set already",
            remedy="it is frozen on purpose; to start another, empty the file in a commit of its own",
        )
    found = dict(_fit_rows(pulled, config))  # by id: a row counts once
    chosen = sorted(found, key=lambda key: xxhash.xxh3_64_intdigest(key.encode()))[:rows]
    if not chosen:
        raise DataError("no row is fit for the golden set", remedy="check the source's rows")
    _check_lengths([found[key] for key in chosen], pulled.media, base, config, tell)
    if shown := {name for key in chosen for name in found[key].media}:
        write_shard(path.with_suffix(".tar"), pulled.media, shown)
    else:
        path.with_suffix(".tar").unlink(missing_ok=True)
    write_bytes(
        path,
        (encode_line(make_raw_row(found[key].messages, found[key].meta, found[key].tools)) for key in chosen),
    )
    return len(chosen)


def _check_lengths(
    rows: list[Example], media: Mapping[str, bytes], base: Path, config: Config, tell: Tell
) -> None:
    chat, why = known_tokens(base, config.base, media)
    if chat is None:
        tell(f"golden rows: {why}; `tokenize` checks them before anything is trained")
        return
    context, asked = read_base_manifest(base).context, config.tokenize.max_length
    longest = (context or sys.maxsize) if asked == "auto" else asked
    check_whole("golden rows", [len(chat.encode(row).ids) for row in rows], longest, context)


def _fit_rows(pulled: Pulled, config: Config) -> Iterator[tuple[str, Example]]:
    for example in whole_rows(pulled.lines, pulled.form):
        # The demo's base reads the same packages, but no row whose hash chooses the test split.
        if pulled.source != "pydoc" or split_by_hash(example.id, config.prepare) == "test":
            yield example.id, example


def _main(config: Config, arguments: argparse.Namespace) -> None:
    batch, new = add_batch(arguments.raw, pull(config), licence=config.ingest.licence, who="by hand")
    say(f"ingest: {batch.name}, {batch.rows} rows, {'new' if new else 'known already'}")


if __name__ == "__main__":
    run_stage(__doc__, ["raw"], _main)
