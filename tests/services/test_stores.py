"""Users and databases of the services, made on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres import connect, postgres

from ratchet.errors import ConfigError
from ratchet.services.stores import main, make_database, read_password


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with postgres() as port:
        yield port


def enter(port: int, user: str, password: str, database: str) -> Any:
    import psycopg

    return psycopg.connect(host="127.0.0.1", port=port, user=user, password=password, dbname=database)


def test_a_service_gets_a_database_that_no_other_service_may_enter(port: int) -> None:
    import psycopg

    with connect(port) as server:
        make_database(server, "mlflow", "o'ne")
        make_database(server, "prefect", "two")

    with enter(port, "mlflow", "o'ne", "mlflow") as mlflow:
        mlflow.execute("CREATE TABLE runs (id int)")
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        enter(port, "prefect", "two", "mlflow")


def test_making_it_again_keeps_the_rows_and_changes_the_password(port: int) -> None:
    import psycopg

    with connect(port) as server:
        make_database(server, "requests", "old")
    with enter(port, "requests", "old", "requests") as before:
        before.execute("CREATE TABLE kept (id int)")
    with connect(port) as server:
        make_database(server, "requests", "new")

    with enter(port, "requests", "new", "requests") as after:
        assert after.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        enter(port, "requests", "old", "requests")


@pytest.mark.parametrize("text", [None, "a password alone", "*:*:*:mlflow:"])
def test_a_file_without_a_password_is_told_before_anything_is_made(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "mlflow_pgpass").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match="mlflow_pgpass") as told:
        main(["--databases", "mlflow", "--secrets", str(tmp_path)])
    assert "docker/make-secrets" in told.value.remedy


def test_a_password_is_the_last_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("*:*:*:mlflow:secret\n", encoding="utf-8")

    assert read_password(tmp_path / "file") == "secret"
