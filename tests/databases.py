"""One test, every kind of database: its address, and SQL past the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.postgres import Server


@pytest.fixture(params=["sqlite", "postgresql"])
def more(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes new, empty databases and gives their addresses: the test runs on each kind."""
    if request.param == "sqlite":
        numbers = count()
        yield lambda: f"sqlite:///{tmp_path / f'runs{next(numbers)}.db'}"
        return
    server: Server = request.getfixturevalue("postgres")
    made: list[str] = []

    def make() -> str:
        made.append(server.new_database())
        return made[-1]

    yield make
    for address in made:
        server.drop(address)


@pytest.fixture
def address(more: Callable[[], str]) -> str:
    """The address of a new, empty database: the test runs once on each kind."""
    return more()


def sql(address: str, statement: str, **values: Any) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows, if it has any."""
    engine = create_engine(address, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")
            found = connection.execute(text(statement), values)
            return [tuple(row) for row in found] if found.returns_rows else []
    finally:
        engine.dispose()
