"""What is told of runs: frozen views of the store, which routes and pages share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from mpq.core.jobs import ENDED, RunState
from mpq.dashboard.masking import masked_job, masked_text
from mpq.store.query import RunQuery
from mpq.store.records import EventRecord, JobRecord, RunRecord, RunSummary, StageRecord
from mpq.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run as a list tells it; numbers are None where the run did not get that far.

    `totals` are those of the chosen allocation, in bytes, s, ...; `predicted` is its predicted
    loss, `divergence` what was measured on held-out batches. `calibration_data` and
    `held_out_data` tell which batches those are. `job` has every key of the job, secrets masked.
    """

    id: str
    name: str
    state: RunState
    model: str
    metric: str
    budgets: tuple[str, ...]
    owner: str
    tags: tuple[str, ...]
    device: str
    mpq_version: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error_code: str | None
    error_message: str | None
    predicted: float | None
    divergence: float | None
    totals: Mapping[str, float | None]
    metrics: Mapping[str, float | None]
    has_graph: bool
    calibration_data: str
    held_out_data: str
    job: Mapping[str, Any]

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more unless it is resumed."""
        return self.state in ENDED


@dataclass(frozen=True, slots=True, kw_only=True)
class RunsView:
    """Some runs in order; `cursor` leads to the next ones, None: these were the last."""

    runs: tuple[RunView, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """How far a stage of a run is."""

    stage: str
    done: int
    total: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverView:
    """Who submitted a run and who drives it; see `JobRecord`."""

    submission_id: str | None
    owner: str
    priority: int
    driver: str | None
    driven_since: datetime | None
    stop_requested: bool
    attempts: int
    is_driven: bool
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetail:
    """One run, who drives it and how far it is."""

    run: RunView
    driving: DriverView
    stages: tuple[StageView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of a run's log; `id` grows with every line of the database."""

    id: int
    at: datetime
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogView:
    """Lines of a run's log after a number; `last` is the number to ask for the next ones with."""

    lines: tuple[LogLine, ...]
    last: int
    state: RunState


def runs_view(
    store: Store,
    query: RunQuery | None = None,
    limit: int = 50,
    cursor: str | None = None,
    *,
    jobs: bool = True,
) -> RunsView:
    """Return some runs, the newest first unless sorted; without `jobs` in half the time."""
    page = store.run_page(query or RunQuery(), limit, cursor)
    return RunsView(runs=tuple(run_view(row, jobs) for row in page.rows), cursor=page.cursor)


def run_view(row: RunSummary, job: bool = True) -> RunView:
    """Return a run of a list."""
    run = row.run
    return RunView(
        id=run.id,
        name=run.name,
        state=run.state,
        model=run.spec.model,
        metric=run.spec.metric,
        budgets=run.spec.budgets,
        owner=row.owner,
        tags=row.tags,
        device=run.device,
        mpq_version=run.mpq_version,
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=run.ended_at,
        error_code=run.error_code,
        error_message=None if run.error_message is None else masked_text(run.error_message),
        predicted=finite(row.predicted),
        divergence=finite(row.divergence),
        totals=finite_values(row.totals),
        metrics=finite_values(row.metrics),
        has_graph=run.has_graph,
        calibration_data=run.calibration_data,
        held_out_data=run.held_out_data,
        job=masked_job(run.spec) if job else {},
    )


def run_detail(store: Store, run_id: str) -> RunDetail:
    """Return everything that is told of one run beside its results."""
    summary = store.run_summary(run_id)
    job, stages = store.job(run_id), store.progress(run_id)
    return RunDetail(
        run=run_view(summary),
        driving=driver_view(job),
        stages=tuple(map(stage_view, stages)),
    )


def driver_view(job: JobRecord) -> DriverView:
    """Return who drives a run."""
    return DriverView(**{f.name: getattr(job, f.name) for f in fields(DriverView)})


def stage_view(stage: StageRecord) -> StageView:
    """Return how far a stage is."""
    return StageView(stage=stage.stage, done=stage.done, total=stage.total, at=stage.at)


def log_view(store: Store, run_id: str, after: int, limit: int) -> LogView:
    """Return at most so many lines of a log whose number is larger than `after`."""
    state = store.run(run_id).state  # before the lines: an ended run then has no more
    found = tuple(map(log_line, store.events(run_id, after, limit)))
    return LogView(lines=found, last=found[-1].id if found else after, state=state)


def last_lines(store: Store, run_id: str, number: int = 15) -> tuple[LogLine, ...]:
    """Return the end of a log."""
    return tuple(map(log_line, store.last_events(run_id, number)))


def log_line(event: EventRecord) -> LogLine:
    """Return one line of a log without the secrets in it."""
    return LogLine(id=event.id, at=event.at, kind=event.kind, message=masked_text(event.message))


def result_tag(run: RunRecord) -> str | None:
    """Return a text that changes when the results of a run may, None while they do."""
    if run.state not in ENDED or run.ended_at is None:
        return None
    return f"{run.id}-{run.state}-{run.ended_at.timestamp():.6f}-{run.mpq_version}"


def finite(value: float | None) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinities."""
    return value if value is not None and math.isfinite(value) else None


def finite_values(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON can hold them."""
    return {name: finite(value) for name, value in numbers.items()}
