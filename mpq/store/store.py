"""The database: the only place that opens a session."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from sqlalchemy import URL, Engine
from sqlalchemy.orm import Session

from mpq.core.deployment import DEPLOYED, Deployment
from mpq.core.errors import MpqError, StorageError
from mpq.core.evaluation import Evaluation
from mpq.core.frontier import Frontier, Surface
from mpq.core.jobs import JobSpec, RunState
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import LayerGraph
from mpq.core.problem import Problem, Solution
from mpq.core.protocols import Partial
from mpq.core.tables import CostTable, Responses, SensitivityTable
from mpq.store import (
    counts,
    evaluations,
    events,
    frontiers,
    graphs,
    jobs,
    latencies,
    pages,
    partials,
    progress,
    runs,
    solutions,
    tables,
)
from mpq.store.access import Access
from mpq.store.address import shown, sqlite_file, storage_url
from mpq.store.artifacts import Artifacts
from mpq.store.engine import make_engine, reading, writing
from mpq.store.failures import one_line_errors
from mpq.store.leases import Leases
from mpq.store.patience import PATIENCE_S, Patience, patient
from mpq.store.query import RunQuery
from mpq.store.records import EventRecord, RunPage, RunRecord, RunSummary, StageRecord, StoreCounts
from mpq.store.schema import prepare


def open_store(
    storage: str | os.PathLike[str] | Store | None = None, *, patience_s: float = PATIENCE_S
) -> Store:
    """Open a database, making it where it is new.

    `storage` is a URL ("sqlite:///runs.db", "postgresql+psycopg://user:password@host/name"),
    the path of a SQLite file, or a store, which is returned as it is; None is the environment's
    MPQ_STORAGE, else mpq.db in the working directory. A server that goes away is waited for
    `patience_s`. Raises StorageError.
    """
    if isinstance(storage, Store):
        return storage
    url = storage_url(storage)
    with one_line_errors(url):
        engine = make_engine(url)
        try:
            prepare(engine)
        except BaseException:
            engine.dispose()
            raise
    return Store(engine, patience_s)


@patient
class Store(Leases, Artifacts, Access):
    """Everything a search finds, kept; may be used by several threads and processes at once.

    Each method is one transaction: it happens wholly or not at all. What is put twice replaces
    what was there, except results of tasks, of which the first stays. A server that goes away is
    waited for (ten minutes, or as `open_store` says) and the transaction run again; an MpqWarning
    tells how long it was. Methods raise InvalidInputError (`unknown_run`) for a run that is not
    there and StorageError where the database cannot do its work. Use it as a context manager, or
    close it.
    """

    def __init__(self, engine: Engine, patience_s: float = PATIENCE_S) -> None:
        self._engine = engine
        self._reading = reading(engine)
        self._writing = writing(engine)
        self._patience = Patience(shown(engine.url), patience_s)

    def __repr__(self) -> str:
        return f"Store({shown(self.url)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> URL:
        """Where the database is; `str` hides the password, `render_as_string(False)` does not."""
        return self._engine.url

    @property
    def in_memory(self) -> bool:
        """Whether the database is in the memory of this process, with one connection for all."""
        return self.url.get_backend_name() == "sqlite" and sqlite_file(self.url) is None

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def _read(self, run_id: str | None = None) -> Iterator[Session]:
        with one_line_errors(self.url), Session(self._reading) as session:
            if run_id is not None:
                runs.require(session, run_id)
            yield session

    @contextmanager
    def _write(self, run_id: str | None = None) -> Iterator[Session]:
        with one_line_errors(self.url), Session(self._writing) as session, session.begin():
            if run_id is not None:
                runs.require(session, run_id, lock=True)
            yield session

    def create_run(self, spec: JobSpec, device: str = "") -> str:
        """Add a pending run and return its id."""
        from mpq import __version__  # late: `mpq` itself may still be loading

        with self._write() as session:
            return runs.create(session, spec, device, __version__)

    def start_run(self, run_id: str, device: str) -> None:
        """Let a pending, stopped, failed or abandoned run run on a device."""
        with self._write(run_id) as session:
            runs.start(session, run_id, device)
            progress.clear(session, run_id)

    def put_data(self, run_id: str, calibration: str, held_out: str = "") -> None:
        """Keep which batches a run is searched on and judged on."""
        with self._write(run_id) as session:
            runs.put_data(session, run_id, calibration, held_out)

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the database; raises StorageError where somebody drives it."""
        with self._write(run_id) as session:
            found = jobs.one(session, run_id)
            if found.is_driven:
                raise StorageError(
                    "run_driven", f"run {run_id} is being driven by {found.driver}: stop it first"
                )
            runs.delete(session, run_id)

    def put_progress(self, run_id: str, stage: str, done: int, total: int) -> None:
        """Keep how far a stage is."""
        with self._write() as session:
            progress.put(session, run_id, stage, done, total)

    def progress(self, run_id: str) -> list[StageRecord]:
        """Return how far the stages of a run are, in the order in which they began."""
        with self._read(run_id) as session:
            return progress.get(session, run_id)

    def set_state(self, run_id: str, state: RunState, error: MpqError | None = None) -> None:
        """Move a run to another state; raises InvalidInputError where it may not go there."""
        with self._write() as session:
            runs.set_state(session, run_id, state, error)

    def run(self, run_id: str) -> RunRecord:
        """Return a run."""
        with self._read() as session:
            return runs.one(session, run_id)

    def runs(
        self,
        state: RunState | str | None = None,
        name: str | None = None,
        limit: int | None = 50,
        **wanted: Any,
    ) -> list[RunRecord]:
        """Return runs with these properties (see `RunQuery`), newest first unless sorted."""
        query = RunQuery.of(state=state, name=name, **wanted)
        return [row.run for row in self.run_page(query, limit).rows]

    def run_page(
        self, query: RunQuery | None = None, limit: int | None = 50, cursor: str | None = None
    ) -> RunPage:
        """Return some of these runs with their numbers, and the cursor of the next ones."""
        with self._read() as session:
            return pages.page(session, query or RunQuery(), limit, cursor)

    def run_summary(self, run_id: str) -> RunSummary:
        """Return a run with the numbers of its chosen allocation."""
        with self._read() as session:
            return pages.summary(session, run_id)

    def resolve_run(self, text: str, state: RunState | None = None) -> str:
        """Return the id that an id, its unique start, a run's name or "latest" stands for.

        Names and "latest" prefer runs in `state`.
        """
        with self._read() as session:
            return runs.resolve(session, text, state)

    def put_graph(self, run_id: str, graph: LayerGraph) -> None:
        """Keep the network of a run."""
        with self._write(run_id) as session:
            graphs.put(session, run_id, graph)

    def graph(self, run_id: str) -> LayerGraph:
        """Return the network of a run."""
        with self._read() as session:
            return graphs.get(session, run_id)

    def put_sensitivity(self, run_id: str, table: SensitivityTable) -> None:
        """Keep the table of a metric."""
        with self._write(run_id) as session:
            tables.put_sensitivity(session, run_id, table)

    def sensitivity(self, run_id: str, metric: str | None = None) -> SensitivityTable:
        """Return the table of a metric; None is the one the run asked for, or its only one."""
        with self._read() as session:
            return tables.sensitivity(session, run_id, metric, tables.CellReader())

    def scored_metrics(self, run_id: str) -> list[str]:
        """Return the names of the metrics that a run has a table of."""
        with self._read(run_id) as session:
            return tables.scored_metrics(session, run_id)

    def put_cost(self, run_id: str, table: CostTable) -> None:
        """Keep a cost table."""
        with self._write(run_id) as session:
            tables.put_cost(session, run_id, table)

    def costs(self, run_id: str) -> dict[str, CostTable]:
        """Return the cost tables by name."""
        with self._read(run_id) as session:
            return tables.costs(session, run_id, tables.CellReader())

    def cost_units(self, run_id: str) -> dict[str, str]:
        """Return what each cost of a run is counted in."""
        with self._read(run_id) as session:
            return tables.cost_units(session, run_id)

    def put_responses(self, run_id: str, responses: Responses) -> None:
        """Keep the responses."""
        with self._write(run_id) as session:
            tables.put_responses(session, run_id, responses)

    def responses(self, run_id: str) -> Responses | None:
        """Return the responses, None where the metric has none."""
        with self._read(run_id) as session:
            return tables.responses(session, run_id, tables.CellReader())

    def problem(self, run_id: str, with_responses: bool = True) -> Problem:
        """Return the tables of a run, exactly as they were put, without budgets."""
        with self._read() as session:
            return tables.problem(session, run_id, with_responses)

    def partials(self, keys: Iterable[str]) -> dict[str, Partial]:
        """Return the results of tasks that are there, in the order of the keys; notes their use."""
        with self._read() as session:
            found = partials.get(session, keys)
            old = partials.stale(session, found)
        if old:
            with self._write() as session:
                partials.note_use(session, old)
        return found

    def partial_seconds(self, keys: Iterable[str]) -> dict[str, float]:
        """Return how long each task took whose result is there, in the order of the keys."""
        with self._read() as session:
            return partials.seconds(session, keys)

    def put_partial(self, key: str, partial: Partial, seconds: float) -> None:
        """Keep the result of a task; where its key is there already, nothing happens."""
        with self._write() as session:
            partials.put(session, key, partial, seconds)

    def kernel_latencies(self, device: str) -> dict[KernelCase, KernelLatency]:
        """Return every measured time of a device."""
        with self._read() as session:
            return latencies.get(session, device)

    def put_kernel_latency(self, latency: KernelLatency) -> None:
        """Keep the time of a kernel."""
        with self._write() as session:
            latencies.put(session, latency)

    def put_solution(self, run_id: str, label: str, solution: Solution) -> None:
        """Keep a solution under a label."""
        with self._write(run_id) as session:
            solutions.put(session, run_id, label, solution)

    def solutions(self, run_id: str) -> list[tuple[str, Solution]]:
        """Return (label, solution) in the order they were put."""
        with self._read(run_id) as session:
            return solutions.get(session, run_id)

    def put_frontier(self, run_id: str, found: Frontier | Surface) -> None:
        """Keep the trade-off of one cost or two."""
        with self._write(run_id) as session:
            frontiers.put(session, run_id, found, tables.cells(session, run_id))

    def frontier(self, run_id: str, cost: str) -> Frontier | None:
        """Return the trade-off of a cost that was kept, if any."""
        with self._read(run_id) as session:
            found = frontiers.get(session, run_id, (cost,), tables.cells(session, run_id))
        return found if isinstance(found, Frontier) else None

    def frontier_totals(self, run_id: str) -> dict[str, list[tuple[dict[str, float], float]]]:
        """Return the totals and score of each point of the stored frontiers, by cost."""
        with self._read(run_id) as session:
            return frontiers.totals(session, run_id)

    def surface(self, run_id: str, costs: tuple[str, str]) -> Surface | None:
        """Return the trade-off of two costs that was kept, if any."""
        with self._read(run_id) as session:
            found = frontiers.get(session, run_id, costs, tables.cells(session, run_id))
        return found if isinstance(found, Surface) else None

    def put_evaluation(self, run_id: str, evaluation: Evaluation) -> None:
        """Keep what a candidate did on a split."""
        with self._write(run_id) as session:
            evaluations.put(session, run_id, evaluation)

    def evaluations(self, run_id: str) -> list[Evaluation]:
        """Return the evaluations in the order they were put."""
        with self._read(run_id) as session:
            return evaluations.get(session, run_id)

    def put_deployment(self, run_id: str, deployment: Deployment) -> None:
        """Keep what a deployed model measured; a run may have several."""
        self.log(run_id, DEPLOYED, deployment.text())

    def deployments(self, run_id: str) -> list[Deployment]:
        """Return the deployments of a run, oldest first."""
        logged = self.events(run_id)
        return [Deployment.from_text(event.message) for event in logged if event.kind == DEPLOYED]

    def counts(self) -> StoreCounts:
        """Return what an operator watches: runs by state, the queue, scores that are kept."""
        with self._read() as session:
            return counts.counts(session)

    def log(self, run_id: str, kind: str, message: str) -> None:
        """Add a line to the log of a run."""
        with self._write(run_id) as session:
            events.put(session, run_id, kind, message)

    def notes(self, run_id: str) -> list[str]:
        """Return the lines of the log that are for people."""
        logged = self.events(run_id)
        return [f"{event.kind}: {event.message}" for event in logged if event.kind != DEPLOYED]

    def events(self, run_id: str, after: int = 0, limit: int | None = None) -> list[EventRecord]:
        """Return the log, oldest first; `after` is the number of the last line already seen."""
        with self._read(run_id) as session:
            return events.get(session, run_id, after, limit)

    def last_events(self, run_id: str, number: int) -> list[EventRecord]:
        """Return the end of the log, oldest first."""
        with self._read(run_id) as session:
            return events.last(session, run_id, number)
