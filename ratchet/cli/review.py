"""`ratchet review`: list rows that wait for a person, and record the decisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.cli.context import Json, find_root, note, read_config, say, show

if TYPE_CHECKING:
    from ratchet.review.queue import ReviewQueue
    from ratchet.review.records import Decision, Entry

app = typer.Typer(
    help="Rows that wait for a person's decision before the model learns from them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Draft = Annotated[str | None, typer.Option("--draft", metavar="NAME", help="Only this draft.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The row's id, or how it begins.")]
By = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="Who decides; otherwise git's user.name.")
]
Why = Annotated[str, typer.Option("--why", help="Why; kept with the decision.")]
EVERYTHING = 2**31  # rows: no limit


@app.command("status")
def review_status(as_json: Json = False) -> None:
    """List drafts, what waits in each, and whether it may become a batch. Example: ratchet review status"""
    import msgspec

    from ratchet.errors import UserError

    root = find_root()
    bound = read_config(root).review.max_rejects
    with _queue(root) as queue:
        found = [msgspec.to_builtins(draft) for draft in queue.drafts()]
        for draft in found:
            try:
                rows = queue.outcome(draft["name"], max_rejects=bound).rows
                draft["rows"], draft["refused"] = len(rows), ""
            except UserError as error:
                draft["rows"], draft["refused"] = 0, str(error).splitlines()[0]
    show(found, as_json, lambda: say("\n".join(map(_describe, found)) or "no draft waits"))


@app.command("next")
def review_next(draft: Draft = None, as_json: Json = False) -> None:
    """Show one row that waits; those with doubts come first. Example: ratchet review next"""
    import msgspec

    with _queue(find_root()) as queue:
        found, waiting = queue.pending(draft, limit=1), queue.waiting(draft)
    item = msgspec.to_builtins(found[0]) if found else None
    show(
        {"waiting": waiting, "item": item},
        as_json,
        lambda: say(_show_item(item, waiting) if item else "nothing waits"),
    )


@app.command("collect")
def review_collect(as_json: Json = False) -> None:
    """Queue the rows with doubts of a retraining that ran elsewhere, such as on GitHub; git pull first.

    Example: ratchet review collect
    """
    root = find_root()
    config = read_config(root)
    from flows.review_queue import collect_doubtful

    added = collect_doubtful(root, config, note)
    show({"added": added}, as_json, lambda: say(f"{added} rows are new in the queue"))


@app.command("accept")
def review_accept(id: Id, draft: Draft = None, by: By = None, why: Why = "") -> None:
    """Take a row as it is. Example: ratchet review accept 3f2a"""
    _decide(id, draft, "accept", by, why)


@app.command("reject")
def review_reject(id: Id, why: Why = "", draft: Draft = None, by: By = None) -> None:
    """Leave a row out. Example: ratchet review reject 3f2a --why "not in the passage" """
    _decide(id, draft, "reject", by, why)


@app.command("edit")
def review_edit(
    id: Id,
    answer: Annotated[str, typer.Option("--answer", metavar="TEXT", help="The right answer.")],
    draft: Draft = None,
    by: By = None,
    why: Why = "",
) -> None:
    """Take a row with another answer. Example: ratchet review edit 3f2a --answer "30 days" """
    _decide(id, draft, "edit", by, why, answer)


@app.command("undo")
def review_undo(id: Id, draft: Draft = None, by: By = None) -> None:
    """Take a decision back. Example: ratchet review undo 3f2a"""
    root = find_root()
    with _queue(root) as queue:
        item = queue.find(id, draft).item
        queue.undo(item.id, item.draft, by=by or _who(root))
    say(f"row {item.id[:12]} of {item.draft} is undecided again")


@app.command("export")
def review_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="*.csv or *.jsonl; any with --label-studio.")],
    draft: Draft = None,
    label_studio: Annotated[
        bool,
        typer.Option(
            "--label-studio", help="Write tasks for Label Studio and print its labelling configuration."
        ),
    ] = False,
) -> None:
    """Write the rows that wait to a file with a column `review`: accept, reject, or edit and change `answer`.

    Example: ratchet review export march.csv
    """
    from ratchet.errors import UserError
    from ratchet.review.files import LABELLING, export_rows

    with _queue(find_root()) as queue:
        items = queue.pending(draft, limit=EVERYTHING)
    if not items:
        raise UserError("nothing waits for a decision", remedy="`ratchet review status` shows the drafts")
    export_rows(file, items, label_studio=label_studio)
    note(f"{len(items)} rows in {file}")
    if label_studio:
        say(LABELLING.rstrip())


@app.command("import")
def review_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="*.csv, *.jsonl, or Label Studio's *.json.")],
    by: By = None,
    as_json: Json = False,
) -> None:
    """Read a file that people filled in: all of it, or nothing when a line has a fault.

    Example: ratchet review import march.csv --by Ana
    """
    from ratchet.review.files import import_rows

    root = find_root()
    with _queue(root) as queue:
        done = import_rows(file, queue, by=by or _who(root))
    found = {
        "accepted": done.decided["accept"],
        "rejected": done.decided["reject"],
        "edited": done.decided["edit"],
        "known": done.known,
        "empty": done.empty,
    }
    words = (
        f"{found['accepted']} accepted, {found['rejected']} rejected, {found['edited']} edited; {done.known} "
        f"known already, {done.empty} undecided"
    )
    show(found, as_json, lambda: say(words))


def _decide(id: str, draft: str | None, verdict: str, by: str | None, why: str, answer: str = "") -> None:
    from ratchet.review.records import Decision, with_answer

    root = find_root()
    with _queue(root) as queue:
        item = queue.find(id, draft).item
        messages = with_answer(item, answer) if verdict == "edit" else ()
        queue.decide(Decision(item.id, item.draft, verdict, messages, by=by or _who(root), why=why))
        entry, waiting = queue.find(item.id, item.draft), queue.waiting(draft)
        batch = next(found.batch for found in queue.drafts() if found.name == item.draft)
    _tell(entry, waiting, batch)


def _tell(entry: Entry, waiting: int, batch: str) -> None:
    decision: Decision | None = entry.decision
    say(
        f"{decision.verdict if decision else 'undecided'}: row {entry.item.id[:12]} of {entry.item.draft}; "
        f"{waiting} wait"
    )
    if batch:
        note(f"the draft is the batch {batch} already: the decision is kept, the batch stays as it is")


def _describe(draft: dict[str, Any]) -> str:
    figures = (
        f"{draft['items']} rows, {draft['doubtful']} doubtful, {draft['sampled']} in the sample; "
        f"{draft['accepted']} accepted, {draft['edited']} edited, {draft['rejected']} rejected"
    )
    state = (
        f"is the batch {draft['batch']}"
        if draft["taken"]
        else draft["refused"]
        or f"ready: {draft['rows']} rows, ratchet ingest --source review --draft {draft['name']}"
    )
    return f"{draft['name']} ({draft['kind']}): {figures}\n  {state}"


def _show_item(item: dict[str, Any], waiting: int) -> str:
    """Render a row; control characters are escaped, so that a row cannot control the terminal."""
    turns = [f"{turn['role']}: {turn['content']}" for turn in item["messages"]]
    doubts, passage = (
        [f"doubt: {doubt}" for doubt in item["doubts"]],
        [f"passage: {item['passage']}"] if item["passage"] else [],
    )
    text = "\n".join(
        [
            f"{item['id'][:12]} of {item['draft']} ({item['kind']}); {waiting} wait",
            *doubts,
            "",
            *turns,
            *([f"an earlier row answers: {item['earlier']}"] if item["earlier"] else []),
            "",
            *passage,
        ]
    ).rstrip()
    return "".join(
        char if char in "\n\t" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )


def _who(root: Path) -> str:
    from ratchet.pipeline.checkout import who

    return who(root)


@contextmanager
def _queue(root: Path) -> Iterator[ReviewQueue]:
    from ratchet.review.queue import ReviewQueue

    queue = ReviewQueue(root)
    try:
        yield queue
    finally:
        queue.close()
