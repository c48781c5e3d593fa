"""Submissions and leases: who wants a run, and who drives it until when.

Every moment is read from the clock of the database, so that the clocks of machines do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.core.live import LIVE
from mpq.store import events, runs
from mpq.store.models import JobRow, RunRow, TagRow
from mpq.store.patience import again
from mpq.store.records import JobRecord


def now(session: Session) -> datetime:
    """Return the time of the database."""
    if session.get_bind().dialect.name == "sqlite":
        text = session.scalar(select(func.strftime("%Y-%m-%dT%H:%M:%f", "now")))
        return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)
    found = session.scalar(select(func.clock_timestamp()))
    assert isinstance(found, datetime)
    return found.astimezone(UTC)


def submit(
    session: Session,
    spec: JobSpec,
    device: str,
    mpq_version: str,
    *,
    body: str,
    submission_id: str | None,
    owner: str,
    priority: int,
    tags: Sequence[str],
    queued: bool,
) -> tuple[str, bool]:
    """Add a pending run and return its id, or that of the same submission, and whether it is new.

    Raises InvalidInputError (`submission_conflict`) for another job under a known submission id.
    """
    if submission_id is not None:
        _alone(session, submission_id)
        known = session.execute(
            select(JobRow.run_id, JobRow.body).where(JobRow.submission_id == submission_id)
        ).one_or_none()
        if known is not None and known.body != body:
            raise InvalidInputError(
                "submission_conflict",
                f"submission {submission_id!r} is run {known.run_id}, which is another job: give "
                "this one a submission id of its own",
            )
        if known is not None:
            return known.run_id, False
    run_id = runs.create(session, spec, device, mpq_version)
    if again() and session.get(JobRow, run_id) is not None:
        return run_id, True  # it was kept, and the answer got lost
    session.execute(
        insert(JobRow).values(
            run_id=run_id,
            submission_id=submission_id,
            body=body,
            owner=owner,
            priority=priority,
            queued=queued,
            stop_requested=False,
            attempts=0,
        )
    )
    for tag in dict.fromkeys(tags):
        session.execute(insert(TagRow).values(run_id=run_id, tag=tag))
    return run_id, True


def _alone(session: Session, submission_id: str) -> None:
    """Let others who submit the same wait; SQLite's write lock does that already."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(submission_id))))


def one(session: Session, run_id: str) -> JobRecord:
    """Return who drives a run and who wanted it."""
    runs.require(session, run_id)
    row = session.scalar(select(JobRow).where(JobRow.run_id == run_id))
    tags = session.scalars(select(TagRow.tag).where(TagRow.run_id == run_id).order_by(TagRow.tag))
    if row is None:  # of before there were leases
        return JobRecord(run_id=run_id, tags=tuple(tags))
    return JobRecord(
        run_id=run_id,
        submission_id=row.submission_id,
        owner=row.owner,
        priority=row.priority,
        driver=row.driver,
        driven_since=row.driven_since,
        stop_requested=row.stop_requested,
        attempts=row.attempts,
        is_driven=row.lease_until is not None and row.lease_until > now(session),
        tags=tuple(tags),
    )


def take(
    session: Session, run_id: str, driver: str, seconds: float, instead_of: str | None = None
) -> None:
    """Let a driver drive a run for some seconds; its own lease, or `instead_of`'s, is taken anew.

    A run that was stopped or has failed is pending again. Raises StorageError (`run_driven`) where
    another one drives it, InvalidInputError where it is over for good, or was stopped while the
    driver was on its way.
    """
    state = _unfinished(session, run_id)
    if state == RunState.STOPPED and instead_of is not None:
        raise InvalidInputError("run_state", f"run {run_id} was stopped before its driver began")
    row = _lease(session, run_id)
    at = now(session)
    is_held = row.lease_until is not None and row.lease_until > at
    if is_held and row.driver not in (driver, instead_of):
        raise _driven(run_id, row.driver, row.driven_since)
    if row.driver is not None and state == RunState.RUNNING:
        events.put(session, run_id, "driver", f"taken over from {row.driver}, whose lease ended")
    is_same = instead_of is not None and row.driver == instead_of
    changed = {} if is_same else {"stop_requested": False, "attempts": JobRow.attempts + 1}
    session.execute(
        update(JobRow)
        .where(JobRow.run_id == run_id)
        .values(
            driver=driver,
            driven_since=at,
            lease_until=at + timedelta(seconds=seconds),
            **changed,
        )
    )
    if state in (RunState.STOPPED, RunState.FAILED):
        runs.set_state(session, run_id, RunState.PENDING, None)


def _unfinished(session: Session, run_id: str) -> RunState:
    """Return the state of a run, which nobody else changes meanwhile, unless it has succeeded."""
    state = session.scalar(select(RunRow.state).where(RunRow.id == run_id).with_for_update())
    if state is None:
        raise runs.unknown_run(session, run_id)
    if state == RunState.SUCCEEDED:
        raise InvalidInputError("run_state", f"run {run_id} has succeeded: there is nothing to do")
    return RunState(state)


def _lease(session: Session, run_id: str) -> Row[str | None, datetime | None, datetime | None]:
    """Return who drives a run, since when and until when; made where there is none yet."""
    query = select(JobRow.driver, JobRow.driven_since, JobRow.lease_until).where(
        JobRow.run_id == run_id
    )
    row = session.execute(query).one_or_none()
    if row is not None:
        return row
    unowned = {"body": "", "owner": "", "priority": 0, "queued": False}  # of before leases
    values = {"run_id": run_id, **unowned, "stop_requested": False, "attempts": 0}
    session.execute(insert(JobRow).values(values))
    return session.execute(query).one()


def _driven(run_id: str, driver: str | None, since: datetime | None) -> StorageError:
    return StorageError(
        "run_driven",
        f"run {run_id} is being driven by {driver} since {since:%Y-%m-%d %H:%M:%S} UTC: wait, or "
        "stop it",
    )


def take_next(
    session: Session, driver: str, seconds: float, per_owner: int | None = None
) -> str | None:
    """Take the queued run that is next, None where there is none.

    The highest priority comes first, then the owner who has the fewest runs driven, then the
    oldest. An owner has at most `per_owner` driven at once. A run whose driver went away comes
    again.
    """
    at = now(session)
    counted = select(JobRow.owner, func.count().label("runs")).where(JobRow.lease_until > at)
    rows = session.execute(counted.group_by(JobRow.owner)).all()
    driven: dict[str, int] = {row.owner: row.runs for row in rows}
    waiting = session.execute(
        select(JobRow.run_id, JobRow.owner, JobRow.priority)
        .join(RunRow, RunRow.id == JobRow.run_id)
        .where(_waits(at))
        .order_by(RunRow.created_at, RunRow.id)
        .with_for_update(of=JobRow, skip_locked=True)
    ).all()
    free = [row for row in waiting if per_owner is None or driven.get(row.owner, 0) < per_owner]
    if not free:
        return None
    chosen = min(free, key=lambda row: (-row.priority, driven.get(row.owner, 0)))  # then the oldest
    take(session, chosen.run_id, driver, seconds)
    return str(chosen.run_id)


def _waits(at: datetime) -> ColumnElement[bool]:
    is_free = or_(JobRow.lease_until.is_(None), JobRow.lease_until < at)
    left = and_(RunRow.state == RunState.RUNNING, JobRow.driver.is_not(None))
    pending = and_(RunRow.state == RunState.PENDING, JobRow.queued)
    return and_(is_free, or_(pending, left), ~RunRow.model.startswith(LIVE, autoescape=True))


def queue(session: Session, run_id: str) -> None:
    """Let a run wait for whichever driver is next; a stopped or failed one is pending again.

    Raises StorageError (`run_driven`) where a driver has it, InvalidInputError where it is over.
    """
    state = _unfinished(session, run_id)
    row = _lease(session, run_id)
    if row.lease_until is not None and row.lease_until > now(session):
        raise _driven(run_id, row.driver, row.driven_since)
    values = {"queued": True, "stop_requested": False}
    session.execute(update(JobRow).where(JobRow.run_id == run_id).values(values))
    if state in (RunState.STOPPED, RunState.FAILED):
        runs.set_state(session, run_id, RunState.PENDING, None)


def set_tags(session: Session, run_id: str, tags: Sequence[str]) -> None:
    """Give a run these tags in place of those it has."""
    session.execute(delete(TagRow).where(TagRow.run_id == run_id))
    for tag in dict.fromkeys(tags):
        session.execute(insert(TagRow).values(run_id=run_id, tag=tag))


def renew(session: Session, run_id: str, driver: str, seconds: float) -> bool:
    """Make a lease longer and return whether the run was asked to stop.

    Raises StorageError (`lease_lost`) where another driver has the run.
    """
    row = session.execute(
        select(JobRow.driver, JobRow.stop_requested)
        .where(JobRow.run_id == run_id)
        .with_for_update()
    ).one_or_none()
    if row is None or row.driver != driver:
        other = "nobody" if row is None else row.driver
        raise StorageError("lease_lost", f"run {run_id} is now driven by {other}")
    until = now(session) + timedelta(seconds=seconds)
    session.execute(update(JobRow).where(JobRow.run_id == run_id).values(lease_until=until))
    return bool(row.stop_requested)


def release(session: Session, run_id: str, driver: str) -> None:
    """End a lease; nothing happens where another driver has the run."""
    session.execute(
        update(JobRow)
        .where(JobRow.run_id == run_id, JobRow.driver == driver)
        .values(lease_until=None)
    )


def request_stop(session: Session, run_id: str) -> RunState:
    """Ask the driver of a run to stop; a run that nobody drives is stopped at once.

    Returns the state of the run, which changes later where somebody drives it.
    """
    found = session.scalar(select(RunRow.state).where(RunRow.id == run_id).with_for_update())
    if found is None:
        raise runs.unknown_run(session, run_id)
    state = RunState(found)
    if state in ENDED:
        return state
    until = session.scalar(select(JobRow.lease_until).where(JobRow.run_id == run_id))
    if until is None or until <= now(session):
        runs.set_state(session, run_id, RunState.STOPPED, None)
        return RunState.STOPPED
    session.execute(update(JobRow).where(JobRow.run_id == run_id).values(stop_requested=True))
    return state
