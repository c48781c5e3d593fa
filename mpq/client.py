"""The Python face of the service: submit jobs, watch them, and query what there is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpq import service
from mpq.comparison import Comparison, compare_runs
from mpq.core.errors import RunFailedError
from mpq.core.jobs import JobSpec, RunState
from mpq.datatable import DataTable
from mpq.layer_use import LayerUses, layer_uses
from mpq.run_tables import run_table, runs_table
from mpq.store.query import RunQuery
from mpq.store.records import EventRecord, JobRecord, RunPage, RunRecord, StageRecord
from mpq.store.store import Store, open_store
from mpq.submitted import submitted


class Client:
    """Jobs in a database, driven by processes of their own on this machine, or inside a cluster.

    `storage` is a URL or path as for `mpq.open_store`, `ray` the dashboard of a Ray cluster,
    "http://head:8265", whose jobs drive what is submitted. Use it as a context manager, or close
    it.
    """

    def __init__(
        self, storage: str | os.PathLike[str] | Store | None = None, *, ray: str | None = None
    ) -> None:
        self._ray = ray
        self._owns = not isinstance(storage, Store)
        self.store = open_store(storage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; runs go on."""
        if self._owns:
            self.store.close()

    def submit(
        self,
        job: JobSpec | dict[str, Any] | str | Path | None = None,
        *,
        submission_id: str | None = None,
        priority: int = 0,
        tags: Sequence[str] = (),
        user: str | None = None,
        queue: bool = False,
        ray: str | None = None,
        **parts: Any,
    ) -> RunHandle:
        """Submit a job, its keys, or the path of a job file, and return its run.

        `parts` are keys of the job too and go before its own: those of `mpq.search`, so that
        `submit(model=net, calibration=batches, budgets=["memory <= 60%"])` is that search in a
        process of its own. Networks and batches may be objects, which the database keeps by
        their digest (mpq.artifacts), and functions those of modules. The same `submission_id`
        returns the same run. A process of its own drives it, or, with `queue`, whichever
        `mpq drive` is next, or a job of the cluster `ray` (default: that of this client).
        Raises InvalidInputError for what cannot be run.
        """
        whole = submitted(self.store, job, parts)
        run_id, _ = service.submit(
            self.store,
            whole.spec,
            submission_id=submission_id,
            owner=user,
            priority=priority,
            tags=tags,
            queue=queue,
            trusted=whole.trusted,
            ray=ray or (None if queue else self._ray),
        )
        return RunHandle(self.store, run_id)

    def run(self, name: str = "latest") -> RunHandle:
        """Return the run that an id, its beginning, a job's name or "latest" stands for."""
        return RunHandle(self.store, self.store.resolve_run(name))

    def runs(self, limit: int | None = 50, **wanted: Any) -> list[RunRecord]:
        """Return runs with these properties (see `RunQuery`), newest first unless sorted."""
        return self.store.runs(limit=limit, **wanted)

    def page(self, *, limit: int | None = 50, cursor: str | None = None, **wanted: Any) -> RunPage:
        """Return some of these runs with their numbers; its `cursor` leads to the next ones."""
        return self.store.run_page(RunQuery.of(**wanted), limit, cursor)

    def runs_table(self, limit: int | None = None, **wanted: Any) -> DataTable:
        """Return these runs and their numbers as a table, for `.pandas()`, `.arrow()`, files."""
        return runs_table(self.page(limit=limit, **wanted).rows)

    def compare(self, *runs: str) -> Comparison:
        """Return how the allocations, totals and measurements of runs differ."""
        return compare_runs(self.store, runs)

    def layers(self, **wanted: Any) -> LayerUses:
        """Return how often the results of these runs, of one model, gave each layer what."""
        return layer_uses(self.store, **wanted)


@dataclass(frozen=True, slots=True)
class RunHandle:
    """One run, wherever it is driven."""

    store: Store
    id: str

    def record(self) -> RunRecord:
        """Return what is known of it."""
        return self.store.run(self.id)

    def job(self) -> JobRecord:
        """Return who submitted it and who drives it."""
        return self.store.job(self.id)

    def status(self) -> RunState:
        """Return its state."""
        return self.store.run(self.id).state

    def progress(self) -> list[StageRecord]:
        """Return how far its stages are."""
        return self.store.progress(self.id)

    def wait(self, timeout_s: float | None = None, *, bars: bool = False) -> RunState:
        """Wait until it has ended, with bars on standard error if asked; return its state.

        Raises TimeoutError.
        """
        if not bars:
            return service.wait(self.store, self.id, timeout_s)
        from mpq.served import LiveStages

        with LiveStages() as live:
            return service.wait(self.store, self.id, timeout_s, live.look)

    async def wait_async(self, timeout_s: float | None = None) -> RunState:
        """Wait without holding up the event loop."""
        return await asyncio.to_thread(self.wait, timeout_s)

    def logs(self, after: int = 0) -> Iterator[EventRecord]:
        """Yield the lines of its log whose number is larger than `after`."""
        yield from self.store.events(self.id, after)

    def stop(self) -> RunState:
        """Stop it; what it found stays. Returns its state after at most 15 s."""
        return service.stop(self.store, self.id)

    def resume(self, *, ray: str | None = None) -> None:
        """Let a process of its own, or a job of a Ray cluster, go on with it.

        Finished scores are used again.
        """
        service.start_driver(self.store, self.id, ray=ray)

    def table(self, name: str) -> DataTable:
        """Return its "scores", "costs", "allocation" or "evaluations" as a table."""
        return run_table(self.store, self.id, name)

    def delete(self) -> None:
        """Take it out of the database."""
        self.store.delete_run(self.id)

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait and return its `SearchResult`; raises RunFailedError where it has none."""
        state = self.wait(timeout_s)
        if state is not RunState.SUCCEEDED:
            run = self.record()
            reason = run.error_message or f"it is {state}"
            raise RunFailedError(run.error_code or "run_stopped", f"run {self.id}: {reason}")
        from mpq.result import SearchResult

        return SearchResult(self.store, self.id)
