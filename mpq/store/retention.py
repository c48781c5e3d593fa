"""What may go: runs that ended long ago, and task results and artifacts that no run needs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from sqlalchemy import ColumnElement, LargeBinary, cast, delete, func, select
from sqlalchemy.orm import Session

from mpq.core.errors import InvalidInputError
from mpq.core.jobs import ENDED
from mpq.store import artifacts, jobs
from mpq.store.address import sqlite_file
from mpq.store.failures import one_line_errors
from mpq.store.models import (
    AllocationRow,
    Base,
    JobRow,
    PartialRow,
    RunRow,
    SolutionRow,
    TagRow,
)
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What went, or would go: run ids, how many results of tasks and artifacts, their bytes.

    Bytes are those of the stored values, without what the database needs around them: about
    what its file has free afterwards. `file_bytes` is the file with its log, before and after
    (SQLite; None elsewhere, and in a dry run).
    """

    runs: tuple[str, ...]
    run_bytes: int
    partials: int
    partial_bytes: int
    artifacts: int
    artifact_bytes: int
    file_bytes: tuple[int, int] | None = None


def collect(
    store: Store,
    older_than: timedelta,
    *,
    keep_tagged: bool = False,
    dry_run: bool = False,
    vacuum: bool = False,
) -> Removed:
    """Remove runs that ended longer ago than that, and what no run needed since then.

    What is pending, running or driven stays, and with `keep_tagged` what has a tag. A partial
    has the key of its content and names no run, so it is kept or not by when a run last made or
    took it; taking one out loses no answer, only the time to compute it again. An artifact stays as
    long as a run names it. `vacuum` gives
    the space of a SQLite file back to the disk, which needs as much free. Times are those of the
    database's clock. Raises InvalidInputError (`span`) for a negative span.
    """
    if older_than < timedelta(0):
        raise InvalidInputError("span", f"older_than is not negative, got {older_than}")
    path = sqlite_file(store.url)
    before = _file_bytes(path) if path else None
    with store._read() if dry_run else store._write() as session:
        cutoff = jobs.now(session) - older_than
        gone = _gone(session, cutoff, keep_tagged)
        ids = list(session.scalars(select(RunRow.id).where(*gone)))
        unused = func.coalesce(PartialRow.used_at, PartialRow.created_at) < cutoff
        size = func.coalesce(func.sum(func.length(PartialRow.arrays)), 0)
        count, partial_bytes = session.execute(
            select(func.count(), size).select_from(PartialRow).where(unused)
        ).one()
        run_bytes = sum(_bytes(session, run_id) for run_id in ids)
        if not dry_run:  # each looked at again: a run may have been resumed meanwhile
            going = [delete(RunRow).where(RunRow.id == run_id, *gone) for run_id in ids]
            ids = [i for one in going for i in session.scalars(one.returning(RunRow.id))]
            session.execute(delete(PartialRow).where(unused))
        free = artifacts.unneeded(session, cutoff, without=ids if dry_run else (), lock=not dry_run)
        if not dry_run:
            free = {digest: free[digest] for digest in artifacts.remove(session, list(free))}
    after = None
    if path and before is not None and not dry_run:
        if vacuum:
            _vacuum(store)
        after = _file_bytes(path)
    return Removed(
        runs=tuple(ids),
        run_bytes=run_bytes,
        partials=int(count),
        partial_bytes=int(partial_bytes),
        artifacts=len(free),
        artifact_bytes=sum(free.values()),
        file_bytes=None if before is None or after is None else (before, after),
    )


def _file_bytes(path: Path) -> int:
    parts = (path, path.with_name(f"{path.name}-wal"))  # what was written last is beside it
    return sum(part.stat().st_size for part in parts if part.exists())


def _vacuum(store: Store) -> None:
    with one_line_errors(store.url):
        raw = store._engine.raw_connection()  # no transaction, in which VACUUM cannot run
        try:
            raw.cursor().execute("VACUUM")
            raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            raw.close()


def _gone(session: Session, cutoff: datetime, keep_tagged: bool) -> list[ColumnElement[bool]]:
    driven = select(JobRow.run_id).where(JobRow.lease_until > jobs.now(session))
    found = [
        RunRow.state.in_([state.value for state in ENDED]),
        RunRow.ended_at < cutoff,
        RunRow.id.not_in(driven),
    ]
    if keep_tagged:
        found.append(RunRow.id.not_in(select(TagRow.run_id)))
    return found


def _bytes(session: Session, run_id: str) -> int:
    """Return the bytes of all values that belong to a run."""
    total = 0
    for table in Base.metadata.tables.values():
        if table.name == RunRow.__tablename__:
            mine: ColumnElement[bool] = table.c.id == run_id
        elif table.name == AllocationRow.__tablename__:
            of_run = select(SolutionRow.id).where(SolutionRow.run_id == run_id)
            mine = table.c.solution_id.in_(of_run)
        elif "run_id" in table.c:
            mine = table.c.run_id == run_id
        else:
            continue
        if session.get_bind().dialect.name == "postgresql":
            sizes = [func.pg_column_size(column) for column in table.c]
        else:
            sizes = [func.length(cast(column, LargeBinary)) for column in table.c]
        row = sum((func.coalesce(size, 0) for size in sizes[1:]), func.coalesce(sizes[0], 0))
        query = select(func.coalesce(func.sum(row), 0)).select_from(table).where(mine)
        total += int(session.scalar(query) or 0)
    return total
