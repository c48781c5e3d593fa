"""The tables of the database, apart from the records of the domain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from sqlalchemy import (
    BigInteger,
    Boolean,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mpq.core.jobs import JobSpec
from mpq.core.layers import LayerGraph
from mpq.core.problem import Budget, Infeasibility
from mpq.core.tables import PAIRS_TRUSTED
from mpq.store.columns import Json, NanDouble, PlainText, UtcTime

OfRun = Annotated[str, mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))]


class Base(DeclarativeBase):
    """What all tables share: every constraint has a name, so that a migration can reach it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it from the class
        str: PlainText(),
        int: Integer(),
        float: Double(),
        bool: Boolean(),
        bytes: LargeBinary(),
        datetime: UtcTime(),
    }


class RunRow(Base):
    """One submitted job."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    model: Mapped[str] = mapped_column(index=True)
    metric: Mapped[str] = mapped_column(index=True)
    device: Mapped[str]
    mpq_version: Mapped[str]
    state: Mapped[str] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(index=True)
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    spec: Mapped[JobSpec] = mapped_column(Json(JobSpec))
    graph: Mapped[LayerGraph | None] = mapped_column(Json(LayerGraph), deferred=True)
    calibration_data: Mapped[str | None]
    held_out_data: Mapped[str | None]


class JobRow(Base):
    """Who submitted a run, and who drives it until when, by the clock of the database.

    `body` is a digest of what was submitted under `submission_id`; `queued` lets any driver take
    the run.
    """

    __tablename__ = "jobs"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    submission_id: Mapped[str | None] = mapped_column(unique=True)
    body: Mapped[str] = mapped_column(String(64))
    owner: Mapped[str] = mapped_column(index=True)
    priority: Mapped[int]
    queued: Mapped[bool]
    driver: Mapped[str | None]
    driven_since: Mapped[datetime | None]
    lease_until: Mapped[datetime | None] = mapped_column(index=True)
    stop_requested: Mapped[bool]
    attempts: Mapped[int]


class TagRow(Base):
    """A word that a run is found by."""

    __tablename__ = "run_tags"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)


class ProgressRow(Base):
    """How far a stage of a run is."""

    __tablename__ = "progress"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    done: Mapped[int]
    total: Mapped[int]
    at: Mapped[datetime]


class UnitRow(Base):
    """One unit of a run's network."""

    __tablename__ = "units"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    layers: Mapped[tuple[str, ...]] = mapped_column(Json(tuple[str, ...]))
    weights: Mapped[int] = mapped_column(BigInteger)


class ScoreRow(Base):
    """The sensitivity of one cell; `position` is the number of the cell in its table."""

    __tablename__ = "scores"
    __table_args__ = ({"sqlite_with_rowid": False},)

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    scheme: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    value: Mapped[float]
    stderr: Mapped[float]


class CostRow(Base):
    """What the cells of one cost table share."""

    __tablename__ = "costs"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    unit_of_measure: Mapped[str]
    fixed: Mapped[float]
    baseline: Mapped[float] = mapped_column(NanDouble, nullable=True)
    weights: Mapped[int] = mapped_column(BigInteger)
    provenance: Mapped[str]


class CostCellRow(Base):
    """The cost of one cell; `position` is the number of the cell in its table."""

    __tablename__ = "cost_cells"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "name"], ["costs.run_id", "costs.name"], ondelete="CASCADE"
        ),
        {"sqlite_with_rowid": False},
    )

    run_id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    scheme: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]
    value: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]


class JointCostRow(Base):
    """What two cells of a cost table cost together, by their positions in it."""

    __tablename__ = "joint_costs"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "name"], ["costs.run_id", "costs.name"], ondelete="CASCADE"
        ),
        {"sqlite_with_rowid": False},
    )

    run_id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    first: Mapped[int] = mapped_column(primary_key=True)
    second: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseAxis:
    """The cells of responses in order, and how far their pairs are trusted."""

    units: tuple[str, ...]
    schemes: tuple[str, ...]
    trust: float = PAIRS_TRUSTED


class ResponsesRow(Base):
    """The responses of a run: `array` is an .npy file of float32, `cells` its first axis."""

    __tablename__ = "responses"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    cells: Mapped[ResponseAxis] = mapped_column(Json(ResponseAxis))
    array: Mapped[bytes]


class PartialRow(Base):
    """The result of one scoring task under the key of its content; all runs share it.

    `used_at` is when a run last made or took it, to the hour.
    """

    __tablename__ = "partials"

    key: Mapped[str] = mapped_column(primary_key=True)
    seconds: Mapped[float]
    arrays: Mapped[bytes]
    created_at: Mapped[datetime]
    used_at: Mapped[datetime | None] = mapped_column(index=True)


class KernelLatencyRow(Base):
    """The time of one kernel on one device; all runs share it."""

    __tablename__ = "kernel_latencies"

    device: Mapped[str] = mapped_column(primary_key=True)
    backend: Mapped[str] = mapped_column(primary_key=True)
    kernel: Mapped[str] = mapped_column(primary_key=True)
    shape: Mapped[str] = mapped_column(primary_key=True)
    median_s: Mapped[float]
    low_s: Mapped[float]
    high_s: Mapped[float]
    rounds: Mapped[int]
    noisy: Mapped[bool]
    measured_at: Mapped[datetime]


class SolutionRow(Base):
    """The answer of a solver; its allocation is in `allocations`."""

    __tablename__ = "solutions"
    __table_args__ = (UniqueConstraint("run_id", "label"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[OfRun]
    label: Mapped[str]
    status: Mapped[str] = mapped_column(index=True)
    solver: Mapped[str]
    score: Mapped[float] = mapped_column(NanDouble, nullable=True)
    bound: Mapped[float] = mapped_column(NanDouble, nullable=True)
    gap: Mapped[float] = mapped_column(NanDouble, nullable=True)
    seconds: Mapped[float]
    created_at: Mapped[datetime]
    budgets: Mapped[tuple[Budget, ...]] = mapped_column(Json(tuple[Budget, ...]))
    totals: Mapped[Mapping[str, float] | None] = mapped_column(Json(dict[str, float]))
    infeasibility: Mapped[Infeasibility | None] = mapped_column(Json(Infeasibility))


class AllocationRow(Base):
    """The scheme that a solution gives one unit."""

    __tablename__ = "allocations"
    __table_args__ = ({"sqlite_with_rowid": False},)

    solution_id: Mapped[int] = mapped_column(
        ForeignKey("solutions.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(index=True)
    scheme: Mapped[str]


class FrontierRow(Base):
    """A trade-off of one cost or two ("memory,latency"); two have a grid of limits."""

    __tablename__ = "frontiers"

    run_id: Mapped[OfRun] = mapped_column(primary_key=True)
    costs: Mapped[str] = mapped_column(primary_key=True)
    complete: Mapped[bool]
    grid: Mapped[tuple[tuple[float, ...], ...]] = mapped_column(Json(tuple[tuple[float, ...], ...]))
    created_at: Mapped[datetime]


class FrontierPointRow(Base):
    """One solution of a trade-off; `places` is an .npy file of the place of each unit's scheme."""

    __tablename__ = "frontier_points"
    __table_args__ = (
        ForeignKeyConstraint(
            ["run_id", "costs"], ["frontiers.run_id", "frontiers.costs"], ondelete="CASCADE"
        ),
        Index(None, "run_id", "costs", "score"),
    )

    run_id: Mapped[str] = mapped_column(String(12), primary_key=True)
    costs: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    status: Mapped[str]
    solver: Mapped[str]
    score: Mapped[float]
    bound: Mapped[float]
    gap: Mapped[float]
    seconds: Mapped[float]
    budgets: Mapped[tuple[Budget, ...]] = mapped_column(Json(tuple[Budget, ...]))
    totals: Mapped[Mapping[str, float]] = mapped_column(Json(dict[str, float]))
    places: Mapped[bytes]


class EvaluationRow(Base):
    """One candidate measured on one split."""

    __tablename__ = "evaluations"
    __table_args__ = (UniqueConstraint("run_id", "candidate", "split"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[OfRun]
    candidate: Mapped[str]
    split: Mapped[str]
    divergence: Mapped[str]
    mean: Mapped[float] = mapped_column(NanDouble, nullable=True)
    stderr: Mapped[float] = mapped_column(NanDouble, nullable=True)
    predicted: Mapped[float | None]
    metrics: Mapped[Mapping[str, float]] = mapped_column(Json(dict[str, float]))
    predicted_bytes: Mapped[int | None] = mapped_column(BigInteger)
    measured_bytes: Mapped[int | None] = mapped_column(BigInteger)
    seconds: Mapped[float]
    allocation: Mapped[Mapping[str, str]] = mapped_column(Json(dict[str, str]))


class TokenRow(Base):
    """A secret by which somebody may ask the server; `digest` is its SHA-256.

    `used_at` is when it was last used, to the hour.
    """

    __tablename__ = "api_tokens"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str]
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    scope: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class EventRow(Base):
    """One line of a run's log; numbers only grow, so a reader can go on after the last one."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "run_id", "id"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[OfRun]
    at: Mapped[datetime]
    kind: Mapped[str]
    message: Mapped[str]
