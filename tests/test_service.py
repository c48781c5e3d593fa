"""Jobs that outlive whoever submits them: submissions, leases, stop, resume, killed drivers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mpq
from mpq import service
from mpq.cli import app
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.core.jobs import ENDED, JobSpec, RunState
from mpq.store import jobs
from mpq.store.store import Store, open_store

JOB: dict[str, Any] = {
    "model": "tests.slow_net:make_model",
    "calibration": "tests.slow_net:batches",
    "budgets": ("memory <= 60%",),
    "schemes": ("int3", "int4", "int8"),
    "metric": "kl",
    "executor": "serial",
    "refine": 0,
}


def spec(**changes: Any) -> JobSpec:
    return JobSpec(**JOB | changes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "runs.db") as opened:
        yield opened


def queued(store: Store, **options: Any) -> str:
    run_id, is_new = service.submit(store, spec(), queue=True, **options)
    assert is_new
    return run_id


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setenv("MPQ_TEST_SLEEP", str(seconds))


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scores(store: Store, run_id: str) -> dict[str, Any]:
    table = store.sensitivity(run_id)
    return {f"{unit} {s}": v for (unit, s), v in zip(table.cells, table.values, strict=True)}


def test_a_submitted_run_is_driven_by_a_process_of_its_own(store: Store) -> None:
    client = mpq.Client(store)
    run = client.submit(JOB | {"name": "toy"}, tags=["night"])
    assert asyncio.run(run.wait_async(60)) is RunState.SUCCEEDED
    until(lambda: not run.job().is_driven)
    here = mpq.run_job(spec(), store)
    result = run.result()
    assert result.allocation == here.allocation
    assert scores(store, run.id) == scores(store, here.run_id)
    assert {s.stage: (s.done, s.total) for s in run.progress()}["scoring (kl)"] == (10, 10)
    assert [e.kind for e in run.logs()]
    with pytest.raises(InvalidInputError, match="has succeeded: there is nothing to do"):
        run.resume()
    run.delete()
    assert [r.id for r in client.runs()] == [here.run_id]


def test_a_job_that_cannot_begin_fails_with_its_reason(store: Store) -> None:
    run = mpq.Client(store).submit(JOB | {"model": "tests.slow_net:broken"})
    with pytest.raises(RunFailedError, match="the weights are gone"):
        run.result(60)
    assert run.status() is RunState.FAILED


def test_stop_and_resume(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, 0.3)
    run = mpq.Client(store).submit(JOB)
    until(lambda: any(s.stage.startswith("scoring") and s.done for s in run.progress()))
    driver = int(str(run.job().driver).split(":")[1])
    started = time.monotonic()
    assert run.stop() is RunState.STOPPED
    assert time.monotonic() - started < 10
    until(lambda: not alive(driver))
    before = scored(store)
    assert 0 < before < 10
    slow(monkeypatch, 0)
    run.resume()
    assert run.wait(60) is RunState.SUCCEEDED
    assert run.job().attempts == 2
    assert scores(store, run.id) == scores(store, mpq.run_job(spec(), store).run_id)


PHASES: dict[str, tuple[dict[str, Any], str]] = {
    "scoring": ({"executor": "ray", "num_workers": 2}, "scoring"),
    "timing": (
        {"budgets": ("latency <= 90%",), "schemes": ("fp32", "int8:int8"), "latency_seconds": 60.0},
        "kernel latency",
    ),
    "searching": (
        {"solver": "evolution", "schemes": tuple(f"int{b}" for b in range(2, 9))},
        "measuring",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_stops_in_ten_seconds_whatever_it_does(
    store: Store, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """And nothing is left of its processes."""
    changes, stage = PHASES[phase]
    slow(monkeypatch, 0.02 if phase == "timing" else 0.1)
    run = mpq.Client(store).submit(JOB | changes)
    until(lambda: any(s.stage.startswith(stage) and s.done for s in run.progress()), 120)
    driver = int(str(run.job().driver).split(":")[1])
    family = descendants(driver)
    started = time.monotonic()
    assert run.stop() is RunState.STOPPED
    assert time.monotonic() - started < 10
    until(lambda: not any(map(alive, [driver, *family])), 20)


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def scored(store: Store) -> int:
    from sqlalchemy import func, select

    from mpq.store.models import PartialRow

    with store._read() as session:
        return session.scalar(select(func.count()).select_from(PartialRow)) or 0


def drive_and_kill(store: Store, run_id: str, after_s: float) -> None:
    """Start a driver process and kill it some seconds later, or when it is done."""
    url = store.url.render_as_string(hide_password=False)
    environment = os.environ | {"MPQ_STORAGE": url, "MPQ_TEST_SLEEP": "0.05"}
    command = [sys.executable, "-m", "mpq.driver", run_id]
    with subprocess.Popen(command, env=environment, stderr=-3) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)


def killed_and_resumed(store: Store, points: int, seed: int) -> None:
    """Kill the driver at random points; all that was committed is used, the answer is the same."""
    import random

    rng = random.Random(seed)
    expected = mpq.run_job(spec(), store)
    with store._write() as session:
        from sqlalchemy import delete

        from mpq.store.models import PartialRow

        session.execute(delete(PartialRow))
    run_id = queued(store)
    for _ in range(points):
        before = scored(store)
        drive_and_kill(store, run_id, rng.uniform(1.5, 4.0))
        assert scored(store) >= before
        if store.run(run_id).state is RunState.SUCCEEDED:
            break
        with store._write() as session:  # as if twenty seconds had passed
            jobs_now = jobs.now(session)
            from sqlalchemy import update

            from mpq.store.models import JobRow

            session.execute(update(JobRow).values(lease_until=jobs_now - timedelta(seconds=1)))
    if store.run(run_id).state is not RunState.SUCCEEDED:
        drive_and_kill(store, run_id, 120)
    assert store.run(run_id).state is RunState.SUCCEEDED
    assert scores(store, run_id) == scores(store, expected.run_id)
    found = mpq.SearchResult(store, run_id)
    assert found.allocation == expected.allocation


def test_a_killed_driver_loses_nothing(store: Store) -> None:
    killed_and_resumed(store, 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_driver_killed_at_twenty_points_loses_nothing(store: Store, seed: int) -> None:
    killed_and_resumed(store, 4, seed + 1)


def test_the_second_driver_ends_with_four(store: Store) -> None:
    run_id = queued(store)
    store.take(run_id, "a:1", 1000)
    url = store.url.render_as_string(hide_password=False)
    started = time.monotonic()
    found = CliRunner().invoke(app, ["resume", run_id, "--storage", url])
    assert isinstance(found.exception, StorageError)
    assert found.exception.exit_code == 4
    assert "is being driven by a:1 since" in str(found.exception)
    assert time.monotonic() - started < 5


def test_the_queue_is_driven_until_it_is_empty(store: Store) -> None:
    ids = [queued(store, owner=f"user{i}") for i in range(3)]
    assert service.drive_queue(store, drivers=2, until_empty=True) == 3
    assert {store.run(run_id).state for run_id in ids} == {RunState.SUCCEEDED}


# The command line


def test_a_driver_that_waits_takes_the_next_run_and_ends_with_its_queue(store: Store) -> None:
    others, ended = set(descendants(os.getpid())), threading.Event()
    options: dict[str, Any] = {"ended": ended, "ready": True}
    drives = threading.Thread(target=service.drive_queue, args=(store,), kwargs=options)
    drives.start()
    until(lambda: set(descendants(os.getpid())) - others)
    (waiting,) = set(descendants(os.getpid())) - others
    run_id = queued(store)
    until(lambda: store.run(run_id).state in ENDED)
    assert store.run(run_id).state is RunState.SUCCEEDED
    assert str(store.job(run_id).driver).split(":")[1] == str(waiting)
    until(lambda: waiting not in descendants(os.getpid()))
    ended.set()
    drives.join(30)
    until(lambda: not set(descendants(os.getpid())) - others)


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPQ_STORAGE", str(tmp_path / "runs.db"))
    job = tmp_path / "job.json"
    job.write_text(json.dumps(JOB | {"name": "toy"}))
    runner = CliRunner()

    def said(*words: str, code: int = 0) -> str:
        found = runner.invoke(app, list(words))
        assert found.exit_code == code, (words, found.output, found.exception)
        return found.stdout

    run_id = said("submit", str(job), "--queue", "--submission-id", "x", "--tag", "t").strip()
    assert said("submit", str(job), "--queue", "--submission-id", "x").strip() == run_id
    assert "nobody drives it" in said("status", "toy")
    assert said("stop", "toy").strip() == f"{run_id} STOPPED"
    assert said("resume", "toy", "--detach").strip() == run_id
    assert "SUCCEEDED" in said("status", "toy", "--wait")
    status = json.loads(said("status", "toy", "--json"))
    assert (status["state"], status["tags"], status["attempts"]) == ("SUCCEEDED", ["t"], 1)
    assert "chosen: " in said("logs", "toy", "-f")
    assert said("delete", "toy").strip() == run_id
    with open_store() as store:
        assert store.runs() == []
