"""Let a teacher model write rows into a draft under `.ratchet/synthesis`, which people then review.

    python -m tasks.synthesize --root . --documents docs        # by hand, without the queue

There are three modes: `documents` asks about chunks of documents, `seeds` asks for more rows like existing
ones, `paraphrase` asks for other wordings of prompts that the champion is weak at. The flow `synthesize` puts
the draft into the review queue.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from ratchet.config.data import JsonlSource
from ratchet.config.params import Config
from ratchet.config.synthesis import TeacherConfig
from ratchet.data.examples import Example, Meta, read_examples
from ratchet.data.forms import whole_rows
from ratchet.errors import DataError, RatchetError, ServiceError, UserError
from ratchet.llm.budget import Budget, SpentError
from ratchet.llm.client import Teacher
from ratchet.llm.prompts import Template, load_template
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.manifests import MANIFEST, read_base_manifest
from ratchet.pipeline.checkout import locked
from ratchet.pipeline.stage import run_stage, say
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Item
from ratchet.sources import jsonl
from ratchet.synthesis.augment import read_synonyms
from ratchet.synthesis.documents import Chunk, Library
from ratchet.synthesis.draft import (
    DocumentFigures,
    Draft,
    SeedFigures,
    Settings,
    Summary,
    Unread,
    WeakSpotFigures,
    new_draft,
    read_rows,
    resume_draft,
)
from ratchet.synthesis.draft import Teacher as TeacherFigures
from ratchet.synthesis.filters import Filters, read_counter
from ratchet.synthesis.known_rows import read_known
from ratchet.synthesis.requests import Ask, Shown, ask_of_chunks, ask_of_seeds, ask_of_subjects
from ratchet.synthesis.weak_spots import find_subjects
from ratchet.synthesis.writer import GaveUp, Helpers, Say, Writer

TEMPLATES = {"documents": "questions_from_passage", "seeds": "self_instruct", "paraphrase": "paraphrase"}
MOST_NAMED = 50  # unreadable documents that the summary names


@dataclass(frozen=True)
class Wanted:
    """The settings of a new draft. A resumed draft keeps its own; only `count` may be changed."""

    mode: str = "documents"
    documents: tuple[str, ...] = ()  # files, folders, globs, URLs
    seeds: str = ""  # a JSONL file in place of the prepared training rows
    count: int | None = None


def synthesize(
    config: Config, root: Path, wanted: Wanted, *, say: Say, resume: str | None = None, backoff: float = 1.0
) -> Summary:
    """Fill a new or a resumed draft with rows that the teacher writes, and return its summary.

    Raises ConfigError (teacher, key, templates), UserError (mode, draft), DataError (nothing to ask about),
    ServiceError (the teacher gave nothing).
    """
    if not resume:
        _check(wanted)
    with locked(root, "synthesize", wait=False):
        settings = Settings(
            wanted.mode, wanted.count or config.synthesize.count, list(wanted.documents), wanted.seeds
        )
        draft = resume_draft(root, resume, count=wanted.count) if resume else new_draft(root, settings)
        say(f"draft {draft.name}: {draft.settings.count} rows wanted, mode {draft.settings.mode}")
        try:
            summary = asyncio.run(_write(config, root, draft, say, backoff))
        except RatchetError:
            if draft.is_empty:
                draft.discard()
            raise
        finally:
            draft.close()
        draft.finish(summary)
    if summary.stopped == "teacher" and not draft.kept:
        raise ServiceError(
            f"the teacher gave no rows: {summary.why}",
            remedy="check synthesize.teacher.url in params.yaml and what listens there, then: "
            f"ratchet synthesize --resume {draft.name}",
        )
    return summary


def _check(wanted: Wanted) -> None:
    if wanted.mode not in TEMPLATES:
        raise UserError(f"mode {wanted.mode!r} is unknown", remedy=f"known: {', '.join(TEMPLATES)}")
    if wanted.mode == "documents" and not wanted.documents:
        raise UserError(
            "no documents are named", remedy="--documents 'docs/*.md'; or --mode seeds, --mode paraphrase"
        )
    if wanted.mode != "documents" and wanted.documents:
        raise UserError(
            f"documents are of no use to the mode {wanted.mode}",
            remedy="leave --documents out, or take --mode documents",
        )
    if wanted.mode != "seeds" and wanted.seeds:
        raise UserError(
            f"seeds are of no use to the mode {wanted.mode}", remedy="leave --seeds out, or take --mode seeds"
        )


def queue_rows(root: Path, config: Config, folder: Path) -> int:
    """Put the rows of a draft into the review queue, and return how many were new there."""
    queue = ReviewQueue(root)
    try:
        items = (
            Item(
                row.example.id,
                folder.name,
                "synthetic",
                row.example.messages,
                row.passage,
                row.example.meta,
                row.doubts,
            )
            for row in read_rows(folder)
        )
        return queue.add(items, share=config.review.share)
    finally:
        queue.close()


async def _write(config: Config, root: Path, draft: Draft, say: Say, backoff: float) -> Summary:
    """Ask the teacher, and keep the rows that pass the filters.

    It ends when the draft is full, a limit of the budget is near, a round adds no row, or the teacher fails.
    """
    settings = config.synthesize
    budget = Budget(max_cost=settings.max_cost, max_tokens=settings.max_run_tokens)
    template = _template(config, root, TEMPLATES[draft.settings.mode])
    helpers = _helpers(config, root, budget, backoff)
    teacher = Teacher(settings.teacher, budget, backoff=backoff)
    try:
        writer = Writer(
            config,
            draft,
            teacher,
            _filters(config, root),
            helpers,
            provenance=_provenance(config, draft),
            say=say,
        )
        subject = _SUBJECTS[draft.settings.mode](config, root, draft)
        stopped, why = "", ""
        try:
            for number in range(settings.rounds):
                before = draft.kept
                await writer.take(subject.asks(template, writer, number), settings.seed + number)
                if writer.full or draft.kept == before:
                    break
        except SpentError as error:
            stopped, why = error.limit, str(error)
        except GaveUp as error:
            stopped, why = "teacher", str(error)
        if not writer.answered and writer.last_failure and not stopped:
            stopped, why = "teacher", writer.last_failure
        found = _summarise(config, draft, writer, budget, subject, template.version)
        return msgspec.structs.replace(found, stopped=stopped, why=why)
    finally:
        for client in (teacher, helpers.judge, helpers.champion):
            if client:
                await client.close()


def _template(config: Config, root: Path, name: str) -> Template:
    return load_template(name, root / config.synthesize.prompts if config.synthesize.prompts else None)


def _helpers(config: Config, root: Path, budget: Budget, backoff: float) -> Helpers:
    settings = config.synthesize
    judge = (
        Teacher(settings.judge, budget, section="synthesize.judge", backoff=backoff)
        if settings.judge.model
        else None
    )
    champion = (
        Teacher(
            _gateway(config), Budget(max_cost=0, max_tokens=sys.maxsize), section="gateway", backoff=backoff
        )
        if settings.score_with_champion
        else None
    )
    return Helpers(
        judge,
        _template(config, root, "judge") if judge else None,
        champion,
        _template(config, root, "back_translate") if settings.augment.back_translate else None,
        read_synonyms(root / settings.augment.synonyms) if settings.augment.synonyms else {},
    )


def _gateway(config: Config) -> TeacherConfig:
    """Describe the gateway as a teacher: it speaks the same protocol as any other endpoint."""
    everywhere = config.gateway.host in ("0.0.0.0", "::")  # noqa: S104 (read, not bound)
    host = "127.0.0.1" if everywhere else config.gateway.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}/v1"
    return TeacherConfig(
        url=url,
        model=config.project.name,
        key_env="RATCHET_GATEWAY_KEY",
        max_tokens=max(16, config.evaluate.max_new_tokens),
        temperature=0.0,
        timeout=config.gateway.timeout,
    )


def _filters(config: Config, root: Path) -> Filters:
    known = read_known(root / "data/prepared", root / "data/golden.jsonl", config.prepare)
    base = root / "models/base"
    context = read_base_manifest(base).context if (base / MANIFEST).exists() else None
    return Filters(config, known, count_tokens=read_counter(base / "tokenizer.json"), longest=context)


def _provenance(config: Config, draft: Draft) -> Meta:
    teacher = config.synthesize.teacher
    licence: Meta = {"licence": teacher.licence} if teacher.licence != "unknown" else {}
    return {"kind": "synthetic", "mode": draft.settings.mode, "teacher": teacher.model, **licence}


# --- what is asked about ------------------------------------------------------------------------------------


class _Subject(Protocol):
    """What one mode asks about; `figures` are complete after the last of the `asks`."""

    def asks(self, template: Template, writer: Writer, number: int) -> Iterator[Ask]: ...

    def figures(self) -> DocumentFigures | SeedFigures | WeakSpotFigures: ...


class _Documents:
    def __init__(self, config: Config, root: Path, draft: Draft) -> None:
        self._settings = config.synthesize
        self._library = Library(draft.settings.documents, root)
        self._chunks = 0

    def asks(self, template: Template, writer: Writer, number: int) -> Iterator[Ask]:
        return ask_of_chunks(
            self._read(), template, per_chunk=self._settings.per_chunk, asked=writer.written if number else {}
        )

    def _read(self) -> Iterator[Chunk]:
        self._chunks = 0
        for chunk in self._library.chunks(
            chunk_chars=self._settings.chunk_chars, overlap_chars=self._settings.overlap_chars
        ):
            self._chunks += 1
            yield chunk
        if not self._chunks:
            named = "; ".join(f"{name}: {why}" for name, why in self._library.unreadable[:5])
            raise DataError(
                f"no document could be read: {named}",
                remedy="a relative path counts from the checkout's root",
            )

    def figures(self) -> DocumentFigures:
        unread = [Unread(name, why) for name, why in self._library.unreadable]
        return DocumentFigures(self._library.documents, self._chunks, len(unread), unread[:MOST_NAMED])


class _Seeds:
    def __init__(self, config: Config, root: Path, draft: Draft) -> None:
        self._settings, self._draft = config.synthesize, draft
        self._shown_as = _shown_as(config, root)
        self._rows, self._missing = _seed_rows(root, draft.settings.seeds, self._shown_as.pictures)

    def asks(self, template: Template, writer: Writer, number: int) -> Iterator[Ask]:
        missing = self._draft.settings.count - self._draft.kept
        requests = -(-missing // self._settings.per_chunk)
        return ask_of_seeds(
            self._rows,
            template,
            self._shown_as,
            per_chunk=self._settings.per_chunk,
            requests=requests,
            seed=self._settings.seed + number,
        )

    def figures(self) -> SeedFigures:
        return SeedFigures(len(self._rows), self._missing)


class _Subjects:
    def __init__(self, config: Config, root: Path, draft: Draft) -> None:
        self._settings, self._shown_as = config.synthesize, _shown_as(config, root)
        self._found = find_subjects(root, config)

    def asks(self, template: Template, writer: Writer, number: int) -> Iterator[Ask]:
        return ask_of_subjects(self._found, template, self._shown_as, per_chunk=self._settings.per_chunk)

    def figures(self) -> WeakSpotFigures:
        answered = sum(bool(subject.answer) for subject in self._found)
        return WeakSpotFigures(answered, len(self._found) - answered)


_SUBJECTS: dict[str, Callable[[Config, Path, Draft], _Subject]] = {
    "documents": _Documents,
    "seeds": _Seeds,
    "paraphrase": _Subjects,
}


def _shown_as(config: Config, root: Path) -> Shown:
    return Shown(
        _template(config, root, "questions_from_picture"), MediaStore.read(root / "data/prepared" / MEDIA)
    )


def _seed_rows(root: Path, path: str, pictures: Mapping[str, bytes]) -> tuple[list[Example], int]:
    """Read the rows with one question and one answer, and count those left out for missing `pictures`.

    Raises DataError when there are none.
    """
    train = root / "data/prepared/train.jsonl"
    if not path and not train.exists():
        raise DataError(
            "data/prepared/train.jsonl does not exist",
            remedy="`ratchet retrain` makes it; or name rows of your own: --seeds FILE",
        )
    place = path if "://" in path else str(root / path)
    rows = whole_rows(jsonl.read_lines(JsonlSource(path=place))) if path else read_examples(train)
    single = [row for row in rows if sum(message.role == "user" for message in row.messages) == 1]
    here = [row for row in single if all(name in pictures for name in row.media)]
    if not here:
        lacking = f", and the pictures of {len(single)} rows are not in data/prepared" if single else ""
        raise DataError(
            f"{path or train} holds no row of one question and one answer{lacking}",
            remedy="such rows are what the teacher is shown; `ratchet ingest` and `ratchet retrain` bring "
            "pictures to data/prepared",
        )
    return here, len(single) - len(here)


def _summarise(
    config: Config, draft: Draft, writer: Writer, budget: Budget, subject: _Subject, prompt_version: str
) -> Summary:
    teacher = config.synthesize.teacher
    return Summary(
        draft=draft.name,
        mode=draft.settings.mode,
        wanted=draft.settings.count,
        kept=draft.kept,
        doubted=draft.doubted,
        refused=dict(sorted(draft.refused.items())),
        failures=dict(sorted(writer.failures.items())),
        asked=writer.asked,
        recalled=writer.recalled,
        tokens=budget.usage._asdict(),
        cost=round(budget.cost, 6),
        priced=bool(teacher.input_price or teacher.output_price),
        teacher=TeacherFigures(teacher.model, teacher.protocol, teacher.licence),
        judge=config.synthesize.judge.model or None,
        prompt_version=prompt_version,
        subject=subject.figures(),
    )


def _main(config: Config, arguments: argparse.Namespace) -> None:
    wanted = Wanted(documents=(str(arguments.documents),))
    found = synthesize(config, arguments.root.resolve(), wanted, say=say)
    say(
        f"synthesize: {found.kept} rows in the draft {found.draft}, "
        f"{sum(found.refused.values())} refused, cost {found.cost:.4f}"
    )


if __name__ == "__main__":
    run_stage(__doc__, ["root", "documents"], _main)
