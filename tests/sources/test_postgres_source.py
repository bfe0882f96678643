"""Rows from a real PostgreSQL: the types that people keep, its password nowhere, and nothing changed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import scaled
from postgres import PASSWORD, connect, postgres

from ratchet.config.params import Config
from ratchet.errors import DataError
from tasks.ingest import add_batch, pull

pytestmark = pytest.mark.e2e
OTHERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postgres' AND pid <> pg_backend_pid()"
ROWS = [
    (1, "Ist Hagel gedeckt? — ja", "claims", "2026-03-01T10:00:00+00:00", 12.50, {"lang": "de"}),
    (2, "日本語の質問", "other", "2026-03-02T10:00:00+00:00", None, None),
    (3, "two\nlines", None, None, 0, {}),
]


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with postgres() as port:
        with connect(port) as connection:
            connection.execute(
                "CREATE TABLE tickets"
                " (id int, body text, category text, at timestamptz, cost numeric, more jsonb)"
            )
            for row in ROWS:
                connection.execute(
                    "INSERT INTO tickets VALUES (%s, %s, %s, %s, %s, %s)",
                    (*row[:5], json.dumps(row[5]) if row[5] is not None else None),
                )
        yield port


@pytest.fixture
def url(server: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RATCHET_SQL_PASSWORD", PASSWORD)
    return f"postgresql+psycopg://ana@127.0.0.1:{server}/postgres"


def test_the_result_of_a_query_is_a_batch(url: str, tmp_path: Path) -> None:
    columns = {"prompt": "body", "completion": "category"}
    query = "SELECT * FROM tickets ORDER BY id"
    pulled = pull(Config(), root=tmp_path, path=url, query=query, columns=columns)
    rows = [json.loads(line) for line in pulled.lines]
    assert [row["prompt"] for row in rows] == [body for _, body, *_ in ROWS]
    assert [row.get("completion") for row in rows] == ["claims", "other", None]
    batch, _ = add_batch(tmp_path / "raw", pulled, licence="", who="tests")
    assert (batch.rows, batch.query, batch.source) == (3, query, "sql")
    for path in (tmp_path / "raw").rglob("*"):
        assert not path.is_file() or b"mulberry" not in path.read_bytes()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("DELETE FROM tickets", "syntax error"),
        (
            "WITH gone AS (DELETE FROM tickets RETURNING id) SELECT id FROM gone",
            "must not contain data-modifying",
        ),
        ("SELECT * FROM nowhere", "does not exist"),
        ("SELECT * FROM tickets WHERE id > 9", "gave no rows"),
    ],
)
def test_a_query_that_fails_is_told_and_changes_nothing(
    query: str, words: str, url: str, server: int, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words) as raised:
        pull(Config(), root=tmp_path, path=url, query=query)
    assert "mulberry" not in f"{raised.value} {raised.value.remedy}"
    with connect(server) as connection:
        assert connection.execute("SELECT count(*) FROM tickets").fetchone() == (3,)
        until = time.monotonic() + scaled(10)  # a closed session is gone a moment later
        while (left := connection.execute(OTHERS).fetchone()) != (0,) and time.monotonic() < until:
            time.sleep(0.05)
        assert left == (0,), "no connection is left open"


def test_a_wrong_password_is_not_told(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_SQL_PASSWORD", "mulberry-18")
    with pytest.raises(DataError, match="password authentication failed") as raised:
        pull(Config(), root=tmp_path, path=url, query="SELECT 1 AS prompt")
    assert "mulberry" not in str(raised.value)
