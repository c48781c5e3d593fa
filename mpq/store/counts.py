"""What an operator watches: how many runs there are and wait, and what is kept."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from mpq.core.jobs import RunState
from mpq.store.jobs import now
from mpq.store.models import JobRow, PartialRow, RunRow
from mpq.store.records import StoreCounts


def counts(session: Session) -> StoreCounts:
    """Return the numbers of this moment."""
    at = now(session)
    found = session.execute(select(RunRow.state, func.count()).group_by(RunRow.state)).all()
    by_state = {RunState(state): number for state, number in found}
    waiting = select(func.count(), func.min(RunRow.created_at)).join(
        JobRow, JobRow.run_id == RunRow.id
    )
    queued, oldest = session.execute(
        waiting.where(RunRow.state == RunState.PENDING, JobRow.queued)
    ).one()
    driven = select(func.count()).select_from(JobRow).where(JobRow.lease_until > at)
    kept = select(func.count(), func.coalesce(func.sum(PartialRow.seconds), 0.0))
    partials, seconds = session.execute(kept).one()
    return StoreCounts(
        runs={state: by_state.get(state, 0) for state in RunState},
        queued=queued,
        driven=session.scalar(driven) or 0,
        oldest_queued_s=max((at - oldest).total_seconds(), 0.0) if oldest else 0.0,
        partials=partials,
        partial_seconds=float(seconds),
    )
