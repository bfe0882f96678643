"""Read the request log: windows of the traffic, people's feedback, and sums by user or hour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ratchet.errors import ServiceError
from ratchet.monitoring.request_records import (
    Feedback,
    Logged,
    Traffic,
    Unit,
    make_engine,
    record_of,
    table_definitions,
    update_tables,
)

CHUNK = 500  # ids per query, because databases limit the number of bound values


class RequestQueries:
    """Query the log. Each method raises ServiceError when the database is down."""

    def __init__(self, url: str) -> None:
        self._engine, self._tables = make_engine(url), table_definitions()
        self._ready = False

    def window(
        self,
        *,
        limit: int,
        since: float | None = None,
        until: float | None = None,
        version: int | None = None,
    ) -> list[Logged]:
        """Return the newest `limit` requests in [since, until), ordered by time."""
        table = self._tables["requests"]
        query = (
            self._requests(since=since, until=until, version=version)
            .order_by(table.c.at.desc(), table.c.id.desc())
            .limit(limit)
        )
        with self.transaction() as connection:
            return [record_of(row) for row in reversed(connection.execute(query).all())]

    def spoken_of(self) -> list[tuple[Logged, list[Feedback]]]:
        """Return every request with feedback, and that feedback, ordered by time."""
        from sqlalchemy import select

        requests, feedback = self._tables["requests"], self._tables["feedback"]
        query = (
            self._requests()
            .where(requests.c.id.in_(select(feedback.c.request)))
            .order_by(requests.c.at, requests.c.id)
        )
        with self.transaction() as connection:
            found = [record_of(row) for row in connection.execute(query)]
        said = self.feedback_of([request.id for request in found])
        return [(request, said[request.id]) for request in found if request.id in said]

    def feedback_of(self, requests: Sequence[str]) -> dict[str, list[Feedback]]:
        """Return the feedback on each of the requests that have any, ordered by time."""
        from sqlalchemy import select

        table = self._tables["feedback"]
        columns = [table.c[name] for name in Feedback.__struct_fields__]
        found: dict[str, list[Feedback]] = {}
        with self.transaction() as connection:
            for start in range(0, len(requests), CHUNK):
                chosen = table.c.request.in_(requests[start : start + CHUNK])
                for row in connection.execute(
                    select(*columns).where(chosen).order_by(table.c.at, table.c.user)
                ):
                    found.setdefault(row.request, []).append(Feedback(*row))
        return found

    def first_seen(self) -> dict[str, float]:
        """Return when each user first asked or gave feedback, as far back as the log goes.

        The key "" stands for users without a name.
        """
        from sqlalchemy import func, select, union_all

        tables = self._tables.values()
        seen = union_all(*(select(table.c.user, table.c.at) for table in tables)).subquery()
        with self.transaction() as connection:
            return {
                row.user: row.at
                for row in connection.execute(
                    select(seen.c.user, func.min(seen.c.at).label("at")).group_by(seen.c.user)
                )
            }

    def unknown_requests(self) -> int:
        """Count requests that have feedback but are not in the log.

        They are not written yet, were dropped, or were deleted because of their age.
        """
        from sqlalchemy import distinct, func, select

        requests, said = self._tables["requests"], self._tables["feedback"]
        query = select(func.count(distinct(said.c.request))).where(
            said.c.request.not_in(select(requests.c.id))
        )
        with self.transaction() as connection:
            return int(connection.execute(query).scalar_one())

    def count(self, *, since: float | None = None, version: int | None = None) -> int:
        from sqlalchemy import func, select

        with self.transaction() as connection:
            return int(
                connection.execute(
                    select(func.count()).select_from(self._requests(since=since, version=version).subquery())
                ).scalar_one()
            )

    def rollout_units(self, rollout: str) -> list[Unit]:
        """Return the units of a rollout by step and arm, in the order of their first request."""
        from sqlalchemy import func

        table = self._tables["requests"]
        first_at, empty = func.min(table.c.at), func.sum(table.c.empty)
        query = self._summed([table.c.unit, table.c.step, table.c.arm], first_at, empty=empty).where(
            table.c.rollout == rollout
        )
        with self.transaction() as connection:
            return [Unit(*row) for row in connection.execute(query.order_by(first_at, table.c.unit))]

    def traffic(self, *, since: float) -> list[Traffic]:
        """Sum up the requests since a moment by hour, version and arm."""
        table = self._tables["requests"]
        query = (
            self._summed([table.c.version, table.c.arm, table.c.hour])
            .where(table.c.at >= since)
            .order_by(table.c.hour, table.c.version, table.c.arm)
        )
        with self.transaction() as connection:
            return [Traffic(*row) for row in connection.execute(query)]

    def _requests(
        self, *, since: float | None = None, until: float | None = None, version: int | None = None
    ) -> Any:
        from sqlalchemy import select

        table = self._tables["requests"]
        query = select(*(table.c[name] for name in Logged.__struct_fields__))
        query = query.where(table.c.at >= since) if since is not None else query
        query = query.where(table.c.at < until) if until is not None else query
        return query.where(table.c.version == version) if version is not None else query

    def _summed(self, groups: list[Any], *first: Any, empty: Any = None) -> Any:
        """Query one row per group: the group, `first`, requests, errors, `empty`, mean latency of the
        answered requests, mean score, and requests with a score.
        """
        from sqlalchemy import case, func, select

        table, said = self._tables["requests"], self._tables["feedback"]
        # One mean score per request, however many people gave feedback.
        scores = (
            select(said.c.request, func.avg(said.c.score).label("score"))
            .where(said.c.score.is_not(None))
            .group_by(said.c.request)
            .subquery()
        )
        figures = [
            func.count(),
            func.sum(case((table.c.status >= 500, 1), else_=0)),
            *([] if empty is None else [empty]),
        ]
        figures += [
            func.avg(case((table.c.status == 200, table.c.latency_ms))),
            func.avg(scores.c.score),
            func.count(scores.c.score),
        ]
        return (
            select(*groups, *first, *figures)
            .select_from(table.outerjoin(scores, scores.c.request == table.c.id))
            .group_by(*groups)
        )

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """Open a transaction; the first one makes the tables.

        Raises ServiceError when the database is away; IntegrityError and DataError pass through.
        """
        from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

        try:
            if not self._ready:
                update_tables(self._engine, self._tables["requests"].metadata)
                self._ready = True
            with self._engine.begin() as connection:
                yield connection
        except (IntegrityError, DataError):
            raise
        except (SQLAlchemyError, OSError) as error:
            self._ready = False
            cause = (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
            raise ServiceError(
                f"the request log does not answer: {cause}",
                remedy="check request_log.url and the database behind it",
            ) from error
