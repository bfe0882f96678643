"""Tasks of Label Studio's JSON export: a choice or a written text becomes the answer.

Not covered: marked spans, boxes and other labels that are no text to answer with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ratchet.data.examples import RawRow
from ratchet.errors import DataError
from ratchet.sources.columns import listed


def is_task(value: dict[str, Any]) -> bool:
    """Tell whether an object is a task: `data` to label, and `annotations` (formerly `completions`)."""
    given = value.get("annotations", value.get("completions"))
    return isinstance(value.get("data"), dict) and isinstance(given, list)


def read_tasks(tasks: Iterable[Any], name: str, mapped: bool) -> tuple[list[RawRow], tuple[str, ...]]:
    """Make one row per annotation; equal annotations of one task give one row.

    A row holds the labelled text and the answer as `prompt` and `completion`. Where the caller renames
    columns (`mapped`), it holds all texts and answers under the names of the labelling instead. Raises
    DataError when there is no choice and no text, or when there are several and no mapping.
    """
    rows: list[RawRow] = []
    left_out, asked_about, answered, kinds = Counter[str](), set[str](), set[str](), set[str]()
    for task in tasks:
        if not isinstance(task, dict) or not is_task(task):
            left_out["no task"] += 1
            continue
        texts = {key: value for key, value in task["data"].items() if isinstance(value, str)}
        seen: list[RawRow] = []
        for annotation in task.get("annotations") or task.get("completions") or []:
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                left_out["annotation that was skipped"] += 1
                continue
            answers: RawRow = {}
            for key, about, answer in _answers(annotation.get("result") or [], kinds):
                answers[key] = answer
                answered.add(key)
                asked_about |= {about} & texts.keys()
            if answers and answers not in seen:
                seen.append(answers)
        left_out["task without an answer"] += not seen
        rows += ({**texts, **answers} for answers in seen)
    if not rows:
        raise DataError(
            f"{name} is an export of Label Studio without choices or texts"
            + (f"; its results: {', '.join(sorted(kinds))}" if kinds else ""),
            remedy="choices and texts (TextArea) become rows; label some, or export them as JSON",
        )
    asked_about = asked_about or {key for row in rows for key in row} - answered
    said = tuple(f"{name}: {count} × {what}, left out" for what, count in sorted(left_out.items()) if count)
    if mapped:
        return rows, said
    if len(asked_about) != 1 or len(answered) != 1:
        raise DataError(
            f"{name} is an export of Label Studio with several texts or answers; "
            f"its columns: {listed(dict.fromkeys(key for row in rows for key in row))}",
            remedy="say which are meant: --columns prompt=COLUMN,completion=COLUMN",
        )
    return [_named(row, asked_about, answered) for row in rows], said


def _named(row: RawRow, asked: set[str], answered: set[str]) -> RawRow:
    names = {**dict.fromkeys(asked, "prompt"), **dict.fromkeys(answered, "completion")}
    return {names[key]: value for key, value in row.items() if key in names}


def _answers(results: Any, kinds: set[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (name of the control, name of the text that it labels, the answer)."""
    for result in results if isinstance(results, list) else []:
        if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
            continue
        kinds.add(str(result.get("type"))[:40])
        for kind, joint in (("choices", ", "), ("text", "\n")):
            given = result["value"].get(kind)
            texts = [given] if isinstance(given, str) else given
            # Marked spans have a `text` as well, the text of the span, which is no answer.
            if result.get("type") in ("choices", "textarea") and isinstance(texts, list) and texts:
                yield str(result.get("from_name")), str(result.get("to_name")), joint.join(map(str, texts))
