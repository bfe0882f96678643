"""What the gateway remembers: requests and people's feedback on them, in SQLite or any database that SQLAlchemy reaches.

Writing is off the hot path: a bounded queue, one thread, batches. A database that is away costs records, which are counted, never an answer.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ratchet.errors import ConfigError, ServiceError, UserError

if TYPE_CHECKING:
    from sqlalchemy import Engine, MetaData

    from ratchet.config import Config

BATCH, WAIT_SECONDS, BACK_OFF_SECONDS, CLEAN_SECONDS = 500, 0.2, 2.0, 600.0
REDACTED = "[redacted]"
URL_VARIABLE = "RATCHET_REQUEST_LOG_URL"


class Logged(msgspec.Struct, frozen=True):
    """One request. Times in seconds since 1970 or milliseconds; NLL in nats a token. `user` is a pseudonym, empty where the client named none."""

    id: str
    at: float
    user: str
    arm: str  # "champion" or "challenger"
    version: int
    rollout: str = ""  # id of the rollout that chose the arm
    step: int = -1
    messages: tuple[tuple[str, str], ...] = ()  # (role, content), redacted; empty where texts are not kept
    answer: str = ""
    finish: str = ""  # "stop", "length", "error", "cancelled"
    status: int = 200  # HTTP status
    error: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    latency_ms: float = 0.0
    first_ms: float = 0.0  # until the first piece of the answer
    queue_ms: float = 0.0
    prompt_nll: float | None = None
    answer_nll: float | None = None

    @property
    def prompt(self) -> str:
        """The last user turn."""
        return next((content for role, content in reversed(self.messages) if role == "user"), "")


class Feedback(msgspec.Struct, frozen=True):
    """What one person said of one answer. `score` from 0 (wrong) to 1 (right)."""

    request: str
    user: str
    at: float
    score: float | None = None
    label: str = ""
    answer: str = ""  # the corrected answer
    comment: str = ""


class Unit(NamedTuple):
    """A user (or a request without one) in one step of a rollout."""

    unit: str
    step: int
    arm: str
    first_at: float
    requests: int
    errors: int
    empty: int
    latency_ms: float | None  # mean over what was answered
    feedback: float | None  # mean score
    feedbacks: int


class Traffic(NamedTuple):
    """An hour of one version; `hour` in seconds since 1970."""

    version: int
    arm: str
    hour: int
    requests: int
    errors: int
    latency_ms: float | None
    feedback: float | None
    feedbacks: int


class Counts(NamedTuple):
    written: int
    waiting: int
    dropped: int
    fault: str


def open_log(root: Path, config: Config) -> RequestLog:
    """The log of a checkout. Raises ConfigError for a URL or a pattern that is none; a database that is away is no fault yet."""
    from sqlalchemy.exc import ArgumentError

    url = os.environ.get(URL_VARIABLE) or config.request_log.url
    if not url:
        (root / ".ratchet").mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{root / '.ratchet' / 'requests.db'}"
    try:
        return RequestLog(url, config)
    except ArgumentError as error:
        raise ConfigError(f"request_log.url is no SQLAlchemy URL: {error}", remedy="such as postgresql+psycopg://user@host/requests; empty for SQLite") from None


class RequestLog:
    """Thread-safe. `put` is for the hot path; all else may wait for the database and raises ServiceError when it is away."""

    def __init__(self, url: str, config: Config) -> None:
        self._config = config.request_log
        self._engine, self._tables = _make_engine(url), _make_tables()
        self._redact = _compile(self._config.redact)
        self._queue: queue.Queue[Logged] = queue.Queue(self._config.queue)
        self._written = self._dropped = self._taken = 0
        self._fault = ""
        self._ready = False
        self._ended = threading.Event()
        self._idle = threading.Condition()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    # --- writing ---------------------------------------------------------------------------------------------------

    def put(self, record: Logged) -> None:
        """Never waits, never raises: a full queue drops the record and counts it."""
        if self._thread is None:
            self._start()
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def counts(self) -> Counts:
        return Counts(self._written, self._queue.qsize() + self._taken, self._dropped, self._fault)

    def add_feedback(self, feedback: Feedback) -> None:
        """Raises UserError when that person has spoken of that request already, ServiceError when the database is away."""
        from sqlalchemy.exc import IntegrityError

        values = msgspec.to_builtins(feedback) | {"answer": self._clean(feedback.answer), "comment": self._clean(feedback.comment)}
        try:
            with self._begin() as connection:
                connection.execute(self._tables.tables["feedback"].insert(), values)
        except IntegrityError:
            raise UserError(f"there is feedback of this user on {feedback.request} already", remedy="one user has one say on an answer") from None

    def flush(self, seconds: float = 5.0) -> bool:
        """Whether all that was put is written."""
        end = time.monotonic() + seconds
        while self.counts().waiting and time.monotonic() < end:
            time.sleep(0.01)
        return not self.counts().waiting

    def close(self, seconds: float = 5.0) -> None:
        self.flush(seconds if self._thread else 0.0)
        self._ended.set()
        if self._thread:
            self._thread.join(seconds)
        self._engine.dispose()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="request log", daemon=True)
                self._thread.start()

    def _write(self) -> None:
        cleaned = 0.0
        while not self._ended.is_set():
            batch = self._take()
            if batch:
                self._store(batch)
            if time.monotonic() - cleaned > CLEAN_SECONDS:
                cleaned = time.monotonic()
                self._forget_old()

    def _take(self) -> list[Logged]:
        try:
            batch = [self._queue.get(timeout=WAIT_SECONDS)]
        except queue.Empty:
            return []
        self._taken = 1
        while len(batch) < BATCH:
            try:
                batch.append(self._queue.get_nowait())
            except queue.Empty:
                break
            self._taken = len(batch)
        return batch

    def _store(self, batch: list[Logged]) -> None:
        """Again and again while the queue has room; then the oldest records are given up."""
        rows = [self._row(record) for record in batch]
        while True:
            try:
                with self._begin() as connection:
                    connection.execute(self._tables.tables["requests"].insert(), rows)
                self._written, self._fault, self._taken = self._written + len(rows), "", 0
                return
            except (ServiceError, UserError) as error:
                self._fault = str(error)
            if self._queue.full() or self._ended.wait(BACK_OFF_SECONDS):
                self._dropped, self._taken = self._dropped + len(rows), 0
                return

    def _row(self, record: Logged) -> dict[str, Any]:
        values = {name: getattr(record, name) for name in record.__struct_fields__}
        kept = [(role, self._clean(content)) for role, content in record.messages] if self._config.texts else []
        return values | {"messages": json.dumps(kept, ensure_ascii=False), "answer": self._clean(record.answer), "empty": int(record.status == 200 and not record.answer.strip())}

    def _clean(self, text: str) -> str:
        if not self._config.texts:
            return ""
        for pattern in self._redact:
            text = pattern.sub(REDACTED, text)
        return text

    def _forget_old(self) -> None:
        requests, feedback = self._tables.tables["requests"], self._tables.tables["feedback"]
        before = time.time() - self._config.retention_days * 86_400
        try:
            with self._begin() as connection:
                connection.execute(feedback.delete().where(feedback.c.at < before))
                connection.execute(requests.delete().where(requests.c.at < before))
        except ServiceError as error:
            self._fault = str(error)

    # --- reading ---------------------------------------------------------------------------------------------------

    def window(self, *, limit: int, since: float | None = None, until: float | None = None, version: int | None = None) -> list[Logged]:
        """The newest `limit` in [since, until), in the order of time."""
        from sqlalchemy import select

        table = self._tables.tables["requests"]
        query = select(*(table.c[name] for name in Logged.__struct_fields__)).order_by(table.c.at.desc(), table.c.id).limit(limit)
        query = query.where(table.c.at >= since) if since is not None else query
        query = query.where(table.c.at < until) if until is not None else query
        query = query.where(table.c.version == version) if version is not None else query
        with self._begin() as connection:
            return [_logged(row) for row in reversed(connection.execute(query).all())]

    def feedback_of(self, requests: Sequence[str]) -> dict[str, list[Feedback]]:
        """Of those that have any, in the order of time."""
        from sqlalchemy import select

        table = self._tables.tables["feedback"]
        found: dict[str, list[Feedback]] = {}
        with self._begin() as connection:
            for start in range(0, len(requests), BATCH):
                query = select(*(table.c[name] for name in Feedback.__struct_fields__)).where(table.c.request.in_(requests[start : start + BATCH])).order_by(table.c.at)
                for row in connection.execute(query):
                    found.setdefault(row.request, []).append(Feedback(*row))
        return found

    def count(self, *, since: float = 0.0, version: int | None = None) -> int:
        from sqlalchemy import func, select

        table = self._tables.tables["requests"]
        query = select(func.count()).where(table.c.at >= since)
        query = query.where(table.c.version == version) if version is not None else query
        with self._begin() as connection:
            return int(connection.execute(query).scalar_one())

    def rollout_units(self, rollout: str) -> list[Unit]:
        """In the order in which they came first."""
        from sqlalchemy import case, func

        table = self._tables.tables["requests"]
        unit = case((table.c.user == "", table.c.id), else_=table.c.user)
        query = self._summed([unit, table.c.step, table.c.arm], func.min(table.c.at)).where(table.c.rollout == rollout).group_by(unit, table.c.step, table.c.arm)
        with self._begin() as connection:
            return [Unit(*row) for row in connection.execute(query.order_by(func.min(table.c.at)))]

    def traffic(self, *, since: float) -> list[Traffic]:
        """By hour, version and arm."""
        from sqlalchemy import Integer, cast, func

        table = self._tables.tables["requests"]
        hour = cast(func.floor(table.c.at / 3600), Integer) * 3600 if self._engine.dialect.name != "sqlite" else cast(table.c.at / 3600, Integer) * 3600
        query = self._summed([table.c.version, table.c.arm, hour]).where(table.c.at >= since).group_by(table.c.version, table.c.arm, hour).order_by(hour, table.c.version)
        with self._begin() as connection:
            return [Traffic(*row) for row in connection.execute(query)]

    def _summed(self, groups: list[Any], *first: Any) -> Any:
        from sqlalchemy import case, func, select

        table, scores = self._tables.tables["requests"], self._scores()
        answered = case((table.c.status == 200, table.c.latency_ms))
        figures = [func.count(), func.sum(case((table.c.status >= 500, 1), else_=0))]
        empty = [func.sum(table.c.empty)] if first else []
        return select(*groups, *first, *figures, *empty, func.avg(answered), func.avg(scores.c.score), func.count(scores.c.score)).select_from(
            table.outerjoin(scores, scores.c.request == table.c.id)
        )

    def _scores(self) -> Any:
        """One mean score a request, however many people spoke."""
        from sqlalchemy import func, select

        table = self._tables.tables["feedback"]
        return select(table.c.request, func.avg(table.c.score).label("score")).where(table.c.score.is_not(None)).group_by(table.c.request).subquery()

    @contextmanager
    def _begin(self) -> Iterator[Any]:
        """A transaction; tables are made at the first. Raises ServiceError when the database is away; IntegrityError passes."""
        from sqlalchemy.exc import IntegrityError, SQLAlchemyError

        try:
            if not self._ready:
                self._tables.create_all(self._engine)
                self._ready = True
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except (SQLAlchemyError, OSError) as error:
            cause = str(getattr(error, "orig", None) or error).splitlines()[0]
            raise ServiceError(f"the request log does not answer: {cause}", remedy="check request_log.url and the database behind it") from error


def _make_engine(url: str) -> Engine:
    from sqlalchemy import create_engine, event

    engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _settle(connection: Any, _record: Any) -> None:
            # Readers do not wait for the writer; a power cut may cost the newest records, never the file.
            for line in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=5000"):
                connection.execute(f"PRAGMA {line}")

    return engine


def _make_tables() -> MetaData:
    from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text

    tables: MetaData = MetaData()
    columns: list[Any] = [Column(name, _kind(name), primary_key=name == "id", index=name in ("at", "rollout")) for name in Logged.__struct_fields__]
    Table("requests", tables, *columns, Column("empty", Integer))
    Table(
        "feedback",
        tables,
        Column("request", String(200), primary_key=True),
        Column("user", String(200), primary_key=True),
        Column("at", Float, index=True),
        Column("score", Float),
        *(Column(name, Text) for name in ("label", "answer", "comment")),
    )
    return tables


def _kind(name: str) -> Any:
    from sqlalchemy import Float, Integer, String, Text

    if name in ("version", "step", "status", "prompt_tokens", "answer_tokens"):
        return Integer
    if name in ("at", "latency_ms", "first_ms", "queue_ms", "prompt_nll", "answer_nll"):
        return Float
    return String(200) if name in ("id", "user", "arm", "rollout", "finish") else Text


def _logged(row: Any) -> Logged:
    values = row._asdict()
    return Logged(**values | {"messages": tuple((role, content) for role, content in json.loads(values["messages"]))})


def _compile(patterns: list[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError(f"request_log.redact holds {pattern!r}, which is no regular expression: {error}", remedy="mend it in params.yaml") from None
    return found
