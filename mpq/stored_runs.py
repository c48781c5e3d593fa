"""Runs in a database, driven by processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq import service
from mpq.comparison import Comparison, compare_runs
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.datatable import DataTable
from mpq.layer_use import LayerUses, layer_uses
from mpq.run_tables import run_table
from mpq.store.query import RunQuery
from mpq.store.records import EventRecord, JobRecord, RunPage, RunRecord, StageRecord
from mpq.store.store import Store, open_store
from mpq.submitted import Submitted, submitted

_LOOK_S = 0.2


class StoredRuns:
    """Runs as `mpq.runs.Runs` has them; `storage` and `ray` are as for `mpq.Client`."""

    def __init__(
        self, storage: str | os.PathLike[str] | Store | None, ray: str | None = None
    ) -> None:
        self._ray = ray
        self._owns = not isinstance(storage, Store)
        self.store = open_store(storage)

    def checked(
        self, job: JobSpec | Mapping[str, Any] | str | Path | None, parts: Mapping[str, Any]
    ) -> Submitted:
        """Return a job, its networks and batches kept by their digest."""
        return submitted(self.store, job, parts)

    def submit(
        self,
        spec: JobSpec,
        *,
        submission_id: str | None,
        priority: int,
        tags: Sequence[str],
        user: str | None,
        queue: bool,
        trusted: Sequence[str],
        ray: str | None,
    ) -> str:
        """Keep a job and, unless queued, start the process or the Ray job that drives it."""
        run_id, _ = service.submit(
            self.store,
            spec,
            submission_id=submission_id,
            owner=user,
            priority=priority,
            tags=tags,
            queue=queue,
            trusted=trusted,
            ray=ray or (None if queue else self._ray),
        )
        return run_id

    def resolve_run(self, text: str) -> str:
        """Return the id that a text stands for."""
        return self.store.resolve_run(text)

    def run_page(self, limit: int | None, cursor: str | None, **wanted: Any) -> RunPage:
        """Return some runs."""
        return self.store.run_page(RunQuery.of(**wanted), limit, cursor)

    def run(self, run_id: str) -> RunRecord:
        """Return a run."""
        return self.store.run(run_id)

    def job(self, run_id: str) -> JobRecord:
        """Return who submitted a run and who drives it."""
        return self.store.job(run_id)

    def progress(self, run_id: str) -> list[StageRecord]:
        """Return how far its stages are."""
        return self.store.progress(run_id)

    def events(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the lines of its log after a number."""
        yield from self.store.events(run_id, after)

    def follow(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the same, and those that come until it has ended."""
        while True:
            state = self.store.run(run_id).state  # before the lines: then none is missed
            for event in self.store.events(run_id, after):
                after = event.id
                yield event
            if state in ENDED:
                return
            time.sleep(_LOOK_S)

    def request_stop(self, run_id: str) -> RunState:
        """Ask a run to stop."""
        return self.store.request_stop(run_id)

    def resume(self, run_id: str, ray: str | None) -> None:
        """Let a process of its own, or a Ray job, go on with it."""
        service.start_driver(self.store, run_id, ray=ray)

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the database."""
        self.store.delete_run(run_id)

    def table(self, run_id: str, name: str) -> DataTable:
        """Return a table of a run."""
        return run_table(self.store, run_id, name)

    def compare(self, runs: Sequence[str]) -> Comparison:
        """Return how runs differ."""
        return compare_runs(self.store, runs)

    def layers(self, **wanted: Any) -> LayerUses:
        """Return how often runs of one model gave each layer what."""
        return layer_uses(self.store, **wanted)

    def result(self, run_id: str) -> Any:
        """Return its `SearchResult`."""
        from mpq.result import SearchResult

        return SearchResult(self.store, run_id)

    def close(self) -> None:
        """Close the connections unless they are somebody else's."""
        if self._owns:
            self.store.close()
