"""Store requests and people's feedback on them, in SQLite or PostgreSQL.

Requests are never written on the path of an answer: there is a bounded queue, and one thread writes in
batches. A kill of the process loses the records of the last GATHER_SECONDS, and those being written. While
the database is down, records are lost and counted, but every request is answered.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ratchet.data.pii import redact
from ratchet.errors import ConfigError, RatchetError, ServiceError, UserError
from ratchet.monitoring.pictures import KeptPictures
from ratchet.monitoring.request_queries import RequestQueries
from ratchet.monitoring.request_records import Counts, Feedback, Logged
from ratchet.storage.database import find_url

if TYPE_CHECKING:
    from ratchet.config.params import Config

BATCH, GATHER_SECONDS, BACK_OFF_SECONDS, CLEAN_SECONDS = 500, 0.05, (0.2, 5.0), 600.0
REDACTED = "[redacted]"
log = logging.getLogger("ratchet.monitoring.request_log")
URL_VARIABLE, FILE = "RATCHET_REQUEST_LOG_URL", Path(".ratchet/requests.db")


def open_log(root: Path, config: Config) -> RequestLog:
    """Open the log of a checkout.

    Raises ConfigError for a malformed URL or pattern. A database that is down raises nothing here.
    """
    from sqlalchemy.exc import ArgumentError

    url = os.environ.get(URL_VARIABLE) or config.request_log.url or find_url(root)[0]
    if not url:
        path = root / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # people's prompts; SQLite gives its other files the same mode
        url = f"sqlite:///{path}"
    try:
        return RequestLog(url, config, KeptPictures(root))
    except ArgumentError as error:
        raise ConfigError(
            f"request_log.url is no SQLAlchemy URL: {error}",
            remedy="such as postgresql+psycopg://user@host/requests; empty for SQLite",
        ) from None
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"request_log.url needs the package {error.name}",
            remedy="pip install 'ratchet[store]' brings PostgreSQL's, as postgresql+psycopg://…",
        ) from None


class RequestLog(RequestQueries):
    """Write and read the log; safe for several threads.

    `put` never waits. All other methods may wait for the database and raise ServiceError when it is down.
    """

    def __init__(self, url: str, config: Config, pictures: KeptPictures | None = None) -> None:
        super().__init__(url)
        self._pictures = pictures
        self._config = config.request_log
        self._redact = _compile(self._config.redact)
        self._waiting: deque[Logged] = deque()
        self._written = self._dropped = 0
        self._fault = ""
        self._ended = self._is_down = False
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, record: Logged) -> None:
        """Queue a record without waiting and without raising: a full queue drops the record and counts it."""
        if self._ended or len(self._waiting) >= self._config.queue:
            self._drop(1)
        else:
            self._waiting.append(record)
            if not self._is_down:  # then the writer tries again when its pause is over
                self._wake.set()
        if self._thread is None:
            self.start()

    def keep_pictures(self, pictures: Mapping[str, bytes]) -> None:
        """Keep a request's media if `request_log.pictures` says so; a full disk is logged, not raised."""
        if self._pictures is None or not (self._config.pictures and self._config.texts):
            return
        try:
            self._pictures.keep(pictures)
        except (OSError, RatchetError) as error:
            log.warning("pictures or recordings of a request are not kept: %s", error)

    def counts(self) -> Counts:
        return Counts(self._written, len(self._waiting), self._dropped, self._fault)

    def add_feedback(self, feedback: Feedback) -> None:
        """Store feedback: one vote per person and answer.

        A person's later feedback on a request replaces the earlier feedback completely, if it comes with the
        same key.

        Raises UserError when another key has spoken for that person or the score is malformed, ServiceError
        when the database is down.
        """
        from sqlalchemy.exc import IntegrityError

        if feedback.score is not None and not 0 <= feedback.score <= 1:  # this refuses NaN too
            raise UserError(f"the score is {feedback.score}, wanted 0 (wrong) to 1 (right)")
        texts = {name: self._clean(getattr(feedback, name)) for name in ("label", "answer", "comment")}
        values, table = msgspec.structs.asdict(feedback) | texts, self._tables["feedback"]
        try:
            with self.transaction() as connection:
                connection.execute(table.insert(), values)
        except IntegrityError:
            same = (
                (table.c.request == feedback.request)
                & (table.c.user == feedback.user)
                & (table.c.sender == feedback.sender)
            )
            with self.transaction() as connection:
                replaced = connection.execute(table.update().where(same).values(values)).rowcount
            if not replaced:
                raise UserError(
                    f"there is feedback of this user on {feedback.request} already, sent with another key",
                    remedy="one user has one say on an answer",
                ) from None

    def flush(self, seconds: float = 5.0) -> bool:
        """Wait up to `seconds`, and return whether all queued records are written."""
        end = time.monotonic() + seconds
        while self._waiting and time.monotonic() < end:
            self._wake.set()
            time.sleep(0.01)
        return not self._waiting

    def close(self, seconds: float = 5.0) -> None:
        """Write what is queued, then close; if the database is down, queued records are lost and counted."""
        self._ended = True
        self._wake.set()
        if self._thread:
            self._thread.join(seconds)
        self._engine.dispose()

    def start(self) -> None:
        """Start writing, and deleting what is too old. `put` starts it too."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="request log", daemon=True)
                self._thread.start()

    def _write(self) -> None:
        next_clean, back_off = 0.0, BACK_OFF_SECONDS[0]
        while not self._ended:
            self._wake.wait(back_off if self._is_down else max(0.0, next_clean - time.monotonic()))
            time.sleep(GATHER_SECONDS)
            self._wake.clear()
            back_off = min(2 * back_off, BACK_OFF_SECONDS[1]) if self._is_down else BACK_OFF_SECONDS[0]
            self._is_down = not self._drain()
            if time.monotonic() >= next_clean:
                next_clean = time.monotonic() + CLEAN_SECONDS
                self._forget_old()
        self._drain()
        self._drop(len(self._waiting))
        self._waiting.clear()

    def _drain(self) -> bool:
        """Write what is queued, in its order.

        Return False when the database is down; the rest stays queued.
        """
        while self._waiting:
            batch = [self._waiting[place] for place in range(min(BATCH, len(self._waiting)))]
            try:
                taken = self._store(batch)
            except ServiceError as error:
                self._tell(str(error))
                return False
            self._written += taken
            self._fault = "" if taken == len(batch) else self._fault
            for _ in batch:
                self._waiting.popleft()
        return True

    def _store(self, batch: list[Logged]) -> int:
        """Write the records, and return how many were stored.

        A record that the database refuses is lost alone; the rest of the batch and the thread go on.

        Raises ServiceError.
        """
        try:
            with self.transaction() as connection:
                connection.execute(self._tables["requests"].insert(), [self._row(record) for record in batch])
            return len(batch)
        except ServiceError:
            raise
        except Exception as error:  # noqa: BLE001  (it is counted and shown)
            if len(batch) == 1:
                self._drop(1)
                self._tell(f"a record was refused: {error}")
                return 0
            half = len(batch) // 2
            return self._store(batch[:half]) + self._store(batch[half:])

    def _tell(self, fault: str) -> None:
        if fault != self._fault:
            log.warning("requests are not written: %s", fault)
        self._fault = fault

    def _drop(self, records: int) -> None:
        with self._lock:
            self._dropped += records

    def _row(self, record: Logged) -> dict[str, Any]:
        """Return a record as a row of the table, with the columns by which queries group and count.

        They are computed here, so that every database groups in the same way.
        """
        kept = (
            [(role, self._clean(content)) for role, content in record.messages] if self._config.texts else []
        )
        texts = {
            "messages": json.dumps(kept, ensure_ascii=False),
            "answer": self._clean(record.answer),
            "error": self._clean(record.error),
            "pictures": msgspec.json.encode(record.pictures).decode() if record.pictures else "",
        }
        counted = {
            "unit": record.user or record.id,
            "hour": int(record.at // 3600) * 3600,
            "empty": int(record.status == 200 and not record.answer.strip()),
        }
        return msgspec.structs.asdict(record) | texts | counted

    def _clean(self, text: str) -> str:
        """Redact a text, and replace what databases do not accept: NUL and halves of surrogate pairs.

        The result is empty where texts are not kept.
        """
        if not self._config.texts:
            return ""
        text = redact(text, REDACTED)
        for pattern in self._redact:
            text = pattern.sub(REDACTED, text)
        return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()

    def _forget_old(self) -> None:
        from sqlalchemy import or_, select

        requests, feedback = self._tables["requests"], self._tables["feedback"]
        before = time.time() - self._config.keep_days * 86_400
        old = select(requests.c.id).where(requests.c.at < before)
        if self._pictures is not None:
            self._pictures.forget(before)
        try:
            with self.transaction() as connection:
                connection.execute(
                    feedback.delete().where(or_(feedback.c.at < before, feedback.c.request.in_(old)))
                )
                connection.execute(requests.delete().where(requests.c.at < before))
        except ServiceError as error:
            self._fault = str(error)


def _compile(patterns: list[str]) -> list[re.Pattern[str]]:
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError(
                f"request_log.redact holds {pattern!r}, which is no regular expression: {error}",
                remedy="mend it in params.yaml",
            ) from None
    return found
