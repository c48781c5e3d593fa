"""Where runs are: what a database on this machine and a server elsewhere both do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mpq.comparison import Comparison
from mpq.core.jobs import JobSpec
from mpq.datatable import DataTable
from mpq.layer_use import LayerUses
from mpq.service import Watched
from mpq.store.records import EventRecord, RunPage
from mpq.submitted import Submitted


class Runs(Watched, Protocol):
    """Runs in one place; ids are whole but for `resolve_run`."""

    def checked(
        self, job: JobSpec | Mapping[str, Any] | str | Path | None, parts: Mapping[str, Any]
    ) -> Submitted:
        """Return a job whose `parts` replace its own keys, its objects kept."""

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
        """Keep a job and return the id of its run."""

    def resolve_run(self, text: str) -> str:
        """Return the id that an id, its unique start, a run's name or "latest" stands for."""

    def run_page(self, limit: int | None, cursor: str | None, **wanted: Any) -> RunPage:
        """Return some runs with these properties and the cursor of the next ones."""

    def events(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the lines of a log whose number is larger than `after`."""

    def follow(self, run_id: str, after: int) -> Iterator[EventRecord]:
        """Yield the same, and those that come until the run has ended."""

    def resume(self, run_id: str, ray: str | None) -> None:
        """Let a stopped, failed or abandoned run go on."""

    def delete_run(self, run_id: str) -> None:
        """Take a run out of the database."""

    def table(self, run_id: str, name: str) -> DataTable:
        """Return a table of a run by its name."""

    def compare(self, runs: Sequence[str]) -> Comparison:
        """Return how runs differ."""

    def layers(self, **wanted: Any) -> LayerUses:
        """Return how often runs of one model gave each layer what."""

    def result(self, run_id: str) -> Any:
        """Return the result of a run that has succeeded."""

    def close(self) -> None:
        """Close the connections; runs go on."""
