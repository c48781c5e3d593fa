"""Submissions and leases, on every kind of database."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from mpq import service
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.core.jobs import RunState
from mpq.driving import driving
from mpq.store import jobs
from mpq.store.store import Store, open_store
from tests.test_service import queued, spec, until


@pytest.fixture
def store(more: Callable[[], str]) -> Iterator[Store]:
    with open_store(more()) as opened:
        yield opened


# Submissions


def test_the_same_submission_is_the_same_run(store: Store) -> None:
    first = service.submit(store, spec(), submission_id="nightly", queue=True, tags=["a", "b", "a"])
    assert first[1]
    assert service.submit(store, spec(), submission_id="nightly", queue=True) == (first[0], False)
    with pytest.raises(InvalidInputError, match=r"'nightly' is run .*, which is another job"):
        service.submit(store, spec(seed=1), submission_id="nightly", queue=True)
    assert len(store.runs()) == 1
    job = store.job(first[0])
    assert (job.submission_id, job.tags, job.attempts) == ("nightly", ("a", "b"), 0)
    assert store.run(first[0]).state is RunState.PENDING


def test_many_submitters_of_the_same_submissions_make_each_once(store: Store) -> None:
    """16 threads, 40 submissions, each sent by everybody."""

    def send(_: int) -> list[tuple[str, bool]]:
        return [service.submit(store, spec(), submission_id=f"s{i}", queue=True) for i in range(40)]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(send, range(16)))
    assert len({tuple(run_id for run_id, _ in one) for one in found}) == 1
    assert sum(is_new for one in found for _, is_new in one) == 40
    assert len(store.runs(limit=None)) == 40


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model": "<live Linear>"}, {}, "model is an object of this process"),
        ({}, {"submission_id": " "}, "1 to 200 characters"),
        ({}, {"priority": 1.5}, "whole number from -1000"),
        ({}, {"tags": "word"}, "tags is a list of words"),
    ],
)
def test_what_cannot_be_submitted_is_told(
    store: Store, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        service.submit(store, spec(**changes), queue=True, **options)
    assert store.runs() == []


# Leases


def test_only_one_drives_until_the_lease_ends(store: Store) -> None:
    run_id = queued(store)
    store.take(run_id, "a:1", 1000)
    with pytest.raises(StorageError, match=r"is being driven by a:1 since .* UTC: wait, or stop"):
        store.take(run_id, "b:2", 1000)
    store.take(run_id, "a:1", -1)  # it ends, and another one takes over
    store.take(run_id, "b:2", 1000)
    with pytest.raises(StorageError, match="now driven by b:2"):
        store.renew(run_id, "a:1", 10)
    store.release(run_id, "a:1")
    assert store.job(run_id).is_driven
    store.release(run_id, "b:2")
    job = store.job(run_id)
    assert (job.driver, job.is_driven, job.attempts) == ("b:2", False, 3)
    with pytest.raises(InvalidInputError, match="unknown run"):
        store.take("nothing", "a:1", 10)


def test_leases_follow_the_clock_of_the_database(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = queued(store)
    store.take(run_id, "a:1", 20)
    real = jobs.now
    monkeypatch.setattr(jobs, "now", lambda s: real(s) + timedelta(seconds=19))
    with pytest.raises(StorageError, match="is being driven"):
        store.take(run_id, "b:2", 20)
    monkeypatch.setattr(jobs, "now", lambda s: real(s) + timedelta(seconds=21))
    store.take(run_id, "b:2", 20)
    monkeypatch.setattr("time.time", lambda: 0.0)  # whatever this machine believes
    assert store.job(run_id).driver == "b:2"


def test_claims_are_of_one_driver_each(store: Store) -> None:
    """8 claimers, 60 runs: every run once, whoever comes first."""
    wanted = {queued(store) for _ in range(60)}

    def claim(number: int) -> list[str]:
        found = []
        while (run_id := store.take_next(f"d{number}:1", 1000)) is not None:
            found.append(run_id)
        return found

    with ThreadPoolExecutor(8) as pool:
        found = [run_id for one in pool.map(claim, range(8)) for run_id in one]
    assert len(found) == 60
    assert set(found) == wanted


def test_priority_then_fairness_then_age(store: Store) -> None:
    old = [queued(store, owner="ann") for _ in range(3)]
    other = queued(store, owner="bob")
    urgent = queued(store, owner="ann", priority=5)
    assert store.take_next("d:1", 1000) == urgent
    assert store.take_next("d:1", 1000) == other  # ann has one, bob none
    assert store.take_next("d:1", 1000, per_owner=1) is None
    assert store.take_next("d:1", 1000, per_owner=2) == old[0]
    assert store.take_next("d:1", 1000, per_owner=2) is None
    assert [store.take_next("d:1", 1000) for _ in range(3)] == [old[1], old[2], None]


def test_an_abandoned_run_comes_again_and_what_is_not_queued_does_not(store: Store) -> None:
    run_id = queued(store)
    own = store.create_run(spec())
    assert store.take_next("a:1", 1000) == run_id
    store.start_run(run_id, "here")
    assert store.take_next("b:2", 1000) is None
    store.take(run_id, "a:1", -1)
    assert store.take_next("b:2", 1000) == run_id
    assert "taken over from a:1" in store.notes(run_id)[-1]
    assert store.run(own).state is RunState.PENDING


def test_who_waits_for_an_abandoned_run_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = queued(store)
    with pytest.raises(TimeoutError, match=r"is PENDING after 0\.3 s"):
        service.wait(store, run_id, 0.3)
    store.take(run_id, "a:1", -1)
    store.start_run(run_id, "here")
    monkeypatch.setattr(service, "_ABANDONED_S", 0.3)
    with pytest.raises(RunFailedError, match=f"lost its driver a:1 .*'mpq resume {run_id}'"):
        service.wait(store, run_id, 10)


def test_a_driver_hears_of_stop_and_of_a_lost_lease(store: Store) -> None:
    run_id, other = queued(store), queued(store)

    def stopped() -> None:
        with driving(store, run_id):
            assert service.stop(store, run_id, wait_s=0) is RunState.PENDING
            time.sleep(10)

    def robbed() -> None:
        with driving(store, other, instead_of="a:1"):
            store.take(other, str(store.job(other).driver), -1)
            store.take(other, "b:2", 1000)
            time.sleep(10)

    for work in (stopped, robbed):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert not store.job(run_id).is_driven
    assert store.job(other).driver == "b:2"
    assert "lost its lease" in store.notes(other)[-1]


def test_a_thread_of_a_program_is_not_interrupted(store: Store) -> None:
    run_id = queued(store)

    def work() -> None:
        with driving(store, run_id):
            time.sleep(3)

    thread = threading.Thread(target=work)
    thread.start()
    until(lambda: store.job(run_id).is_driven)
    service.stop(store, run_id, wait_s=0)
    thread.join()
    assert "cannot be stopped" in store.notes(run_id)[-1]
