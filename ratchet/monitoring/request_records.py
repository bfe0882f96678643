"""Define the records of the request log and the tables that keep them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ratchet.monitoring.pictures import Look
from ratchet.storage.database import connect

if TYPE_CHECKING:
    from sqlalchemy import Engine, MetaData, Table


TRIES = 10
SOMEBODY_WAS_FASTER = re.compile(r"already exists|duplicate column|duplicate key", re.IGNORECASE)


def update_tables(engine: Engine, metadata: MetaData) -> None:
    """Create missing tables and columns. Raises SQLAlchemyError when the database does not answer."""
    from sqlalchemy.exc import DatabaseError

    for tries_left in reversed(range(TRIES)):
        try:
            metadata.create_all(engine)
            for table in metadata.tables.values():
                _add_columns(engine, table)
            return
        except DatabaseError as error:
            if not tries_left or not SOMEBODY_WAS_FASTER.search(str(error.orig)):
                raise


def _add_columns(engine: Engine, table: Table) -> None:
    from sqlalchemy import inspect, text
    from sqlalchemy.schema import CreateColumn

    known = {column["name"] for column in inspect(engine).get_columns(table.name)}
    for column in [column for column in table.columns if column.name not in known]:
        with engine.begin() as connection:
            connection.execute(
                text(
                    f"ALTER TABLE {table.name} ADD COLUMN "
                    f"{CreateColumn(column).compile(dialect=engine.dialect)}"
                )
            )


class Logged(msgspec.Struct, frozen=True):
    """One request. Times are in seconds since 1970 or in milliseconds; NLL is in nats per token.

    `user` is a pseudonym, empty where the client named none.
    """

    id: str
    at: float
    user: str
    arm: str  # "champion", "challenger", or "named" where the client asked for NAME@vN
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
    pictures: tuple[Look, ...] = ()  # how the pictures and recordings of the messages are

    @property
    def prompt(self) -> str:
        """Return the last user turn."""
        return next((content for role, content in reversed(self.messages) if role == "user"), "")


class Feedback(msgspec.Struct, frozen=True):
    """One person's feedback on one answer. `score` is from 0 (wrong) to 1 (right).

    `sender` is a pseudonym of the API key with which it came, empty where no key was needed.
    """

    request: str
    user: str
    at: float
    score: float | None = None
    label: str = ""
    answer: str = ""  # the corrected answer
    comment: str = ""
    sender: str = ""


class Unit(NamedTuple):
    """A user (or a request without one) in one step of a rollout."""

    unit: str
    step: int
    arm: str
    first_at: float
    requests: int
    errors: int
    empty: int
    latency_ms: float | None  # mean over the answered requests
    feedback: float | None  # mean score
    feedbacks: int


class Traffic(NamedTuple):
    """One hour of one version; `hour` is in seconds since 1970."""

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


def make_engine(url: str) -> Engine:
    from sqlalchemy import create_engine, event, make_url

    if make_url(url).get_backend_name() != "sqlite":
        return connect(url)
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def _settle(connection: Any, _record: Any) -> None:
        # Readers do not wait for the writer. A power cut may lose the newest records, never the file.
        for line in ("busy_timeout=5000", "journal_mode=WAL", "synchronous=NORMAL"):
            connection.execute(f"PRAGMA {line}")

    return engine


def table_definitions() -> dict[str, Table]:
    """Define the tables, without a foreign key between them.

    Feedback may arrive for a request that is still queued.
    """
    from sqlalchemy import Column, Float, Integer, MetaData, String, Table, Text

    whole, real = (
        ("version", "step", "status", "prompt_tokens", "answer_tokens"),
        ("at", "latency_ms", "first_ms", "queue_ms", "prompt_nll", "answer_nll"),
    )
    kinds = (
        dict.fromkeys(whole, Integer)
        | dict.fromkeys(real, Float)
        | dict.fromkeys(("messages", "answer", "error", "pictures"), Text)
    )
    columns: list[Any] = [
        Column(
            name,
            kinds.get(name, String),
            primary_key=name == "id",
            index=name in ("at", "version", "rollout"),
        )
        for name in Logged.__struct_fields__
    ]
    said: list[Any] = [Column(name, String, primary_key=True) for name in ("request", "user")] + [
        Column("at", Float, index=True),
        Column("score", Float),
    ]
    metadata = MetaData()
    return {
        "requests": Table(
            "requests",
            metadata,
            *columns,
            Column("unit", String),
            Column("hour", Integer),
            Column("empty", Integer),
        ),
        "feedback": Table(
            "feedback",
            metadata,
            *said,
            *(Column(name, Text) for name in ("label", "answer", "comment")),
            Column("sender", String, server_default="", nullable=False),
        ),
    }


def record_of(row: Any) -> Logged:
    values = row._asdict()
    messages = tuple((role, content) for role, content in json.loads(values["messages"]))
    pictures = msgspec.json.decode(values["pictures"] or "[]", type=tuple[Look, ...])
    return Logged(**values | {"messages": messages, "pictures": pictures})
