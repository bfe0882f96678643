"""The queue of rows that wait for a person's decision, and the decisions, in `.ratchet/review.db` or the
shared database.

A draft is a set of rows that arrived together. People review every row with a doubt and a sample of the
others. The share of rejects in that sample decides whether the whole draft is good enough to learn from
(`ReviewQueue.outcome`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ratchet.errors import UserError
from ratchet.review.records import (
    UNDO,
    Decision,
    DraftFigures,
    Entry,
    Item,
    Outcome,
    check_decision,
    check_name,
    collect_rows,
    hash_rows,
    now,
    sample_order,
)
from ratchet.review.store import Store

if TYPE_CHECKING:
    from sqlalchemy import Connection, Join, Select, Table


Row = dict[str, str | int]  # column → value


class ReviewQueue:
    """The review queue of a checkout; safe for several threads and processes.

    Every method raises ServiceError if the file cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self._store = Store(root)

    # --- writing --------------------------------------------------------------------------------------------

    def add(self, items: Iterable[Item], *, share: float) -> int:
        """Add items, choose the sample, and return the number of new items.

        The sample is `share` of the items without doubts, chosen by the hash of their ids, and at least one
        item per draft unless the share is 0.
        """
        table = self._store.items
        rows = [_item_row(item, share) for item in items]
        if not rows:
            return 0
        with self._store.transaction() as connection:
            new = self._store.insert(table).on_conflict_do_nothing().returning(table.c.place)
            added = len(connection.execute(new, rows).all())
            for draft in {str(row["draft"]) for row in rows} if share > 0 else ():
                _ensure_sample(connection, table, draft)
        return added

    def decide(self, decision: Decision) -> None:
        """Store a decision, which replaces an earlier one; the history keeps both.

        Raises as `decide_all` does.
        """
        self.decide_all([decision])

    def decide_all(self, decisions: Iterable[Decision]) -> None:
        """Store all decisions or none.

        Raises UserError that lists every fault: an unknown item or verdict, no `by`, or a row that is not a
        valid conversation.
        """
        decisions = list(decisions)
        known = {
            (decision.draft, decision.item): self.get(decision.draft, decision.item) for decision in decisions
        }
        checked, faults = [], []
        for decision in decisions:
            try:
                checked.append(check_decision(decision, known[decision.draft, decision.item]))
            except UserError as error:
                faults.append(str(error))
        if len(faults) == 1:
            raise UserError(faults[0])
        if faults:
            raise UserError(f"{len(faults)} faults, nothing was decided:\n  " + "\n  ".join(faults))
        table, history = self._store.decisions, self._store.history
        with self._store.transaction() as connection:
            for decision in checked:
                row = _decision_row(decision)
                connection.execute(
                    self._store.insert(table)
                    .values(row)
                    .on_conflict_do_update(index_elements=["draft", "item"], set_=row)
                )
                connection.execute(history.insert(), row)

    def undo(self, item: str, draft: str, *, by: str) -> None:
        """Delete the decision on an item; the history keeps it, followed by an "undo".

        Raises UserError: there is no decision, or no `by`.
        """
        by = check_name(by)
        table, history = self._store.decisions, self._store.history
        with self._store.transaction() as connection:
            gone = connection.execute(
                table.delete().where(table.c.draft == draft, table.c.item == item)
            ).rowcount
            if not gone:
                raise UserError(
                    f"nothing was decided on {item[:12]!r} in the draft {draft!r}",
                    remedy="`ratchet review status` shows the drafts",
                )
            connection.execute(history.insert(), _decision_row(Decision(item, draft, UNDO, by=by, at=now())))

    def mark_taken(self, draft: str, batch: str, *, content: str | None = None) -> None:
        """Record that a draft became a batch. Raises UserError for an unknown draft.

        `content` is the hash of the rows that became the batch; the default is that of the current decisions.
        """
        row = {
            "draft": draft,
            "batch": batch,
            "content": content or hash_rows(collect_rows(self.entries(draft))[0]),
            "at": now(),
        }
        with self._store.transaction() as connection:
            connection.execute(
                self._store.insert(self._store.taken)
                .values(row)
                .on_conflict_do_update(index_elements=["draft"], set_=row)
            )

    def close(self) -> None:
        self._store.close()

    # --- reading --------------------------------------------------------------------------------------------

    def pending(self, draft: str | None = None, limit: int = 50) -> list[Item]:
        """Return up to `limit` undecided items that a person has to review.

        Items with doubts come first, then the sample, each in order of arrival.
        """
        table = self._store.items
        with self._store.transaction() as connection:
            query = self._waiting(draft).order_by(table.c.doubtful.desc(), table.c.place).limit(limit)
            return [_read_item(row.body) for row in connection.execute(query)]

    def waiting(self, draft: str | None = None) -> int:
        """Count the items that `pending` returns without a limit."""
        from sqlalchemy import func, select

        with self._store.transaction() as connection:
            return int(
                connection.execute(
                    select(func.count()).select_from(self._waiting(draft).subquery())
                ).scalar_one()
            )

    def entries(self, draft: str) -> list[Entry]:
        """Return all entries of a draft in order of arrival. Raises UserError for an unknown draft."""
        found = self._entries(self._store.items.c.draft == draft)
        if not found:
            names = ", ".join(draft.name for draft in self.drafts())
            raise UserError(f"no draft is named {draft!r}", remedy=f"known: {names or 'none'}")
        return found

    def get(self, draft: str, id: str) -> Entry | None:
        table = self._store.items
        return next(iter(self._entries((table.c.draft == draft) & (table.c.id == id))), None)

    def find(self, start: str, draft: str | None = None) -> Entry:
        """Find the item whose id begins with `start`. Raises UserError if there is none, or several."""
        table = self._store.items
        where = table.c.id.startswith(start, autoescape=True)
        found = self._entries(where if draft is None else where & (table.c.draft == draft))
        if not start or not found:
            raise UserError(
                f"no row {start!r} is there to review", remedy="`ratchet review next` shows one with its id"
            )
        if len(found) > 1:
            places = ", ".join(f"{entry.item.id[:12]} of {entry.item.draft}" for entry in found[:5])
            raise UserError(
                f"{len(found)} rows begin with {start!r}: {places}",
                remedy="write more of the id, or name one draft with --draft",
            )
        return found[0]

    def history(self, item: str, draft: str) -> list[Decision]:
        """Return all decisions on a row, the oldest first; "undo" follows a decision that was withdrawn."""
        from sqlalchemy import select

        table = self._store.history
        with self._store.transaction() as connection:
            query = select(table).where(table.c.item == item, table.c.draft == draft).order_by(table.c.place)
            return [_read_decision(row) for row in connection.execute(query)]

    def drafts(self) -> list[DraftFigures]:
        """Return the figures of each draft, in order of arrival."""
        from sqlalchemy import case, func, select

        items, decisions, taken = self._store.items, self._store.decisions, self._store.taken

        def count(condition: Any) -> Any:
            return func.sum(case((condition, 1), else_=0))

        decided = decisions.c.verdict
        figures = {
            "kind": func.min(items.c.kind),
            "items": func.count(),
            "doubtful": func.sum(items.c.doubtful),
            "sampled": func.sum(items.c.sampled),
            "waiting": count(decided.is_(None) & ((items.c.sampled == 1) | (items.c.doubtful == 1))),
            "decided": func.count(decided),
            "accepted": count(decided == "accept"),
            "rejected": count(decided == "reject"),
            "edited": count(decided == "edit"),
            "batch": func.coalesce(func.min(taken.c.batch), ""),
        }
        joined = self._with_decisions().outerjoin(taken, taken.c.draft == items.c.draft)
        query = select(
            items.c.draft.label("name"), *(column.label(name) for name, column in figures.items())
        ).select_from(joined)
        with self._store.transaction() as connection:
            found = connection.execute(query.group_by(items.c.draft).order_by(func.min(items.c.place))).all()
        return [DraftFigures(**row._mapping, taken=bool(row.batch)) for row in found]

    def outcome(self, draft: str, *, max_rejects: float) -> Outcome:
        """Collect the rows to learn from: accepted, edited, and those without doubts outside the sample.

        Raises UserError: rows still wait; the share of rejects in the sample is over `max_rejects` (an edit
        counts as one); or the draft became a batch already, with other rows.
        """
        entries = self.entries(draft)
        if waiting := sum(entry.waits for entry in entries):
            raise UserError(
                f"{waiting} rows of the draft {draft!r} wait for a decision",
                remedy="ratchet review next, or the gateway's page /review",
            )
        sample = [entry.decision.verdict for entry in entries if entry.sampled and entry.decision]
        bad = sample.count("reject") + sample.count("edit")
        if sample and bad / len(sample) > max_rejects:
            raise UserError(
                f"the draft {draft!r} is refused whole: {bad} of the {len(sample)} rows of its sample were "
                f"rejected or edited ({bad / len(sample):.0%}), wanted at most {max_rejects:.0%}",
                remedy="correct what drafted the rows and draft again; review.max_rejects is the bound",
            )
        rows, left_out = collect_rows(entries)
        content = hash_rows(rows)
        with self._store.transaction() as connection:
            taken = connection.execute(
                self._store.taken.select().where(self._store.taken.c.draft == draft)
            ).first()
        if taken and taken.content != content:
            raise UserError(
                f"the draft {draft!r} is the batch {taken.batch} already, with other rows: "
                "a batch is immutable",
                remedy="give new rows a draft of their own",
            )
        reviewers = sorted({entry.decision.by for entry in entries if entry.decision})
        return Outcome(draft, rows, reviewers, dict(sorted(left_out.items())), content)

    def _with_decisions(self) -> Join:
        items, decisions = self._store.items, self._store.decisions
        decided = (decisions.c.draft == items.c.draft) & (decisions.c.item == items.c.id)
        return items.outerjoin(decisions, decided)

    def _waiting(self, draft: str | None) -> Select[Any]:
        from sqlalchemy import select

        items, decisions = self._store.items, self._store.decisions
        query = (
            select(items.c.body)
            .select_from(self._with_decisions())
            .where(decisions.c.item.is_(None), (items.c.doubtful == 1) | (items.c.sampled == 1))
        )
        return query if draft is None else query.where(items.c.draft == draft)

    def _entries(self, where: Any) -> list[Entry]:
        from sqlalchemy import select

        items = self._store.items
        query = (
            select(items.c.body, items.c.sampled, self._store.decisions)
            .select_from(self._with_decisions())
            .where(where)
            .order_by(items.c.place)
        )
        with self._store.transaction() as connection:
            return [
                Entry(_read_item(row.body), bool(row.sampled), _read_decision(row) if row.verdict else None)
                for row in connection.execute(query)
            ]


# --- rules --------------------------------------------------------------------------------------------------


def _ensure_sample(connection: Connection, table: Table, draft: str) -> None:
    """Add one row to the sample if the draft is so small that the share chose none."""
    from sqlalchemy import func, select

    clear = (table.c.draft == draft) & (table.c.doubtful == 0)
    if connection.execute(select(func.count()).where(clear & (table.c.sampled == 1))).scalar_one():
        return
    ids = [row.id for row in connection.execute(select(table.c.id).where(clear))]
    if ids:
        connection.execute(
            table.update()
            .where(table.c.draft == draft, table.c.id == min(ids, key=sample_order))
            .values(sampled=1)
        )


# --- the file -----------------------------------------------------------------------------------------------


def _item_row(item: Item, share: float) -> Row:
    """Encode an item as ASCII JSON: SQLite refuses lone surrogates, which rows in quarantine may hold."""
    sampled = not item.doubts and sample_order(item.id) < share * 2**64
    body = json.dumps(msgspec.to_builtins(item))
    return {
        "draft": item.draft,
        "id": item.id,
        "kind": item.kind,
        "doubtful": int(bool(item.doubts)),
        "sampled": int(sampled),
        "body": body,
    }


def _read_item(body: str) -> Item:
    return msgspec.convert(json.loads(body), Item)


def _decision_row(decision: Decision) -> Row:
    return msgspec.structs.asdict(decision) | {"messages": json.dumps(msgspec.to_builtins(decision.messages))}


def _read_decision(row: Any) -> Decision:
    values = {name: getattr(row, name) for name in Decision.__struct_fields__}
    return msgspec.convert(values | {"messages": json.loads(row.messages)}, Decision)
