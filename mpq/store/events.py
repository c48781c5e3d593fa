"""The log of a run."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from mpq.store.models import EventRow
from mpq.store.patience import again, once
from mpq.store.records import EventRecord


def put(session: Session, run_id: str, kind: str, message: str) -> None:
    """Add a line."""
    at = once("at", lambda: datetime.now(UTC))
    values = {"run_id": run_id, "at": at, "kind": kind, "message": message}
    if again() and session.scalar(select(EventRow.id).filter_by(**values).limit(1)) is not None:
        return
    session.execute(insert(EventRow).values(values))


def get(session: Session, run_id: str, after: int, limit: int | None = None) -> list[EventRecord]:
    """Return the lines whose number is larger than `after`, oldest first."""
    rows = session.execute(
        select(EventRow.id, EventRow.at, EventRow.kind, EventRow.message)
        .where(EventRow.run_id == run_id, EventRow.id > after)
        .order_by(EventRow.id)
        .limit(limit)
    ).mappings()
    return [EventRecord(**row) for row in rows]


def last(session: Session, run_id: str, number: int) -> list[EventRecord]:
    """Return the last lines, oldest first."""
    rows = session.execute(
        select(EventRow.id, EventRow.at, EventRow.kind, EventRow.message)
        .where(EventRow.run_id == run_id)
        .order_by(EventRow.id.desc())
        .limit(number)
    ).mappings()
    return [EventRecord(**row) for row in rows][::-1]
