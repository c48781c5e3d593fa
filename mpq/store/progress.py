"""How far the stages of a run are."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from mpq.store.models import ProgressRow
from mpq.store.records import StageRecord


def put(session: Session, run_id: str, stage: str, done: int, total: int) -> None:
    """Keep how far a stage is; a new one comes after all others."""
    at = datetime.now(UTC)
    here = (ProgressRow.run_id == run_id, ProgressRow.stage == stage)
    changed = session.execute(
        update(ProgressRow).where(*here).values(done=done, total=total, at=at)
    )
    if changed.rowcount:  # type: ignore[attr-defined]
        return
    last = select(func.coalesce(func.max(ProgressRow.position), 0)).where(
        ProgressRow.run_id == run_id
    )
    position = (session.scalar(last) or 0) + 1
    values = {"run_id": run_id, "stage": stage, "done": done, "total": total, "at": at}
    session.execute(insert(ProgressRow).values(**values, position=position))


def clear(session: Session, run_id: str) -> None:
    """Forget the stages of an earlier attempt."""
    session.execute(delete(ProgressRow).where(ProgressRow.run_id == run_id))


def get(session: Session, run_id: str) -> list[StageRecord]:
    """Return the stages in the order in which they began."""
    rows = session.execute(
        select(ProgressRow.stage, ProgressRow.done, ProgressRow.total, ProgressRow.at)
        .where(ProgressRow.run_id == run_id)
        .order_by(ProgressRow.position)
    ).mappings()
    return [StageRecord(**row) for row in rows]
