"""The server of the tests themselves: where there is none, nobody takes that for a success."""

from __future__ import annotations

import pytest
from sqlalchemy import make_url

from tests import postgres as server
from tests.postgres import Server


def test_without_a_server_tests_are_skipped_but_not_where_ci_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "programs", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL server here"):
        next(server.serve())
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no PostgreSQL server here"):
        next(server.serve())


def test_databases_are_new_and_sort_text_as_people_do(postgres: Server) -> None:
    """Else the tests would not see an order that depends on the server's language."""
    first, second = postgres.new_database(), postgres.new_database()
    assert first != second
    name = make_url(first).database or ""
    query = "SELECT x FROM (VALUES ('B'), ('a'), ('C')) AS t(x) ORDER BY x"
    assert postgres.sql(query, name) == [("a",), ("B",), ("C",)]
    for address in (first, second):
        postgres.drop(address)
