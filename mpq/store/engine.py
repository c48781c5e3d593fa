"""Connections that behave: transactions that are whole, writers that wait for each other."""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from mpq.store.address import check_file, sqlite_file

_BUSY_S = 30.0
_STATEMENT_S = 60.0
_WRITING = {"mpq_writes": True}
# What several statements read belongs together; SQLite reads so by itself.
_READING = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


def make_engine(url: URL, *, migrates: bool = False) -> Engine:
    """Return an engine for the database, without connecting.

    SQLite: the driver's own transaction handling, which commits behind one's back, is off;
    each transaction begins here, those of `writing` at once with the write lock, so that two
    writers queue (for 30 s) instead of failing half-way. PostgreSQL: dead connections are noticed
    before they are used, and neither a lock (30 s) nor a statement (60 s) nor a forgotten
    transaction (60 s) is waited for without end. One that `migrates` rebuilds tables, hence
    without foreign keys, and takes as long as it takes.
    """
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_pre_ping=True, connect_args=_connecting(url, migrates))
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
        connection.execute(f"PRAGMA foreign_keys={'OFF' if migrates else 'ON'}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("mpq_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def writing(engine: Engine) -> Engine:
    """Return the same engine, whose transactions hold the write lock from their start."""
    return engine.execution_options(**_WRITING)


def reading(engine: Engine) -> Engine:
    """Return the same engine, whose transactions see one state of the database and change none."""
    return engine if engine.dialect.name == "sqlite" else engine.execution_options(**_READING)


def _connecting(url: URL, migrates: bool) -> dict[str, Any]:
    """Return the arguments of libpq; those of the URL go before them."""
    limits_s = {
        "statement_timeout": _STATEMENT_S,
        "lock_timeout": _BUSY_S,
        "idle_in_transaction_session_timeout": _STATEMENT_S,
    }
    settings = [f"-c {name}={limit_s * 1000:.0f}" for name, limit_s in limits_s.items()]
    own = url.query.get("options", "")
    options = " ".join([*([] if migrates else settings), own if isinstance(own, str) else ""])
    arguments: dict[str, Any] = {
        "connect_timeout": 10,
        "client_encoding": "utf8",
        "keepalives_idle": 30,  # seconds; a machine that vanished sends no farewell
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,  # milliseconds
    }
    kept = {name: value for name, value in arguments.items() if name not in url.query}
    return {**kept, "options": options}
