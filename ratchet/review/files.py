"""Export rows for review as CSV, JSON Lines or Label Studio tasks, and import the decisions from such files.

A cell that a spreadsheet would run as a formula is exported with a leading apostrophe, which the import
removes again (OWASP, "CSV Injection").
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from ratchet.data.examples import RawRow, normalise
from ratchet.errors import UserError
from ratchet.files import write_bytes
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import VERDICTS, Decision, Entry, Item, split_answer, with_answer

# People fill in `review`, `answer` and `why`.
COLUMNS = ("id", "draft", "kind", "doubts", "question", "answer", "earlier", "passage", "review", "why")
FORMULA = set("=+-@\t\r\n＝＋－＠")  # what Excel, LibreOffice and Sheets read as the start of a formula
MOST_NAMED = 10
LABELLING = """<View>
  <Style>.htx-text { white-space: pre-wrap; }</Style>
  <Header value="Question"/><Text name="question" value="$question"/>
  <Header value="Answer"/><Text name="drafted" value="$answer"/>
  <Header value="Answer of an earlier row"/><Text name="earlier" value="$earlier"/>
  <Header value="Passage"/><Text name="passage" value="$passage"/>
  <Header value="Doubts"/><Text name="doubts" value="$doubts"/>
  <Choices name="review" toName="question" choice="single" required="true" showInline="true">
    <Choice value="accept"/><Choice value="reject"/><Choice value="edit"/>
  </Choices>
  <Header value="The right answer, after an edit"/>
  <TextArea name="answer" toName="question" value="$answer" rows="6" maxSubmissions="1" editable="true"/>
  <Header value="Why (may stay empty)"/>
  <TextArea name="why" toName="question" rows="1" maxSubmissions="1" editable="true"/>
</View>
"""


class Said(NamedTuple):
    """One row of an imported file; `place` is its line or number, for messages."""

    place: str
    id: str
    draft: str
    review: str
    answer: str | None
    question: str | None
    why: str


class Imported(NamedTuple):
    """Counts of an import: decisions kept, by verdict; decisions known already; rows without a verdict."""

    decided: Counter[str]
    known: int
    empty: int


# --- out ----------------------------------------------------------------------------------------------------


def export_rows(path: Path, items: list[Item], *, label_studio: bool = False) -> None:
    """Write rows in the format that the suffix of `path` names.

    Raises UserError: the suffix is unknown, or the file exists already.
    """
    if path.exists():
        raise UserError(
            f"{path} is there already; it may contain decisions that were not imported",
            remedy="name another file, or remove it",
        )
    if label_studio:
        write_bytes(path, [msgspec.json.encode([{"data": _clean(row_of(item))} for item in items])])
    elif path.suffix == ".csv":
        write_bytes(path, [write_csv(_clean(row_of(item)) for item in items)])
    elif path.suffix == ".jsonl":
        write_bytes(path, (msgspec.json.encode(_clean(row_of(item))) + b"\n" for item in items))
    else:
        raise UserError(
            f"{path.name} has the suffix {path.suffix!r}",
            remedy="wanted .csv or .jsonl, or --label-studio for its tasks",
        )


def row_of(item: Item) -> dict[str, str]:
    """Return an item as the columns of an export; `review` and `why` are empty for people to fill in."""
    before, answer = split_answer(item.messages)
    conversation = "\n\n".join(f"{turn.role}: {turn.content}" for turn in before)
    question = before[0].content if len(before) == 1 else conversation
    named = {"id": item.id, "draft": item.draft, "kind": item.kind, "doubts": "; ".join(item.doubts)}
    texts = {"question": question, "answer": answer, "earlier": item.earlier, "passage": item.passage}
    return {**named, **texts, "review": "", "why": ""}


def write_csv(rows: Iterable[dict[str, str]]) -> bytes:
    """Encode rows as CSV with the byte order mark by which Excel recognises UTF-8."""
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    writer.writerows([guard(row[column]) for column in COLUMNS] for row in rows)
    return out.getvalue().encode("utf-8-sig")


def guard(cell: str) -> str:
    """Put an apostrophe before a cell that a spreadsheet would run as a formula."""
    return f"'{cell}" if _is_risky(cell) else cell


def unguard(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_risky(cell) else cell


def _is_risky(cell: str) -> bool:
    """Tell whether a cell looks like a formula, also behind apostrophes that it begins with.

    So a cell that begins with an apostrophe of its own is restored exactly.
    """
    return cell.lstrip("' ")[:1] in FORMULA or cell.lstrip("'")[:1] in FORMULA


def _clean(row: dict[str, str]) -> dict[str, str]:
    """Replace lone surrogates, which rows in quarantine may hold, by question marks."""
    return {key: text.encode("utf-8", "replace").decode() for key, text in row.items()}


# --- back ---------------------------------------------------------------------------------------------------


def import_rows(path: Path, queue: ReviewQueue, *, by: str) -> Imported:
    """Import all decisions of a file or none, in one transaction.

    Raises UserError that lists every fault: unknown rows, unknown verdicts, two verdicts on one row.
    """
    said = read_rows(path)
    decisions, faults, known = _judge(said, queue, by)
    if faults:
        named = [
            f"{len(lines)} {what}: {'; '.join(lines[:MOST_NAMED])}{' …' if len(lines) > MOST_NAMED else ''}"
            for what, lines in sorted(faults.items())
        ]
        raise UserError(
            f"{path.name} has {sum(map(len, faults.values()))} faults, nothing was imported\n  "
            + "\n  ".join(named),
            remedy="correct the file and import it again",
        )
    queue.decide_all(decisions)
    return Imported(
        Counter(decision.verdict for decision in decisions), known, sum(not row.review for row in said)
    )


def read_rows(path: Path) -> list[Said]:
    """Read a reviewed file. Raises UserError: no such file, not UTF-8, another format, missing columns."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name} is no UTF-8: {error.reason} at byte {error.start}", remedy="save it as 'CSV UTF-8'"
        ) from None
    match path.suffix:
        case ".csv":
            return _read_csv(text, path.name)
        case ".jsonl":
            return [
                _said(_object(line, f"{path.name}, line {number}"), f"line {number}")
                for number, line in enumerate(text.split("\n"), start=1)
                if line.strip()
            ]
        case ".json":
            return _read_label_studio(text, path.name)
    raise UserError(
        f"{path.name} has the suffix {path.suffix!r}", remedy="wanted .csv, .jsonl, or .json of Label Studio"
    )


def _read_csv(text: str, name: str) -> list[Said]:
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)  # spreadsheets write ";" where decimals have a comma
    csv.field_size_limit(sys.maxsize)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise UserError(f"{name} is no CSV: {error}", remedy="save it as 'CSV UTF-8'") from None
    for column in ("id", "review"):
        if rows and column not in rows[0]:
            raise UserError(
                f"{name} has no column {column!r}; it has {', '.join(map(str, list(rows[0])[:12]))}",
                remedy="keep the columns of `ratchet review export`",
            )
    return [
        _said(
            {key: unguard(cell) for key, cell in row.items() if key and isinstance(cell, str)},
            f"row {number}",
        )
        for number, row in enumerate(rows, start=2)
    ]


def _read_label_studio(text: str, name: str) -> list[Said]:
    try:
        tasks = msgspec.json.decode(text, type=list[RawRow])
        return [
            said for number, task in enumerate(tasks, start=1) for said in _read_task(task, f"task {number}")
        ]
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{name} is no export of Label Studio's: {error!r}",
            remedy="export as JSON there, not as JSON-MIN or CSV",
        ) from None


def _read_task(task: RawRow, place: str) -> list[Said]:
    """Read each annotation that was not cancelled; a task without one gives a row without a verdict."""
    found = []
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            continue
        said = {region["from_name"]: region["value"] for region in annotation["result"]}
        given = {"review": said["review"]["choices"][0]} if "review" in said else {}
        given |= {
            key: "\n".join(said[key]["text"]) if isinstance(said[key]["text"], list) else said[key]["text"]
            for key in ("answer", "why")
            if key in said
        }
        data = {"id": task["data"]["id"], "draft": task["data"].get("draft", "")}
        found.append(_said(data | given, place))
    return found or [_said({"id": task["data"]["id"]}, place)]


def _object(line: str, place: str) -> RawRow:
    try:
        return msgspec.json.decode(line, type=RawRow)
    except msgspec.DecodeError as error:
        raise UserError(
            f"{place} is no JSON object: {error}",
            remedy="one object a line, as `ratchet review export` wrote them",
        ) from None


def _said(row: RawRow, place: str) -> Said:
    def text(key: str) -> str:
        return value if isinstance(value := row.get(key), str) else "" if value is None else str(value)

    answer, question = (text(key) if key in row else None for key in ("answer", "question"))
    return Said(
        place,
        text("id").strip(),
        text("draft").strip(),
        text("review").strip().lower(),
        answer,
        question,
        text("why").strip(),
    )


def _judge(said: list[Said], queue: ReviewQueue, by: str) -> tuple[list[Decision], dict[str, list[str]], int]:
    """Return the new decisions, the faults by kind, and the number of verdicts known already."""
    decisions: dict[tuple[str, str], Decision] = {}
    faults: dict[str, list[str]] = {}
    known = 0
    for row in said:
        if not row.review:
            continue
        if (entry := _find(row, queue)) is None:
            faults.setdefault("unknown ids", []).append(f"{row.id[:40]!r} in {row.place}")
            continue
        if fault := _find_fault(row, entry.item):
            faults.setdefault(fault, []).append(f"{row.review[:40]!r} in {row.place}")
            continue
        decision = _decision(row, entry.item, by)
        key = (decision.draft, decision.item)
        if key in decisions and _word(decisions[key]) != _word(decision):
            faults.setdefault("rows with two different words", []).append(row.place)
        elif key not in decisions and _is_known(decision, entry):
            known += 1
        else:
            decisions[key] = decision
    return list(decisions.values()), faults, known


def _find(row: Said, queue: ReviewQueue) -> Entry | None:
    """Find a row by its complete id; without a draft, in the only draft that holds it, else None."""
    if row.draft:
        return queue.get(row.draft, row.id)
    try:
        entry = queue.find(row.id)
    except UserError:
        return None
    return entry if entry.item.id == row.id else None


def _find_fault(row: Said, item: Item) -> str:
    drafted = row_of(item)
    changed = row.answer is not None and _plain(row.answer) != _plain(drafted["answer"])
    if row.review not in VERDICTS:
        return f"unknown words (known: {', '.join(VERDICTS)})"
    if row.question is not None and _plain(row.question) != _plain(drafted["question"]):
        return "rows whose question was changed (only the answer can be)"
    if row.review == "edit" and not (row.answer or "").strip():
        return "edits without an answer"
    if row.review == "accept" and changed:
        return "rows that are accepted and have another answer (write edit)"
    return ""


def _plain(text: str) -> str:
    return normalise(text.encode("utf-8", "replace").decode())


def _decision(row: Said, item: Item, by: str) -> Decision:
    messages = with_answer(item, row.answer or "") if row.review == "edit" else ()
    return Decision(item.id, item.draft, row.review, messages, by=by, why=row.why)


def _word(decision: Decision) -> tuple[str, tuple[str, ...]]:
    return decision.verdict, tuple(normalise(turn.content) for turn in decision.messages)


def _is_known(decision: Decision, entry: Entry) -> bool:
    return entry.decision is not None and _word(entry.decision) == _word(decision)
