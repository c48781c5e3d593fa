"""Runs: their life, and how they are found."""

from __future__ import annotations

import difflib
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, insert, select, true, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from mpq.core.errors import InvalidInputError, MpqError
from mpq.core.jobs import ENDED, JobSpec, RunState, check_transition
from mpq.store import artifacts
from mpq.store.models import RunRow
from mpq.store.patience import again, once
from mpq.store.records import RunRecord

_ID_LENGTH = 12
_FIELDS = (
    RunRow.id,
    RunRow.name,
    RunRow.spec,
    RunRow.state,
    RunRow.device,
    RunRow.mpq_version,
    RunRow.created_at,
    RunRow.started_at,
    RunRow.ended_at,
    RunRow.error_code,
    RunRow.error_message,
    RunRow.calibration_data,
    RunRow.held_out_data,
)
_NEWEST = (RunRow.created_at.desc(), RunRow.id)


def create(session: Session, spec: JobSpec, device: str, mpq_version: str) -> str:
    """Add a pending run and return its id."""
    run_id = once("run", lambda: uuid.uuid4().hex[:_ID_LENGTH])
    if again() and session.get(RunRow, run_id) is not None:
        return run_id
    session.execute(
        insert(RunRow).values(
            id=run_id,
            name=spec.name,
            model=spec.model,
            metric=spec.metric,
            device=device,
            mpq_version=mpq_version,
            state=RunState.PENDING.value,
            created_at=datetime.now(UTC),
            spec=spec,
        )
    )
    artifacts.need(session, run_id, spec)
    return run_id


def set_state(session: Session, run_id: str, state: RunState, error: MpqError | None) -> None:
    """Move a run to a state it may go to."""
    found = session.execute(
        select(RunRow.state, RunRow.started_at).where(RunRow.id == run_id).with_for_update()
    ).one_or_none()
    if found is None:
        raise unknown_run(session, run_id)
    if again() and found.state == state.value:
        return
    check_transition(RunState(found.state), state)
    now = datetime.now(UTC)
    values: dict[str, Any] = {
        "state": state.value,
        "ended_at": now if state in ENDED else None,
        "error_code": error.code if error else None,
        "error_message": str(error) if error else None,
    }
    if state is RunState.RUNNING and found.started_at is None:
        values["started_at"] = now
    session.execute(update(RunRow).where(RunRow.id == run_id).values(values))


def start(session: Session, run_id: str, device: str) -> None:
    """Let a run run on a device; one that runs already was left by its driver and goes on."""
    session.execute(update(RunRow).where(RunRow.id == run_id).values(device=device))
    state = session.scalar(select(RunRow.state).where(RunRow.id == run_id))
    if state != RunState.RUNNING:
        set_state(session, run_id, RunState.RUNNING, None)


def put_data(session: Session, run_id: str, calibration: str, held_out: str | None) -> None:
    """Keep which batches a run is searched on and, unless None, judged on."""
    values = {"calibration_data": calibration}
    if held_out is not None:
        values["held_out_data"] = held_out
    session.execute(update(RunRow).where(RunRow.id == run_id).values(values))


def delete(session: Session, run_id: str) -> None:
    """Take a run and all that belongs to it out of the database."""
    session.execute(sql_delete(RunRow).where(RunRow.id == run_id))


def one(session: Session, run_id: str) -> RunRecord:
    """Return a run."""
    found = records(session, [RunRow.id == run_id], 1)
    if not found:
        raise unknown_run(session, run_id)
    return found[0]


def records(
    session: Session, wanted: Sequence[ColumnElement[bool]], limit: int | None
) -> list[RunRecord]:
    """Return the newest runs that meet all conditions."""
    query = select(*_FIELDS, RunRow.graph.is_not(None).label("has_graph")).where(*wanted)
    rows = session.execute(query.order_by(*_NEWEST).limit(limit)).mappings()
    return [
        RunRecord(
            **{
                **row,
                "state": RunState(row["state"]),
                "calibration_data": row["calibration_data"] or "",
                "held_out_data": row["held_out_data"] or "",
            }
        )
        for row in rows
    ]


def resolve(session: Session, text: str, state: RunState | None = None) -> str:
    """Return the id that an id, "latest", the name of a run or the start of an id stands for.

    Of several runs with the name it is the newest; names and "latest" stand for runs in `state`
    where there is one. Raises InvalidInputError (`unknown_run`, `ambiguous_run`).
    """
    newest_first = select(RunRow.id).order_by(*_NEWEST)
    named = true() if text == "latest" else RunRow.name == text
    exact = [RunRow.id == text, *([named & (RunRow.state == state)] if state else []), named]
    for wanted in exact if text else ():
        found = session.scalars(newest_first.where(wanted).limit(1)).first()
        if found is not None:
            return found
    starting = RunRow.id.startswith(text.lower(), autoescape=True)
    several = session.scalars(newest_first.where(starting).limit(4)).all() if text else []
    if len(several) > 1:
        raise InvalidInputError(
            "ambiguous_run", f"run {text!r} can be {', '.join(several)}: write more of its id"
        )
    if not several:
        raise unknown_run(session, text)
    return several[0]


def require(session: Session, run_id: str, *, lock: bool = False) -> None:
    """Raise InvalidInputError (`unknown_run`) where there is no such run.

    With `lock` other writers of the run wait until this transaction ends: what one replaces, no
    other puts meanwhile, and the numbers of its log become visible in their order.
    """
    query = select(RunRow.id).where(RunRow.id == run_id)
    if session.scalar(query.with_for_update(key_share=True) if lock else query) is None:
        raise unknown_run(session, run_id)


def unknown_run(session: Session, text: str) -> InvalidInputError:
    """Return the error for a run that is not there, with the nearest that is."""
    rows = session.execute(select(RunRow.id, RunRow.name).order_by(*_NEWEST).limit(1000)).all()
    if not rows:
        return InvalidInputError("unknown_run", f"unknown run {text!r}: there are no runs yet")
    names = dict.fromkeys(name for row in rows for name in (row.name, row.id) if name)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    newest_names = ", ".join(row.name or row.id for row in rows[:5])
    return InvalidInputError("unknown_run", f"unknown run {text!r}: {hint}Newest: {newest_names}")


def not_stored(session: Session, run_id: str, what: str) -> MpqError:
    """Return the error for a part of a run that is not there, or for a run that is not."""
    require(session, run_id)
    return InvalidInputError("not_stored", f"run {run_id} has no {what}: it did not get that far")
