"""Several processes on one SQLite file: nothing fails, nothing is lost, nothing is twice."""

from __future__ import annotations

import multiprocessing
import sqlite3
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np

from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec, RunState
from mpq.store import open_store, upgrade

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=())
# Fresh processes, as spawned ones are, which share what takes long: the imports.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["numpy", "pytest", "alembic.command", "mpq.store"])


def child(work: Callable[..., Any], path: str, n: int, start: Barrier, answers: Queue[Any]) -> None:
    start.wait()
    try:
        answers.put(("done", work(path, n)))
    except BaseException:
        answers.put(("failed", traceback.format_exc()))


def together(processes: int, work: Callable[..., Any], path: Path) -> list[Any]:
    """Run `work(path, number)` in processes that start at the same moment."""
    start, answers = FORKSERVER.Barrier(processes), FORKSERVER.Queue()
    workers = [
        FORKSERVER.Process(target=child, args=(work, str(path), n, start, answers))
        for n in range(processes)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        worker.close()
    answers.close()
    answers.join_thread()
    assert [text for state, text in found if state == "failed"] == []
    return [answer for _, answer in found]


def count(path: Path, query: str) -> Any:
    raw = sqlite3.connect(path)
    found = raw.execute(query).fetchone()[0]
    raw.close()
    return found


def create(path: str, n: int) -> int:
    for i in range(8):
        with open_store(f"{path}{i}.db") as store:
            store.create_run(SPEC)
    return n


def test_new_database_is_made_by_many_at_once(tmp_path: Path) -> None:
    together(4, create, tmp_path / "new")
    for i in range(8):
        path = tmp_path / f"new{i}.db"
        assert count(path, "SELECT count(*) FROM runs") == 4
        assert count(path, "SELECT count(*) FROM alembic_version") == 1
        assert count(path, "PRAGMA journal_mode") == "wal"


def migrate(path: str, n: int) -> bool:
    return upgrade(path)[0] is None


def test_of_several_migrations_at_once_one_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    assert sorted(together(3, migrate, path)) == [False, False, True]
    with open_store(path) as store:
        assert store.runs() == []


def write(path: str, n: int) -> str:
    with open_store(path) as store:
        run_id = store.create_run(SPEC)
        for i in range(12):
            store.log(run_id, "step", f"{n} {i}")
        for i in range(12):  # the same keys in all processes
            store.put_partial(f"key {i}", {"x": np.full(1000, n)}, 0.0)
    return run_id


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    open_store(path).close()
    run_ids = together(8, write, path)  # 25 transactions each
    with open_store(path) as store:
        assert {run.id for run in store.runs()} == set(run_ids)
        for run_id in run_ids:
            steps = [event.message.split()[1] for event in store.events(run_id)]
            assert steps == [str(i) for i in range(12)]
        found = store.partials(f"key {i}" for i in range(12))
        assert len(found) == 12
        assert all(len(set(partial["x"].tolist())) == 1 for partial in found.values())
    assert count(path, "SELECT count(*) FROM events") == 96
    assert count(path, "SELECT count(*) FROM partials") == 12
    assert count(path, "PRAGMA integrity_check") == "ok"


def start(path: str, n: int) -> bool:
    with open_store(path) as store:
        try:
            store.set_state(store.resolve_run("latest"), RunState.RUNNING)
        except InvalidInputError:
            return False
    return True


def test_a_run_is_started_once(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with open_store(path) as store:
        store.create_run(SPEC)
    assert sorted(together(4, start, path)) == [False, False, False, True]
