"""Copies of a database while it is used, and what is wrong with one."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from sqlalchemy import URL, Connection, select

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.finding import Finding
from mpq.core.jobs import RunState
from mpq.store.address import shown, sqlite_file, storage_url
from mpq.store.engine import make_engine
from mpq.store.failures import one_line_errors
from mpq.store.models import JobRow, RunRow
from mpq.store.schema import REVISIONS, check_revision, revision
from mpq.store.store import Store

_RESTORE = "restore the last 'mpq db backup', or save what can be read with 'sqlite3 FILE .recover'"
_TOLD = 5


def backup(storage: str | os.PathLike[str] | None, to: Path) -> int:
    """Copy a SQLite database to a new file while others use it, and return the bytes.

    The copy is of one moment, is checked, and is there whole or not at all. Raises
    InvalidInputError for a file that exists, StorageError for a database of another kind
    (`storage_backup`), none, or a damaged one.
    """
    url = storage_url(storage)
    path = sqlite_file(url)
    if path is None:
        raise StorageError(
            "storage_backup",
            f"{shown(url)} is no SQLite file: copy it with 'pg_dump --format=custom "
            f"--file={to} --dbname={shown(_plain(url))}'",
        )
    if not path.is_file():
        raise StorageError("storage_path", f"there is no database {path}: nothing to copy")
    if to.exists() or not to.parent.is_dir():
        why = "it exists" if to.exists() else f"there is no folder {to.parent}"
        raise InvalidInputError("backup_file", f"cannot copy to {to}: {why}; name a new file")
    unfinished = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        with closing(_opened(path)) as source, closing(sqlite3.connect(unfinished)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
            (found,) = copy.execute("PRAGMA integrity_check").fetchone()
        if found != "ok":
            raise StorageError("storage_corrupt", f"{path} is damaged ({found}): {_RESTORE}")
        os.replace(unfinished, to)
    except (sqlite3.Error, OSError) as error:
        raise StorageError("storage_backup", f"cannot copy {path} to {to}: {error}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return to.stat().st_size


def check_database(storage: str | os.PathLike[str] | None) -> list[Finding]:
    """Return what is right and wrong with a database; changes nothing, makes none.

    Raises StorageError where it cannot be reached at all.
    """
    url = storage_url(storage)
    path = sqlite_file(url)
    if path is not None and not path.is_file():
        raise StorageError(
            "storage_path", f"there is no database {path}: the first run makes it, or name another"
        )
    found = []
    with one_line_errors(url):
        engine = make_engine(url)
        try:
            with engine.connect() as connection:
                if path is not None:
                    found += _sqlite_findings(connection)
                schema = _schema_finding(url, connection)
                found.append(schema)
        finally:
            engine.dispose()
        if schema.state == "ok" and schema.found != "empty":
            with Store(make_engine(url)) as store:
                found += [_undriven(store), _damaged(store)]
    return found


def _sqlite_findings(connection: Connection) -> list[Finding]:
    lines = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
    said = "; ".join(str(line) for line in lines[:_TOLD])
    is_whole = list(lines) == ["ok"]
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    tables = sorted({str(row[0]) for row in broken})
    return [
        Finding("integrity", "ok", "every page is whole")
        if is_whole
        else Finding("integrity", "fail", said, _RESTORE),
        Finding("references", "ok", "no row belongs to a run that is gone")
        if not broken
        else Finding(
            "references",
            "fail",
            f"{len(broken)} rows of {', '.join(tables)} belong to runs that are gone",
            "delete them, or restore the last backup: another program wrote to this database",
        ),
    ]


def _schema_finding(url: URL, connection: Connection) -> Finding:
    try:
        found = revision(connection)
        if found is None:
            return Finding("schema", "ok", "empty", "the first run makes its tables")
        check_revision(url, found)
    except StorageError as error:
        said, _, fix = str(error).partition(": ")
        return Finding("schema", "fail", said, fix)
    return Finding("schema", "ok", f"version {REVISIONS[-1]}")


def _undriven(store: Store) -> Finding:
    from mpq.store import jobs

    with store._read() as session:
        driven = select(JobRow.run_id).where(JobRow.lease_until > jobs.now(session))
        left = session.scalars(
            select(RunRow.id).where(
                RunRow.state == RunState.RUNNING.value, RunRow.id.not_in(driven)
            )
        ).all()
    if not left:
        return Finding("drivers", "ok", "every running run has a driver")
    some = ", ".join(left[:_TOLD]) + (", ..." if len(left) > _TOLD else "")
    return Finding(
        "drivers",
        "warn",
        f"{len(left)} runs are RUNNING without a driver: {some}",
        "go on with 'mpq resume RUN' or 'mpq drive', or end them with 'mpq stop RUN'",
    )


def _damaged(store: Store) -> Finding:
    from mpq.store import artifacts

    with store._read() as session:
        broken = list(artifacts.damaged(session))
    if not broken:
        return Finding("artifacts", "ok", "every object of a job is what its digest says")
    said = "; ".join(broken[:_TOLD])
    fix = "restore the last backup, or delete the runs that need them, 'mpq gc', and submit again"
    return Finding("artifacts", "fail", said, fix)


def _plain(url: URL) -> URL:
    kept = url.set(drivername="postgresql")  # as pg_dump reads it, which asks for the password
    return URL.create(**{**kept._asdict(), "password": None})


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)
