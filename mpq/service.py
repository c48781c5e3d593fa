"""Jobs that outlive whoever submits them: submit, stop, resume, and the loop that drives."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpq.core.dry_run import DryRun
from mpq.core.errors import InvalidInputError, RunFailedError
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.core.live import is_live
from mpq.driving import driver_name
from mpq.store.store import Store

_IDLE_S = 1.0  # between two looks of a driver that has nothing to do
_ABANDONED_S = 30.0
_STARTING_S = 60.0  # a lease taken for a process that has yet to start


def submit(
    store: Store,
    spec: JobSpec,
    *,
    submission_id: str | None = None,
    owner: str | None = None,
    priority: int = 0,
    tags: Sequence[str] = (),
    queue: bool = False,
) -> tuple[str, bool]:
    """Keep a job as a pending run; return its id and whether it is new.

    The same `submission_id` finds the same run again. The run is driven by a process of its own,
    which goes on when this one ends, or, with `queue`, by whichever `mpq drive` is next. Raises
    InvalidInputError for a job with live objects (`job_live`), a bad value, or another job under
    a known submission id (`submission_conflict`).
    """
    _check(spec, submission_id, priority, tags)
    run_id, is_new = store.submit(
        spec,
        body=_digest(spec),
        submission_id=submission_id,
        owner=getpass.getuser() if owner is None else owner,
        priority=priority,
        tags=tags,
        queued=queue,
    )
    if is_new and not queue:
        start_driver(store, run_id)
    return run_id, is_new


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
            f"{name} is an object of this process, {value}, which another one does not have: give "
            "an entry point such as 'package.module:function'",
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

    url = store.url.render_as_string(hide_password=False)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "mpq.dry_run"],
            input=json.dumps(dataclasses.asdict(spec)),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**_environment(), "MPQ_STORAGE": url},
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


def start_driver(store: Store, run_id: str) -> None:
    """Start a process that drives a run and goes on without this one.

    Raises StorageError (`run_driven`) where another one drives it.
    """
    process = _started(store, run_id, None)
    # Somebody waits for it, so that no zombie is left while this process lives.
    threading.Thread(target=process.wait, name=f"driver of {run_id}", daemon=True).start()


def _started(store: Store, run_id: str, driver: str | None) -> subprocess.Popen[bytes]:
    name = driver or driver_name()
    if driver is None:
        store.take(run_id, name, _STARTING_S)
    said = Path(tempfile.gettempdir()) / f"mpq-driver-{run_id}.log"
    command = [sys.executable, "-m", "mpq.driver", run_id, "--instead-of", name]
    url = store.url.render_as_string(hide_password=False)
    with said.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**_environment(), "MPQ_STORAGE": url},  # not an argument: it may hold a password
        )


def _environment() -> dict[str, str]:
    paths = [path for path in sys.path if path]  # entry points that this process can import
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([os.getcwd(), *paths]))}


def stop(store: Store, run_id: str, wait_s: float = 15.0) -> RunState:
    """Ask a run to stop and wait until it has, at most `wait_s`; return its state then."""
    state = store.request_stop(run_id)
    deadline = time.monotonic() + wait_s
    while state not in ENDED and time.monotonic() < deadline:
        time.sleep(0.2)
        state = store.run(run_id).state
        if state not in ENDED and not store.job(run_id).is_driven:
            state = store.request_stop(run_id)  # its driver went away meanwhile
    return state


def wait(
    store: Store,
    run_id: str,
    timeout_s: float | None = None,
    listen: Callable[[Store, str], Any] | None = None,
) -> RunState:
    """Wait until a run has ended and return its state; TimeoutError after `timeout_s`.

    `listen(store, run_id)` is called with every look, five times a second. Raises RunFailedError
    (`run_abandoned`) where its driver went away and no other one came for half a minute.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    driven = time.monotonic()
    while True:
        state = store.run(run_id).state
        if listen is not None:
            listen(store, run_id)
        if state in ENDED:
            return state
        job = store.job(run_id)
        if job.is_driven or state is not RunState.RUNNING:
            driven = time.monotonic()
        elif time.monotonic() - driven > _ABANDONED_S:
            raise RunFailedError(
                "run_abandoned",
                f"run {run_id} lost its driver {job.driver} and no other one came: 'mpq resume "
                f"{run_id}' goes on where it was",
            )
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"run {run_id} is {state} after {timeout_s:g} s")
        time.sleep(0.2)


def drive_queue(
    store: Store,
    *,
    drivers: int = 1,
    per_owner: int | None = None,
    until_empty: bool = False,
    ended: threading.Event | None = None,
) -> int:
    """Drive queued runs, `drivers` at once, each in a process of its own; return how many.

    Runs whose driver went away come again. Ends when `ended` is set, or, with `until_empty`, when
    there is nothing to do; the processes that drive then go on.
    """
    running: list[subprocess.Popen[bytes]] = []
    count = 0
    while not (ended is not None and ended.is_set()):
        running = [process for process in running if process.poll() is None]
        if len(running) < drivers:
            name = driver_name()
            run_id = store.take_next(name, _STARTING_S, per_owner)
            if run_id is not None:
                running.append(_started(store, run_id, name))
                count += 1
                continue
            if until_empty and not running:
                break
        time.sleep(_IDLE_S)
    return count
