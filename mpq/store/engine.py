"""Connections that behave: transactions that are whole, writers that wait for each other."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from mpq.store.address import check_file, sqlite_file

_BUSY_S = 30.0
_WRITING = {"mpq_writes": True}


def make_engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    """Return an engine for the database, without connecting.

    SQLite: the driver's own transaction handling, which commits behind one's back, is off;
    each transaction begins here, those of `writing` at once with the write lock, so that two
    writers queue (for 30 s) instead of failing half-way. Migrations that rebuild a table need
    `foreign_keys` off. PostgreSQL: dead connections are noticed before they are used.
    """
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": 10})
    path = sqlite_file(url)
    if path is not None:
        check_file(path)
    memory = url.database in (None, "", ":memory:")
    options: dict[str, Any] = {"poolclass": StaticPool} if memory else {}
    arguments: dict[str, Any] = {"timeout": _BUSY_S, "check_same_thread": False}
    engine = create_engine(url, connect_args=arguments, **options)

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("mpq_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def writing(engine: Engine) -> Engine:
    """Return the same engine, whose transactions hold the write lock from their start."""
    return engine.execution_options(**_WRITING)
