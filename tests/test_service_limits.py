"""What a service meets in time: a full disk, a cluster that dies, hundreds of runs in a row."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

import mpq
from mpq.core.errors import StorageError
from mpq.core.jobs import RunState
from mpq.store import jobs
from mpq.store.models import JobRow
from mpq.store.store import Store, open_store
from tests.test_service import JOB, descendants, queued, scored, scores, slow, spec, until

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("cannot mount a disk of its own: not root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def let_go(store: Store) -> None:
    """Let every lease end, as if its time had passed."""
    with store._write() as session:
        ended = jobs.now(session) - timedelta(seconds=1)
        session.execute(update(JobRow).values(lease_until=ended))


def test_a_full_disk_is_told_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    path = small_disk / "runs.db"
    with open_store(tmp_path / "other.db") as other:
        expected = scores(other, mpq.run_job(spec(), other).run_id)
    with open_store(path) as store:
        run_id = queued(store)
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1024))
                file.flush()
        with pytest.raises(StorageError, match=r"no space left for .*runs\.db: free some"):
            mpq.run_job(spec(), store, run_id=run_id)
        before = scored(store)
        filler.unlink()
        assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert scored(store) == before
        let_go(store)
        mpq.run_job(spec(), store, run_id=run_id)
        assert store.run(run_id).state is RunState.SUCCEEDED
        assert scores(store, run_id) == expected


def test_a_cluster_that_dies_ends_the_run_which_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of the local Ray and all that hangs on it are killed in the middle of scoring."""
    slow(monkeypatch, 0.3)
    with open_store(tmp_path / "runs.db") as store:
        run = mpq.Client(store).submit(JOB | {"executor": "ray", "num_workers": 2})
        until(lambda: any(s.stage.startswith("scoring") and s.done for s in run.progress()), 120)
        driver = int(str(run.job().driver).split(":")[1])
        for pid in descendants(driver):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # Ray ends a process that has lost its head: nobody can say more than that it is gone.
        until(lambda: not run.job().is_driven, 150)
        before = scored(store)
        assert before > 0
        slow(monkeypatch, 0)
        started = time.monotonic()
        run.resume()
        until(lambda: run.progress() and run.status() is not RunState.PENDING, 60)
        assert time.monotonic() - started < 30
        assert run.wait(120) is RunState.SUCCEEDED
        assert scores(store, run.id) == scores(store, mpq.run_job(spec(), store).run_id)


SOAK_RUNS = int(os.environ.get("MPQ_SOAK_RUNS", "120"))


@pytest.mark.timeout(300 + 3 * SOAK_RUNS)
def test_many_runs_in_a_row_leave_nothing_behind(tmp_path: Path) -> None:
    """After a warm-up memory and open files stay as they are; no process is left."""

    def used() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir()))

    others = set(descendants(os.getpid()))  # a local Ray of other tests
    with open_store(tmp_path / "runs.db") as store:
        for seed in range(20):
            mpq.run_job(spec(seed=seed), store)
        memory, files = used()
        for seed in range(20, SOAK_RUNS):
            mpq.run_job(spec(seed=seed), store)
        after, files_after = used()
        assert len(store.runs(limit=None)) == SOAK_RUNS
    assert after < 1.05 * memory
    assert files_after <= files + 10  # a pool of five connections may have filled meanwhile
    assert set(descendants(os.getpid())) <= others
