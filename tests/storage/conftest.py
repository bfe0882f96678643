"""A PostgreSQL of the tests' own, and an empty database for each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from postgres import connect, postgres


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with postgres() as number:
        yield number


@pytest.fixture
def database(port: int, request: pytest.FixtureRequest) -> str:
    """Return the name of an empty database of the test's own."""
    name = f"t{abs(hash(request.node.name))}"
    with connect(port) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return name
