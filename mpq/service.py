"""Jobs that outlive whoever submits them: submit, stop, resume, and the loop that drives."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from mpq.core.dry_run import DryRun
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.core.live import is_live
from mpq.driving import driver_name
from mpq.standby import Standby, said_in
from mpq.store.records import JobRecord, RunRecord, StageRecord
from mpq.store.store import Store
from mpq.transport import cluster_for, fail_if_lost, start_in_ray, waits_in_ray
from mpq.trust import TRUSTED, trusted_text

_LOG = logging.getLogger("mpq.service")
_LOOK_S = 0.2  # between two looks of somebody who waits
_IDLE_S = 0.5  # between two looks of a driver that has nothing to do
_AWAY_S = 5.0  # between two looks while the database is away
_ABANDONED_S = 30.0
_RAY_LOOK_S = 2.0  # between two looks at the Ray job of a run that has not begun
_STARTING_S = 60.0  # a lease taken for a process that has yet to start


class Watched(Protocol):
    """Where a run can be looked at and stopped: a store, or a server."""

    def run(self, run_id: str) -> RunRecord:
        """Return a run."""

    def job(self, run_id: str) -> JobRecord:
        """Return who submitted it and who drives it."""

    def progress(self, run_id: str) -> list[StageRecord]:
        """Return how far its stages are."""

    def request_stop(self, run_id: str) -> RunState:
        """Ask it to stop and return its state."""


def submit(
    store: Store,
    spec: JobSpec,
    *,
    submission_id: str | None = None,
    owner: str | None = None,
    priority: int = 0,
    tags: Sequence[str] = (),
    queue: bool = False,
    trusted: Sequence[str] = (),
    ray: str | None = None,
) -> tuple[str, bool]:
    """Keep a job as a pending run; return its id and whether it is new.

    The same `submission_id` finds the same run again. The run is driven by a process of its own,
    which goes on when this one ends and also trusts the modules in `trusted` (mpq.trust), or,
    with `queue`, by whichever `mpq drive` is next, or, with `ray`, by a job of the Ray cluster
    whose dashboard is there (mpq.transport). Raises InvalidInputError for a job with live
    objects (`job_live`), a bad value, or another job under a known submission id
    (`submission_conflict`).
    """
    _check(spec, submission_id, priority, tags)
    cluster = None if ray is None else cluster_for(store, ray)
    if cluster is not None and queue:
        raise InvalidInputError("queue", "a run waits for 'mpq drive' or goes to Ray, not both")
    if cluster is not None and spec.executor == "ray":
        spec = replace(spec, ray_address="auto")  # where its driver will be
    run_id, is_new = store.submit(
        spec,
        body=_digest(spec),
        submission_id=submission_id,
        owner=getpass.getuser() if owner is None else owner,
        priority=priority,
        tags=tags,
        queued=queue,
    )
    if cluster is not None:
        if is_new or _was_left(store, run_id):
            try:
                start_in_ray(store, run_id, cluster, trusted, _python_path())
            except StorageError as error:
                if error.code != "run_driven":  # by whoever submitted the same at once
                    raise
    elif is_new and not queue:
        start_driver(store, run_id, trusted)
    return run_id, is_new


def _was_left(store: Store, run_id: str) -> bool:
    """Tell whether whoever submitted a run went away before its Ray job was there."""
    is_pending = store.run(run_id).state is RunState.PENDING
    return is_pending and store.job(run_id).driver is None


def _digest(spec: JobSpec) -> str:
    text = json.dumps(dataclasses.asdict(spec), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _check(spec: JobSpec, submission_id: str | None, priority: int, tags: Sequence[str]) -> None:
    parts = {
        name: value
        for name in ("model", "calibration", "held_out", "sample", "evaluate", "loss")
        if is_live(value := getattr(spec, name))
    }
    for name, value in parts.items():
        raise InvalidInputError(
            "job_live",
            f"{name} is an object of this process, {value}, which another one does not have: pass "
            "it to client.submit, or give an entry point such as 'package.module:function'",
        )
    if submission_id is not None and not (submission_id.strip() and len(submission_id) <= 200):
        raise InvalidInputError(
            "submission_id",
            f"a submission id has 1 to 200 characters, got {submission_id!r}",
        )
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1000:
        raise InvalidInputError(
            "priority", f"a priority is a whole number from -1000 to 1000, got {priority!r}"
        )
    if isinstance(tags, str) or not all(isinstance(t, str) and t.strip() for t in tags):
        raise InvalidInputError("tags", f"tags is a list of words, got {tags!r}")


def dry_run(store: Store, spec: JobSpec, timeout_s: float = 60.0) -> DryRun:
    """Return what a job would search, found by a process of its own that loads its network.

    Raises InvalidInputError for a job that could not begin, RunFailedError (`dry_run`) where that
    process failed or took longer than `timeout_s`.
    """
    import pydantic

    try:
        process = subprocess.run(
            [sys.executable, "-m", "mpq.dry_run"],
            input=json.dumps(dataclasses.asdict(spec)),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=_environment(store),
        )
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            "dry_run",
            f"the network is not loaded and traced after {timeout_s:g} s: submit the job without "
            "a dry run",
        ) from None
    if process.returncode or not process.stdout:
        said = process.stderr.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        raise RunFailedError("dry_run", f"the dry run failed: {said[0][:300]}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        raise InvalidInputError(**answer["error"])
    return pydantic.TypeAdapter(DryRun).validate_python(answer["found"])


def start_driver(
    store: Store, run_id: str, trusted: Sequence[str] = (), ray: str | None = None
) -> None:
    """Start a process that drives a run and goes on without this one, or such a Ray job.

    It also trusts the modules in `trusted` (mpq.trust). Raises StorageError (`run_driven`) where
    another one drives it.
    """
    if ray is not None:
        start_in_ray(store, run_id, cluster_for(store, ray), trusted, _python_path())
        return
    process = _started(store, run_id, None, trusted)
    # Somebody waits for it, so that no zombie is left while this process lives.
    threading.Thread(target=process.wait, name=f"driver of {run_id}", daemon=True).start()


def _started(
    store: Store, run_id: str, driver: str | None, trusted: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    name = driver or driver_name()
    if driver is None:
        store.take(run_id, name, _STARTING_S)
    command = [sys.executable, "-m", "mpq.driver", run_id, "--instead-of", name]
    with said_in(run_id).open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=_environment(store, trusted),
        )


def _environment(store: Store, trusted: Sequence[str] = ()) -> dict[str, str]:
    """Return that of a process for this database, which is no argument: it may hold a password."""
    url = store.url.render_as_string(hide_password=False)
    also = {TRUSTED: trusted_text(trusted), "MPQ_STORAGE": url}
    return {**os.environ, "PYTHONPATH": _python_path(), **also}


def _python_path() -> str:
    paths = [path for path in sys.path if path]  # entry points that this process can import
    return os.pathsep.join(dict.fromkeys([os.getcwd(), *paths]))


def _database(runs: Watched) -> Store | None:
    """Return the database that runs are in, None where a server has it."""
    return runs if isinstance(runs, Store) else getattr(runs, "store", None)


def stop(runs: Watched, run_id: str, wait_s: float = 15.0) -> RunState:
    """Ask a run to stop and wait until it has, at most `wait_s`; return its state then."""
    store = _database(runs)
    if store is not None and waits_in_ray(job := store.job(run_id)):
        store.release(run_id, str(job.driver))  # its job finds it stopped when it begins
    state = runs.request_stop(run_id)
    deadline = time.monotonic() + wait_s
    while state not in ENDED and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        state = runs.run(run_id).state
        if state not in ENDED and not runs.job(run_id).is_driven:
            state = runs.request_stop(run_id)  # its driver went away meanwhile
    return state


def wait(
    runs: Watched,
    run_id: str,
    timeout_s: float | None = None,
    listen: Callable[[Watched, str], Any] | None = None,
) -> RunState:
    """Wait until a run has ended and return its state; TimeoutError after `timeout_s`.

    `listen(runs, run_id)` is called with every look, five times a second. Raises RunFailedError
    (`run_abandoned`) where its driver went away and no other one came for half a minute.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    driven = looked = time.monotonic()
    store, untold = _database(runs), None
    while True:
        if store is not None and time.monotonic() - looked > _RAY_LOOK_S:
            untold, looked = fail_if_lost(store, run_id), time.monotonic()
        state = runs.run(run_id).state
        if listen is not None:
            listen(runs, run_id)
        if state in ENDED:
            return state
        job = runs.job(run_id)
        if job.is_driven or (state is not RunState.RUNNING and untold is None):
            driven = time.monotonic()
        elif time.monotonic() - driven > _ABANDONED_S:
            raise RunFailedError(
                "run_abandoned",
                f"run {run_id} lost its driver {job.driver} and no other one came: 'mpq resume "
                f"{run_id}' goes on where it was",
            )
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"run {run_id} is {state} after {timeout_s:g} s")
        time.sleep(_LOOK_S)


def drive_queue(
    store: Store,
    *,
    drivers: int = 1,
    per_owner: int | None = None,
    until_empty: bool = False,
    ended: threading.Event | None = None,
    ready: bool = False,
    ray_address: str | None = None,
) -> int:
    """Drive queued runs, `drivers` at once, each in a process of its own; return how many.

    Runs whose driver went away come again. Ends when `ended` is set, or, with `until_empty`, when
    there is nothing to do; the processes that drive then go on. With `ready` one process more has
    imported everything and waits for the next run, which so begins seconds earlier, with
    `ray_address` one worker of that cluster as well.
    """
    running: list[subprocess.Popen[bytes]] = []
    count, standby, is_away = 0, None, False
    try:
        while not (ended is not None and ended.is_set()):
            running = [process for process in running if process.poll() is None]
            if ready and standby is None:
                standby = Standby(_environment(store), ray_address)
            if len(running) < drivers:
                name = driver_name()
                try:
                    run_id, is_away = store.take_next(name, _STARTING_S, per_owner), False
                except StorageError as error:  # those who drive wait for it as well
                    if not is_away:
                        _LOG.warning("queued runs wait: %s", error)
                    is_away = True
                    time.sleep(_AWAY_S)
                    continue
                if run_id is not None:
                    given = None if standby is None else standby.give(run_id, name)
                    running.append(given or _started(store, run_id, name))
                    count, standby = count + 1, None
                    continue
                if until_empty and not running:
                    break
            time.sleep(_IDLE_S)
    finally:
        if standby is not None:
            standby.close()
    return count
