"""The process that drives one run: `python -m mpq.driver RUN`, of the database MPQ_STORAGE.

With `--wait` it imports what every run needs and then reads from its standard input which one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mpq.core.errors import MpqError, RunFailedError
from mpq.core.jobs import RunState
from mpq.core.protocols import Executor
from mpq.driving import driving
from mpq.executing import imported, warm_executor_for
from mpq.logged import Logged
from mpq.progress import Advance
from mpq.standby import awaited
from mpq.store.store import Store, open_store

_TOLD_S = 1.0  # between two updates of a stage


class Kept:
    """Progress that the database keeps, so that others see it."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store, self._run_id = store, run_id

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Keep how far a stage is, at most once a second and at its end."""
        done, told = 0, time.monotonic()
        self._store.put_progress(self._run_id, name, 0, total)

        def advance() -> None:
            nonlocal done, told
            done += 1
            if time.monotonic() - told > _TOLD_S:
                told = time.monotonic()
                self._store.put_progress(self._run_id, name, done, total)

        try:
            yield advance
        finally:
            self._store.put_progress(self._run_id, name, done, total)

    def note(self, text: str) -> None:
        """Keep one line."""
        self._store.log(self._run_id, "note", text)


def drive(
    store: Store, run_id: str, instead_of: str | None = None, ready: Executor | None = None
) -> None:
    """Drive a run to its end in this process, which ends soon after `stop` is asked for.

    Scores that are in the database are used again. A job that cannot even begin makes its run
    FAILED. SIGTERM gives the run up: it goes on with the next driver. `ready` has workers that
    wait for tasks.
    """
    signal.signal(signal.SIGTERM, _given_up)
    with driving(store, run_id, instead_of=instead_of, own_process=True):
        try:
            spec = store.run(run_id).spec
            executor = warm_executor_for(spec, ready)

            from mpq.searching import run_job  # imports torch: workers do the same meanwhile

            run_job(spec, store, Logged.of(run_id, Kept(store, run_id)), run_id, executor)
        except Exception as error:
            if store.run(run_id).state in (RunState.PENDING, RunState.RUNNING):
                failure = error if isinstance(error, MpqError) else _told(error)
                store.set_state(run_id, RunState.FAILED, failure)
            raise


def _told(error: Exception) -> MpqError:
    return RunFailedError("run_failed", f"{type(error).__name__}: {error}")


def _given_up(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Drive the run that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m mpq.driver")
    parser.add_argument("run", nargs="?")
    parser.add_argument("--storage")
    parser.add_argument("--instead-of", help="who took the run for this process")
    parser.add_argument("--wait", action="store_true", help="for a line that names the run")
    parser.add_argument("--ray-address", help="the cluster that it holds a worker of meanwhile")
    given = parser.parse_args()
    ready = None
    if given.wait:
        ready = imported(given.ray_address)
        found = awaited()
        if found is None:
            return
        given.run, given.instead_of = found
    with open_store(given.storage) as store:
        try:
            drive(store, given.run, given.instead_of, ready)
        except MpqError as error:
            print(f"error[{error.code}]: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
