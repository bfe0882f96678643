"""Pull rows from a source into one immutable batch under data/raw, or into the frozen golden set.

    python -m tasks.ingest --raw data/raw

By hand it writes the batch of the source that params.yaml names and commits nothing; the flow `ingest` does
the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import xxhash

from ratchet.config.data import JsonlSource, PydocSource
from ratchet.config.params import Config
from ratchet.data.batches import Batch, content_hash, raw_lines, read_manifest, write_batch
from ratchet.data.dedup import split_by_hash
from ratchet.data.examples import Example, RowError, encode_line, make_raw_row
from ratchet.data.forms import recognise_form, whole_rows
from ratchet.errors import DataError
from ratchet.files import write_bytes
from ratchet.models.lengths import check_whole, known_tokens
from ratchet.models.manifests import read_base_manifest
from ratchet.pipeline.stage import project_root, run_stage, say
from ratchet.sources import feedback, jsonl, pydoc
from ratchet.sources import reviewed as review

BASE = Path("models/base")
Tell = Callable[[str], object]


class Pulled(NamedTuple):
    """Raw lines as the source gave them, a word for people, and the rows' form.

    Of reviewed drafts also who reviewed, and the batch that holds them already.
    """

    lines: list[bytes]
    source: str
    label: str
    form: str
    reviewers: tuple[str, ...] = ()
    drafts: tuple[tuple[str, str], ...] = ()  # (name, hash of its rows)
    batch: str = ""


def pull(
    config: Config,
    *,
    root: Path | None = None,
    source: str | None = None,
    path: str | None = None,
    packages: list[str] | None = None,
    draft: str | None = None,
) -> Pulled:
    """Read the source; `root` is the checkout whose files `feedback` and `review` read.

    Raises DataError: nothing found, a form that nobody knows, no rows.
    """
    chosen = source or (
        "jsonl" if path else "pydoc" if packages else "review" if draft else config.ingest.source
    )
    if draft and chosen != "review":
        raise DataError(
            f"a draft is named ({draft}), and the source {chosen}",
            remedy="drafts come from the source review: leave --source away",
        )
    if path and chosen != "jsonl":
        raise DataError(
            f"a path is named ({jsonl.shown(path)}), and the source {chosen}",
            remedy="rows of a file come from the source jsonl: leave --source away",
        )
    if chosen == "pydoc":
        settings = config.ingest.pydoc.model_copy(update={"packages": packages} if packages else {})
        pulled = _pull_pydoc(settings)
    elif chosen == "jsonl":
        pulled = _pull_jsonl(config.ingest.jsonl.model_copy(update={"path": path} if path else {}))
    elif chosen == "feedback":
        pulled = Pulled(
            [msgspec.json.encode(row) for row in feedback.harvest(project_root(root), config)],
            "feedback",
            "feedback",
            "messages",
        )
    elif chosen == "review":
        pulled = _pull_review(review.harvest(project_root(root), config.review, draft))
    else:
        raise DataError(f"source {chosen!r} is unknown", remedy="known: pydoc, jsonl, feedback, review")
    if not pulled.lines:
        why = (
            "nobody has approved or corrected an answer yet, or all of it is in a batch"
            if chosen == "feedback"
            else "check the source's settings in `ingest`"
        )
        raise DataError(
            f"the source {pulled.source} ({pulled.label}) gave no rows",
            remedy=f"a batch needs at least one row; {why}",
        )
    return pulled


def _pull_pydoc(settings: PydocSource) -> Pulled:
    return Pulled(
        [msgspec.json.encode(row) for row in pydoc.harvest(settings)],
        "pydoc",
        "-".join(settings.packages),
        "messages",
    )


def _pull_jsonl(settings: JsonlSource) -> Pulled:
    lines = list(jsonl.read_lines(settings))
    form = form_of(lines[0], settings.path) if lines and settings.form == "auto" else settings.form
    return Pulled(lines, "jsonl", label_of(settings.path), form)


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
    """Return the file's name alone: a URL may hold a password or a signature, and the label is committed."""
    name = urlsplit(path).path if "://" in path else path
    return Path(name).stem.replace("*", "") or "rows"


def form_of(line: bytes, path: str) -> str:
    try:
        row = json.loads(line)
        return recognise_form(row) if isinstance(row, dict) else "auto"
    except RowError as error:
        raise DataError(
            f"{path}: {error}", remedy="name the form in `ingest.jsonl.form`, or convert the rows"
        ) from None
    except (ValueError, RecursionError):
        return "auto"  # a broken first row is preparation's to reject; each row is then recognised by itself


def add_batch(raw: Path, pulled: Pulled, *, licence: str, who: str) -> tuple[Batch, bool]:
    """Return the batch and whether it is new: the same rows make no second batch."""
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
    ), True


def count_new(root: Path, seen: set[str], pulled: list[Pulled]) -> int:
    """Count distinct rows that a champion who has `seen` these batches does not know.

    They are of the checkout's other batches, and of what was pulled and is no batch yet.
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
    """Write the golden set once: `rows` of the pulled ones, chosen by hash, or as many as are fit.

    Raises DataError when there is a golden set already, since a yardstick that moves measures nothing, and
    for a chosen row that is too long for the chosen `base`: the gate wants every golden row. `tell` gets why
    they could not be measured.
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
    _check_lengths([found[key] for key in chosen], base, config, tell)
    write_bytes(
        path,
        (encode_line(make_raw_row(found[key].messages, found[key].meta, found[key].tools)) for key in chosen),
    )
    return len(chosen)


def _check_lengths(rows: list[Example], base: Path, config: Config, tell: Tell) -> None:
    chat, why = known_tokens(base, config.base)
    if chat is None:
        tell(f"golden rows: {why}; `tokenize` checks them before anything is trained")
        return
    context, asked = read_base_manifest(base).context, config.tokenize.max_length
    longest = (context or sys.maxsize) if asked == "auto" else asked
    check_whole("golden rows", [len(chat.encode(row).ids) for row in rows], longest, context)


def _fit_rows(pulled: Pulled, config: Config) -> Iterator[tuple[str, Example]]:
    for example in whole_rows(pulled.lines, pulled.form):
        # The demo's base reads the same packages, but none of the rows that go to test.
        if pulled.source != "pydoc" or split_by_hash(example.id, config.prepare) == "test":
            yield example.id, example


def _main(config: Config, arguments: argparse.Namespace) -> None:
    batch, new = add_batch(arguments.raw, pull(config), licence=config.ingest.licence, who="by hand")
    say(f"ingest: {batch.name}, {batch.rows} rows, {'new' if new else 'known already'}")


if __name__ == "__main__":
    run_stage(__doc__, ["raw"], _main)
