"""Which version of the tables a database has, and the tables of a new one."""

from __future__ import annotations

import shlex
import sqlite3
import time
from pathlib import Path

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    inspect,
    select,
)
from sqlalchemy.exc import OperationalError

from mpq.core.errors import StorageError
from mpq.store.address import shown, sqlite_file
from mpq.store.engine import writing
from mpq.store.filesystem import is_network
from mpq.store.models import Base

# Oldest first; a test compares them with the files in migrations/versions. Kept here because
# importing alembic takes longer than everything else that opens a database.
REVISIONS = (
    "0001_first_tables",
    "0002_frontiers",
    "0003_joint_costs",
    "0004_jobs",
    "0005_partial_use",
    "0006_api_tokens",
    "0007_artifacts",
    "0008_data",
)

_LOCK = 0x6D7071  # PostgreSQL: whoever holds it creates or migrates
_WAL_TRIES_S = 30.0
_VERSION = Table(  # as alembic makes it
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


def prepare(engine: Engine) -> None:
    """Create the tables of an empty database, or check that those of another one are current.

    Any number of processes may do this at once. Raises StorageError (`storage_schema`) for a
    database of an older or newer version or of another program, which is left untouched.
    """
    with engine.connect() as connection:
        found = revision(connection)
    if found is None:
        with writing(engine).begin() as connection:
            lock(connection)
            found = revision(connection)
            if found is None:
                _create(connection)
                found = REVISIONS[-1]
    check_revision(engine.url, found)
    path = sqlite_file(engine.url)
    if path is not None:
        _use_wal(engine, path)


def revision(connection: Connection) -> str | None:
    """Return the version of the database's tables, None where it has no table at all.

    Raises StorageError (`storage_schema`) where the tables are not those of mpq.
    """
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    if _VERSION.name in tables:
        found = connection.scalars(select(_VERSION.c.version_num)).all()
        if len(found) == 1 and {"runs", "partials"} <= tables:
            return str(found[0])
    url = shown(connection.engine.url)
    some = ", ".join(sorted(tables)[:3])
    raise StorageError(
        "storage_schema",
        f"{url} belongs to another program (it has tables {some}): give a new database",
    )


def check_revision(url: URL, found: str, *, upgradable: bool = False) -> None:
    """Raise StorageError (`storage_schema`) unless the tables are current.

    `upgradable` also lets an older known version pass.
    """
    head = REVISIONS[-1]
    if found == head or (upgradable and found in REVISIONS):
        return
    place = shown(url)
    if found in REVISIONS:
        raise StorageError(
            "storage_schema",
            f"{place} has tables of version {found!r}, this mpq needs {head!r}: back it up, then "
            f"run: mpq db upgrade --storage {shlex.quote(place)}",
        )
    raise StorageError(
        "storage_schema",
        f"{place} has tables of version {found!r}, which this mpq does not know (it knows "
        f"{head!r} and before): upgrade mpq, or give another database",
    )


def lock(connection: Connection) -> None:
    """Wait until no other process creates or migrates; SQLite's write lock does that already."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")


def _create(connection: Connection) -> None:
    Base.metadata.create_all(connection)
    _VERSION.create(connection)
    connection.execute(_VERSION.insert().values(version_num=REVISIONS[-1]))


def _use_wal(engine: Engine, path: Path) -> None:
    # Readers do not wait for the writer. The switch is kept in the file; while another process
    # switches or reads, it fails at once whatever the busy timeout, hence the tries.
    if is_network(path):
        return  # WAL needs memory that all its users share, so it loses data between machines
    deadline = time.monotonic() + _WAL_TRIES_S
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        while cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            try:
                cursor.execute("PRAGMA journal_mode=WAL").fetchone()
            except sqlite3.OperationalError as error:
                if time.monotonic() > deadline:
                    raise OperationalError("PRAGMA journal_mode=WAL", None, error) from error
                time.sleep(0.01)
    finally:
        connection.close()
