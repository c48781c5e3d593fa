"""What a store does for jobs: submissions, and the leases of those who drive them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from mpq.core.jobs import JobSpec, RunState
from mpq.store import jobs
from mpq.store.patience import Patience, patient
from mpq.store.records import JobRecord

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


@patient
class Leases:
    """The methods of a store for jobs; each is one transaction."""

    _patience: Patience

    def _read(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def _write(self, run_id: str | None = None) -> AbstractContextManager[Session]:
        raise NotImplementedError

    def submit(
        self,
        spec: JobSpec,
        *,
        body: str = "",
        submission_id: str | None = None,
        owner: str = "",
        priority: int = 0,
        tags: Sequence[str] = (),
        queued: bool = False,
    ) -> tuple[str, bool]:
        """Add a pending run, or find the one of this submission; return its id and if it is new.

        Raises InvalidInputError (`submission_conflict`) for another job under a known id.
        """
        from mpq import __version__  # late: `mpq` itself may still be loading

        with self._write() as session:
            return jobs.submit(
                session,
                spec,
                "",
                __version__,
                body=body,
                submission_id=submission_id,
                owner=owner,
                priority=priority,
                tags=tags,
                queued=queued,
            )

    def job(self, run_id: str) -> JobRecord:
        """Return who submitted a run and who drives it."""
        with self._read() as session:
            return jobs.one(session, run_id)

    def take(self, run_id: str, driver: str, seconds: float, instead_of: str | None = None) -> None:
        """Let a driver drive a run; raises StorageError (`run_driven`) where another one does.

        A stopped or failed run is pending again; the lease of `instead_of` is taken on.
        """
        with self._write() as session:
            jobs.take(session, run_id, driver, seconds, instead_of)

    def take_next(self, driver: str, seconds: float, per_owner: int | None = None) -> str | None:
        """Take the queued or abandoned run that is next, None where there is none."""
        with self._write() as session:
            return jobs.take_next(session, driver, seconds, per_owner)

    def queue(self, run_id: str) -> None:
        """Let a stopped, failed or abandoned run wait for whichever driver is next.

        Raises StorageError (`run_driven`) where one has it, InvalidInputError where it is over.
        """
        with self._write() as session:
            jobs.queue(session, run_id)

    def set_tags(self, run_id: str, tags: Sequence[str]) -> None:
        """Give a run these tags in place of those it has."""
        with self._write(run_id) as session:
            jobs.set_tags(session, run_id, tags)

    def renew(self, run_id: str, driver: str, seconds: float) -> bool:
        """Make a lease longer; return whether the run was asked to stop.

        Raises StorageError (`lease_lost`) where another driver has the run.
        """
        with self._write() as session:
            return jobs.renew(session, run_id, driver, seconds)

    def release(self, run_id: str, driver: str) -> None:
        """End a lease."""
        with self._write() as session:
            jobs.release(session, run_id, driver)

    def request_stop(self, run_id: str) -> RunState:
        """Ask a run to stop; one that nobody drives is stopped at once. Returns its state."""
        with self._write() as session:
            return jobs.request_stop(session, run_id)
