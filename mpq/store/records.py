"""What the store tells about a run: frozen, apart from the rows of the database."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from mpq.core.access import Scope
from mpq.core.jobs import JobSpec, RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run; moments are in UTC.

    `started_at` is when it first ran and `ended_at` when it last stopped running; a resumed
    run has none, and no error, until it stops again. `calibration_data` and `held_out_data` tell
    which batches it was searched on and judged on, "" where nobody knows or there are none.
    `has_graph` tells whether `Store.graph` has an answer.
    """

    id: str
    name: str
    spec: JobSpec
    state: RunState
    device: str
    mpq_version: str
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    error_code: str | None = None
    error_message: str | None = None
    calibration_data: str = ""
    held_out_data: str = ""
    has_graph: bool = False

    @property
    def data(self) -> dict[str, str]:
        """What is known of the batches of each split."""
        found = {"calibration": self.calibration_data, "held_out": self.held_out_data}
        return {split: told for split, told in found.items() if told}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """Who submitted a run and who drives it.

    `driver` is the last one, "host:pid", and `is_driven` whether its lease holds; `attempts`
    counts how often a driver took the run.
    """

    run_id: str
    submission_id: str | None = None
    owner: str = ""
    priority: int = 0
    driver: str | None = None
    driven_since: datetime | None = None
    stop_requested: bool = False
    attempts: int = 0
    is_driven: bool = False
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """How far a stage of a run is; `done` of `total` steps at that moment."""

    stage: str
    done: int
    total: int
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One line of a run's log; `id` grows with every line of the database."""

    id: int
    at: datetime
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run as a list tells it, with the numbers of its chosen allocation.

    `totals` are in the units of their costs, `predicted` is the predicted loss, `divergence` the
    mean that was measured on held-out batches; empty and NaN where the run did not get that far.
    """

    run: RunRecord
    owner: str
    tags: tuple[str, ...]
    totals: Mapping[str, float]
    predicted: float
    divergence: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """Some runs in order; `cursor` leads to the next ones, None: these were the last."""

    rows: tuple[RunSummary, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """Who may ask over HTTP, without the secret; `used_at` is right to the hour."""

    id: str
    name: str
    scope: Scope
    created_at: datetime
    expires_at: datetime
    used_at: datetime | None
    revoked_at: datetime | None
    is_valid: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCounts:
    """What an operator watches.

    `queued` runs wait for any driver, the oldest since `oldest_queued_s`; `driven` ones have one.
    """

    runs: Mapping[RunState, int]
    queued: int
    driven: int
    oldest_queued_s: float
    partials: int
    partial_seconds: float
