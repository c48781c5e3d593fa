"""Runs a page at a time, with what is told of each in a list."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from mpq.core.errors import InvalidInputError, unknown
from mpq.core.evaluation import CHOSEN
from mpq.store import runs
from mpq.store.models import CostRow, EvaluationRow, JobRow, RunRow, SolutionRow, TagRow
from mpq.store.query import RunQuery
from mpq.store.records import RunPage, RunSummary

_IDS_AT_ONCE = 500  # databases limit the parameters of a statement
_VERSION = 1
_MARK_BYTES = 6


def page(session: Session, query: RunQuery, limit: int | None, cursor: str | None) -> RunPage:
    """Return some runs in order, and the cursor of the next ones where there are any.

    Raises InvalidInputError for a broken cursor (`cursor`), a bad limit, and for a number that
    no run has.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidInputError("limit", f"a limit is a whole number from 1 on, got {limit!r}")
    after = None if cursor is None else _read(query, cursor)
    found = session.execute(query.page(None if limit is None else limit + 1, after)).all()
    if not found and after is None:
        _check_names(session, query)
    shown = found if limit is None else found[:limit]
    following = None
    if len(found) > len(shown):
        following = _written(query, shown[-1].key, shown[-1].id)
    return RunPage(rows=_summaries(session, [row.id for row in shown]), cursor=following)


def summary(session: Session, run_id: str) -> RunSummary:
    """Return one run with its numbers."""
    found = _summaries(session, [run_id])
    if not found:
        raise runs.unknown_run(session, run_id)
    return found[0]


def _summaries(session: Session, ids: list[str]) -> tuple[RunSummary, ...]:
    found: dict[str, RunSummary] = {}
    for start in range(0, len(ids), _IDS_AT_ONCE):
        some = ids[start : start + _IDS_AT_ONCE]
        owned = select(JobRow.run_id, JobRow.owner).where(JobRow.run_id.in_(some))
        owners = {run_id: owner for run_id, owner in session.execute(owned)}  # noqa: C416
        tags: dict[str, list[str]] = {}
        of_runs = select(TagRow.run_id, TagRow.tag).where(TagRow.run_id.in_(some))
        for run_id, tag in session.execute(of_runs.order_by(TagRow.tag)):
            tags.setdefault(run_id, []).append(tag)
        solved = select(SolutionRow.run_id, SolutionRow.totals, SolutionRow.score).where(
            SolutionRow.run_id.in_(some), SolutionRow.label == CHOSEN
        )
        solutions = {row.run_id: row for row in session.execute(solved)}
        measured = select(EvaluationRow.run_id, EvaluationRow.mean, EvaluationRow.metrics).where(
            EvaluationRow.run_id.in_(some),
            EvaluationRow.candidate == CHOSEN,
            EvaluationRow.split == "held_out",
        )
        evaluations = {row.run_id: row for row in session.execute(measured)}
        for run in runs.records(session, [RunRow.id.in_(some)], None):
            solution, evaluation = solutions.get(run.id), evaluations.get(run.id)
            found[run.id] = RunSummary(
                run=run,
                owner=owners.get(run.id, ""),
                tags=tuple(tags.get(run.id, ())),
                totals=(solution.totals if solution else None) or {},
                predicted=solution.score if solution else math.nan,
                divergence=evaluation.mean if evaluation else math.nan,
                metrics=evaluation.metrics if evaluation else {},
            )
    return tuple(found[run_id] for run_id in ids if run_id in found)


def _check_names(session: Session, query: RunQuery) -> None:
    """Raise InvalidInputError where no run at all has a number that is asked for."""
    asked = [name for name in query.names if name not in ("divergence", "predicted")]
    if not asked or session.scalar(select(func.count()).select_from(RunRow)) == 0:
        return
    known = {"divergence", "predicted", *session.scalars(select(CostRow.name).distinct())}
    measured = select(EvaluationRow.metrics).where(EvaluationRow.candidate == CHOSEN)
    for metrics in session.scalars(measured.order_by(EvaluationRow.id.desc()).limit(1000)):
        known |= set(metrics)
    for name in asked:
        if name not in known:
            raise unknown("number", name, known)


def _written(query: RunQuery, key: Any, run_id: str) -> str:
    """Return where a page ended as text: nothing secret in it, and nothing that is trusted."""
    plain = key.isoformat() if isinstance(key, datetime) else key
    body = json.dumps([_VERSION, _asked(query), plain, run_id]).encode()
    return base64.urlsafe_b64encode(_mark(body) + body).decode().rstrip("=")


def _read(query: RunQuery, cursor: str) -> tuple[Any, str]:
    """Return where a page ended; whatever the text says is only ever compared with."""
    broken = InvalidInputError(
        "cursor",
        f"cannot read the cursor {str(cursor)[:40]!r}: pass what the page before returned, whole, "
        "or leave it out to begin anew",
    )
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        mark, body = raw[:_MARK_BYTES], raw[_MARK_BYTES:]
        if mark != _mark(body):
            raise broken
        version, asked, plain, run_id = json.loads(body)
        kind = {"created_at": str, "name": str}.get(query.sort_name, (int, float))
        if version != _VERSION or not isinstance(run_id, str) or "\0" in run_id:
            raise broken
    except (TypeError, ValueError, AttributeError, binascii.Error, RecursionError):
        raise broken from None
    if asked != _asked(query):
        raise InvalidInputError(
            "cursor", "the cursor is of other filters or another order: use those it came from"
        )
    if not isinstance(plain, kind) or isinstance(plain, bool):
        raise broken
    if query.sort_name != "created_at":
        return plain, run_id
    try:
        return datetime.fromisoformat(str(plain)), run_id
    except ValueError:
        raise broken from None


def _asked(query: RunQuery) -> str:
    # Spans such as "7d" are other moments at the next page, so dates are not compared.
    parts = (query.model, query.name, query.metric, query.state, query.owner, query.tag)
    text = repr((*parts, query.budget, query.where, query.sort))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:12]


def _mark(body: bytes) -> bytes:
    return hashlib.sha256(b"mpq runs" + body).digest()[:_MARK_BYTES]
