"""Store a draft in its folder `.ratchet/synthesis/<draft>/`: settings, answers, rows, and the summary last.

`answers.jsonl` only grows, by one line per answered request, so that a killed run resumes without repeating a
request. Every run writes `rows.jsonl` and `refused.jsonl` again from the answers. A folder without
`summary.json` is incomplete.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

from ratchet.data.examples import Example, Meta, encode_line
from ratchet.errors import DataError, UserError
from ratchet.files import read_json, sha256_json, write_json
from ratchet.llm.budget import Usage

FOLDER = Path(".ratchet/synthesis")
NAME = re.compile(r"[a-z]+-\d{8}T\d{6}Z-[0-9a-f]{4}")
MOST_NAMED = 5  # documents or drafts that a message lists


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The settings with which a draft was begun; a resumed run reads them again."""

    mode: str
    count: int
    documents: list[str] = []
    seeds: str = ""


class Answered(msgspec.Struct, frozen=True):
    """One answered request; `failure` is a short code if its answer is of no use, else ""."""

    key: str
    prompt: str  # version of the prompt
    model: str
    about: str  # id of the chunk or row
    raw: str
    usage: Usage
    failure: str = ""
    fault: str = ""


class Row(msgspec.Struct, frozen=True):
    """A kept row, as it is put into the review queue."""

    example: Example
    passage: str = ""
    doubts: tuple[str, ...] = ()


class Refused(msgspec.Struct, frozen=True):
    reason: str
    detail: str
    question: str
    answer: str
    meta: Meta


class Teacher(msgspec.Struct, frozen=True):
    model: str
    protocol: str = ""
    licence: str = ""


class Unread(msgspec.Struct, frozen=True):
    """A document that could not be read."""

    name: str
    why: str


class DocumentFigures(msgspec.Struct, frozen=True):
    documents: int
    chunks: int
    unreadable: int
    unreadable_names: list[Unread]  # the first few


class SeedFigures(msgspec.Struct, frozen=True):
    seeds: int
    pictures_missing: int = 0  # rows left out, because their pictures are not in data/prepared


class WeakSpotFigures(msgspec.Struct, frozen=True):
    near_mistakes: int  # training rows
    drifted_prompts: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The results of a run; `subject` has the figures of what it asked about, which depend on the mode."""

    draft: str
    mode: str
    wanted: int
    kept: int
    doubted: int
    refused: dict[str, int]  # reason → rows
    failures: dict[str, int]  # reason → requests
    asked: int
    recalled: int
    tokens: dict[str, int]  # "input" and "output"
    cost: float
    priced: bool
    teacher: Teacher
    judge: str | None
    prompt_version: str
    subject: DocumentFigures | SeedFigures | WeakSpotFigures
    stopped: str = ""  # the limit that stopped the run, or "teacher"; empty: none
    why: str = ""
    queued: int | msgspec.UnsetType = msgspec.UNSET  # rows added to the review queue

    def to_json(self) -> dict[str, object]:
        """Return the content of `summary.json`: one flat object that includes the subject's figures."""
        flat: dict[str, object] = msgspec.to_builtins(self)
        subject: dict[str, object] = msgspec.to_builtins(self.subject)
        del flat["subject"]
        return flat | subject


class Draft:
    """A draft that is open for one run; call `close` at the end."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.name, self.settings = folder, folder.name, settings
        self.kept, self.doubted = 0, 0
        self.refused = Counter[str]()
        self._places = _find_answers(folder / "answers.jsonl")
        (folder / "summary.json").unlink(missing_ok=True)  # outdated as soon as this run adds a row
        self._asked = _open(folder / "answers.jsonl", "a+b")
        self._rows, self._refusals = _open(folder / "rows.jsonl", "wb"), _open(folder / "refused.jsonl", "wb")

    def recall(self, key: str) -> Answered | None:
        """Return the stored answer of a request, or None."""
        if key not in self._places:
            return None
        self._asked.seek(self._places[key])
        return _answer_decoder.decode(self._asked.readline())

    def remember(self, answered: Answered) -> None:
        self._places[answered.key] = self._asked.seek(0, os.SEEK_END)
        _append(self._asked, answered)

    def keep(self, row: Row) -> None:
        _append(self._rows, row)
        self.kept += 1
        self.doubted += bool(row.doubts)

    def refuse(self, refused: Refused) -> None:
        _append(self._refusals, refused)
        self.refused[refused.reason] += 1

    @property
    def is_empty(self) -> bool:
        """Tell whether no request of the draft was ever answered."""
        return not self._places

    def discard(self) -> None:
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        for opened in (self._asked, self._rows, self._refusals):
            opened.close()

    def finish(self, summary: Summary) -> None:
        """Write the summary, which marks the draft as complete."""
        write_json(self.folder / "summary.json", summary.to_json())


def new_draft(root: Path, settings: Settings) -> Draft:
    """Create a draft; only the user can read its folder, because it holds texts of documents."""
    name = f"{settings.mode}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
    folder = root / FOLDER / name
    folder.mkdir(parents=True, mode=0o700)
    (root / FOLDER).chmod(0o700)
    write_json(folder / "settings.json", msgspec.to_builtins(settings))
    return Draft(folder, settings)


def find_draft(root: Path, name: str) -> Path:
    """Return a draft's folder. Raises UserError if this checkout has no draft of that name."""
    folder = root / FOLDER / name
    if not NAME.fullmatch(name) or not (folder / "settings.json").exists():
        known = sorted((path.parent.name for path in (root / FOLDER).glob("*/settings.json")), reverse=True)
        raise UserError(
            f"no draft is named {name[:80]!r}",
            remedy=f"the newest: {', '.join(known[:MOST_NAMED]) or 'none yet'}; "
            "`ratchet synthesize` begins one",
        )
    return folder


def resume_draft(root: Path, name: str, *, count: int | None = None) -> Draft:
    """Open a draft again, with a new `count` if given.

    Raises UserError: there is no such draft; DataError: its files are broken.
    """
    folder = find_draft(root, name)
    try:
        settings = msgspec.convert(read_json(folder / "settings.json"), Settings)
    except msgspec.ValidationError as error:
        raise DataError(
            f"{folder / 'settings.json'} is broken: {error}", remedy="begin a new draft"
        ) from None
    if count is not None and count != settings.count:
        settings = msgspec.structs.replace(settings, count=count)
        write_json(folder / "settings.json", msgspec.to_builtins(settings))
    return Draft(folder, settings)


def read_rows(folder: Path) -> Iterator[Row]:
    with (folder / "rows.jsonl").open("rb") as lines:
        yield from (_row_decoder.decode(line) for line in lines)


def key_of(*, prompt: str, model: str, about: str, seed: int) -> str:
    """Return the key of a request: the same question to the same model has the same key."""
    return sha256_json([prompt, model, about, seed])[:32]


_row_decoder = msgspec.json.Decoder(Row)
_answer_decoder = msgspec.json.Decoder(Answered)


def _find_answers(path: Path) -> dict[str, int]:
    """Map each key to the byte offset of its line; cut off a partial last line that a killed run left."""
    found, end = dict[str, int](), 0
    if not path.exists():
        return found
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                found[_answer_decoder.decode(line).key] = end
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}:{number} is no answer: {error}",
                    remedy="take that line out; the others stay answered",
                ) from None
            end += len(line)
    os.truncate(path, end)
    return found


def _open(path: Path, mode: str) -> BinaryIO:
    path.touch(mode=0o600)  # people's documents
    return path.open(mode)  # type: ignore[return-value]


def _append(opened: BinaryIO, value: msgspec.Struct) -> None:
    opened.write(encode_line(value))
    opened.flush()


def summary_lines(found: Summary) -> list[str]:
    lines = [
        f"draft    {found.draft}: {found.kept} of {found.wanted} rows, {found.doubted} of them with doubts",
        *_describe_counts("refused", found.refused),
        *_describe_counts("failed", found.failures),
        *_describe_subject(found),
    ]
    cost = f"{found.cost:.4f}" if found.priced else "unknown (synthesize.teacher has no prices)"
    lines.append(
        f"asked    {found.asked} times, {found.recalled} answers known before; "
        f"{found.tokens['input']} tokens in, {found.tokens['output']} out; cost {cost}"
    )
    if found.stopped:
        lines.append(f"stopped  {found.why}")
    elif found.kept < found.wanted:
        lines.append(
            "ended    nothing more could be asked: more documents or seeds, "
            "or a higher synthesize.rounds, give more rows"
        )
    return lines


def _describe_subject(found: Summary) -> list[str]:
    about = found.subject
    if isinstance(about, DocumentFigures):
        unread = f"; {about.unreadable} could not be read:" if about.unreadable else ""
        return [
            f"read     {about.chunks} chunks of {about.documents} documents{unread}",
            *(f"         {entry.name}: {entry.why}" for entry in about.unreadable_names[:MOST_NAMED]),
        ]
    if isinstance(about, WeakSpotFigures):
        near, drifted = about.near_mistakes, about.drifted_prompts
        return [f"chosen   {near} training rows near to mistakes, {drifted} prompts of drifted topics"]
    if isinstance(about, SeedFigures) and about.pictures_missing:
        return [f"left out {about.pictures_missing} seeds whose pictures are not in data/prepared"]
    return []


def _describe_counts(name: str, counts: dict[str, int]) -> list[str]:
    parts = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    return [f"{name:8} {sum(counts.values())}: {parts}"] if counts else []


def summary_card(found: Summary) -> str:
    """Render as Markdown in a code block, because names of documents could contain markup."""
    body = "\n".join(summary_lines(found)).replace("`", "'")
    return f"## {found.kept} rows by {found.teacher.model.replace('`', '')}\n\n```text\n{body}\n```\n"
