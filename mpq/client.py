"""The Python face of the service: submit jobs, watch them, and query what there is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mpq import service
from mpq.comparison import Comparison
from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.jobs import JobSpec, RunState
from mpq.datatable import DataTable
from mpq.layer_use import LayerUses
from mpq.run_tables import runs_table
from mpq.runs import Runs
from mpq.store.records import EventRecord, JobRecord, RunPage, RunRecord, StageRecord
from mpq.store.store import Store


class Client:
    """Jobs in a database, driven by processes of their own, inside a cluster, or on a server.

    `storage` is a URL or path as for `mpq.open_store`, `ray` the dashboard of a Ray cluster,
    "http://head:8265", whose jobs drive what is submitted; `url` is that of `mpq serve`, which
    `token` (default: the environment's MPQ_TOKEN) lets you ask. Use it as a context manager, or
    close it.
    """

    def __init__(
        self,
        storage: str | os.PathLike[str] | Store | None = None,
        *,
        ray: str | None = None,
        url: str | None = None,
        token: str | None = None,
    ) -> None:
        self._runs = _runs(storage, ray, url, token)

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
    def store(self) -> Store:
        """The database; raises InvalidInputError (`store`) where that is behind a server."""
        from mpq.stored_runs import StoredRuns

        if not isinstance(self._runs, StoredRuns):
            raise InvalidInputError("store", "this client asks a server: its database is not here")
        return self._runs.store

    def close(self) -> None:
        """Close the connections; runs go on."""
        self._runs.close()

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
        process of its own. Networks and batches may be objects, which a database keeps by their
        digest (mpq.artifacts) and a server refuses, and functions those of modules. The same
        `submission_id` returns the same run. A process of its own drives it, or, with `queue`,
        whichever `mpq drive` is next, or a job of the cluster `ray` (default: that of this
        client); a server always queues. Raises InvalidInputError for what cannot be run.
        """
        whole = self._runs.checked(job, parts)
        run_id = self._runs.submit(
            whole.spec,
            submission_id=submission_id,
            priority=priority,
            tags=tags,
            user=user,
            queue=queue,
            trusted=whole.trusted,
            ray=ray,
        )
        return RunHandle(self._runs, run_id)

    def run(self, name: str = "latest") -> RunHandle:
        """Return the run that an id, its beginning, a job's name or "latest" stands for."""
        return RunHandle(self._runs, self._runs.resolve_run(name))

    def runs(self, limit: int | None = 50, **wanted: Any) -> list[RunRecord]:
        """Return runs with these properties (see `RunQuery`), newest first unless sorted."""
        return [row.run for row in self.page(limit=limit, **wanted).rows]

    def page(self, *, limit: int | None = 50, cursor: str | None = None, **wanted: Any) -> RunPage:
        """Return some of these runs with their numbers; its `cursor` leads to the next ones."""
        return self._runs.run_page(limit, cursor, **wanted)

    def runs_table(self, limit: int | None = None, **wanted: Any) -> DataTable:
        """Return these runs and their numbers as a table, for `.pandas()`, `.arrow()`, files."""
        return runs_table(self.page(limit=limit, **wanted).rows)

    def compare(self, *runs: str) -> Comparison:
        """Return how the allocations, totals and measurements of runs differ."""
        return self._runs.compare(runs)

    def layers(self, **wanted: Any) -> LayerUses:
        """Return how often the results of these runs, of one model, gave each layer what."""
        return self._runs.layers(**wanted)


@dataclass(frozen=True, slots=True)
class RunHandle:
    """One run, wherever it is driven."""

    runs: Runs
    id: str

    def record(self) -> RunRecord:
        """Return what is known of it."""
        return self.runs.run(self.id)

    def job(self) -> JobRecord:
        """Return who submitted it and who drives it."""
        return self.runs.job(self.id)

    def status(self) -> RunState:
        """Return its state."""
        return self.runs.run(self.id).state

    def progress(self) -> list[StageRecord]:
        """Return how far its stages are."""
        return self.runs.progress(self.id)

    def wait(self, timeout_s: float | None = None, *, bars: bool = False) -> RunState:
        """Wait until it has ended, with bars on standard error if asked; return its state.

        Raises TimeoutError.
        """
        if not bars:
            return service.wait(self.runs, self.id, timeout_s)
        from mpq.served import LiveStages

        with LiveStages() as live:
            return service.wait(self.runs, self.id, timeout_s, live.look)

    async def wait_async(self, timeout_s: float | None = None) -> RunState:
        """Wait without holding up the event loop."""
        return await asyncio.to_thread(self.wait, timeout_s)

    def logs(self, after: int = 0) -> Iterator[EventRecord]:
        """Yield the lines of its log whose number is larger than `after`."""
        yield from self.runs.events(self.id, after)

    def follow(self, after: int = 0) -> Iterator[EventRecord]:
        """Yield the lines of its log as they come, each once, until it has ended.

        A server that restarts meanwhile is waited for.
        """
        yield from self.runs.follow(self.id, after)

    async def follow_async(self, after: int = 0) -> AsyncIterator[EventRecord]:
        """Yield the same without holding up the event loop."""
        lines = self.follow(after)
        while (line := await asyncio.to_thread(next, lines, None)) is not None:
            yield line

    def stop(self) -> RunState:
        """Stop it; what it found stays. Returns its state after at most 15 s."""
        return service.stop(self.runs, self.id)

    def resume(self, *, ray: str | None = None) -> None:
        """Let a process of its own, or a job of a Ray cluster, go on with it.

        Finished scores are used again.
        """
        self.runs.resume(self.id, ray)

    def table(self, name: str) -> DataTable:
        """Return its "scores", "costs", "allocation" or "evaluations" as a table."""
        return self.runs.table(self.id, name)

    def delete(self) -> None:
        """Take it out of the database."""
        self.runs.delete_run(self.id)

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait and return its `SearchResult`; raises RunFailedError where it has none.

        Of a server it is a `RemoteResult`, which tells and solves without the network.
        """
        state = self.wait(timeout_s)
        if state is not RunState.SUCCEEDED:
            run = self.record()
            reason = run.error_message or f"it is {state}"
            raise RunFailedError(run.error_code or "run_stopped", f"run {self.id}: {reason}")
        return self.runs.result(self.id)


def _runs(
    storage: str | os.PathLike[str] | Store | None,
    ray: str | None,
    url: str | None,
    token: str | None,
) -> Runs:
    if url is None:
        if token is not None:
            raise InvalidInputError("token", "a token is for a server: give its url, too")
        from mpq.stored_runs import StoredRuns

        return StoredRuns(storage, ray)
    if storage is not None or ray is not None:
        raise InvalidInputError(
            "url", "runs are in a storage, which ray may drive, or behind a url: give one of them"
        )
    from mpq.remote import RemoteRuns

    return RemoteRuns(url, token or os.environ.get("MPQ_TOKEN"))
