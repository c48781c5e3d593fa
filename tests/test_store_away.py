"""A server that stops in the middle of the work: it is waited for, nothing is lost or twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import MpqWarning, StorageError
from mpq.core.jobs import JobSpec, RunState
from mpq.store import Store, open_store, patience
from mpq.store.patience import again, once
from tests.databases import sql
from tests.postgres import Server

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=())
X = {"x": np.arange(3.0)}
TASKS = 200


@pytest.fixture
def store(stoppable: Server) -> Iterator[Store]:
    with open_store(stoppable.new_database()) as opened:
        yield opened


def text_of(store: Store) -> str:
    return store.url.render_as_string(hide_password=False)


def away_for(server: Server, seconds: float) -> threading.Thread:
    """Stop a server at once and start it again later."""
    server.stop()

    def later() -> None:
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=later)
    thread.start()
    return thread


def test_a_call_waits_for_its_server(
    store: Store, stoppable: Server, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = store.create_run(SPEC)
    back = away_for(stoppable, 1.0)
    with pytest.warns(MpqWarning, match=r"was away for \d+\.\d s") as told:
        store.log(run_id, "kind", "message")
    back.join()
    assert len(told) == 1
    assert [event.message for event in store.events(run_id)] == ["message"]
    said = [record.getMessage() for record in caplog.records if record.name == "mpq.store"]
    assert "waiting up to 600 s" in said[0]
    assert "was away for" in said[-1]
    assert len(said) == 2


CALLS: dict[str, Callable[[Store, str], Any]] = {
    "create": lambda store, run_id: store.create_run(SPEC),
    "log": lambda store, run_id: store.log(run_id, "kind", "message"),
    "state": lambda store, run_id: store.set_state(run_id, RunState.RUNNING),
    "partial": lambda store, run_id: store.put_partial("key", X, 1.0),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_is_lost_is_done_once(
    store: Store, stoppable: Server, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks just before the commit, or between it and its answer."""
    run_id = store.create_run(SPEC)
    broken = []
    commit = store._engine.dialect.do_commit

    def lose(connection: Any) -> None:
        if not broken:
            broken.append(connection)
            if when == "after":
                commit(connection)
            stoppable.sql(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
            connection.execute("SELECT 1")  # notices
        commit(connection)

    monkeypatch.setattr(store._engine.dialect, "do_commit", lose)
    with pytest.warns(MpqWarning, match="was away"):
        CALLS[name](store, run_id)
    assert broken
    assert len(store.runs()) == (2 if name == "create" else 1)
    assert len(store.events(run_id)) == (1 if name == "log" else 0)
    assert (store.run(run_id).state is RunState.RUNNING) == (name == "state")
    assert list(store.partial_seconds(["key"])) == (["key"] if name == "partial" else [])


def test_a_server_that_stays_away_is_given_up(
    store: Store, stoppable: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = store.create_run(SPEC)
    monkeypatch.setattr(store._patience, "_limit_s", 1.0)
    stoppable.stop()
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"gave up after \d s: cannot reach") as caught:
        store.put_partial("key", X, 1.0)
    assert caught.value.code == "storage_away"
    assert "run the same again" in str(caught.value)
    assert 1.0 <= time.monotonic() - started < 10.0
    started = time.monotonic()
    with pytest.raises(StorageError, match="gave up"):  # at once: it was waited for already
        store.set_state(run_id, RunState.FAILED)
    assert time.monotonic() - started < 0.5
    stoppable.start()
    with pytest.warns(MpqWarning, match="was away"):
        store.set_state(run_id, RunState.RUNNING)
    assert store.partials(["key"]) == {}


def test_opening_does_not_wait(stoppable: Server) -> None:
    address = stoppable.new_database()
    stoppable.stop()
    started = time.monotonic()
    with pytest.raises(StorageError, match="is the server running"):
        open_store(address)
    assert time.monotonic() - started < 5.0
    stoppable.start()


def test_keys_of_an_iterator_are_there_at_every_try(store: Store, stoppable: Server) -> None:
    store.put_partial("key", X, 1.0)
    back = away_for(stoppable, 0.5)
    with pytest.warns(MpqWarning, match="was away"):
        assert list(store.partials(name for name in ("key", "other"))) == ["key"]
    back.join()


def test_what_is_made_once_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_PAUSES_S", (0.0, 0.0))

    class Faulty:
        _patience = patience.Patience("place")

        def __init__(self, code: str, failures: int) -> None:
            self.code, self.failures = code, failures
            self.seen: list[tuple[int, bool]] = []

        def work(self) -> None:
            self.seen.append((once("number", lambda: len(self.seen)), again()))
            if len(self.seen) <= self.failures:
                raise StorageError(self.code, "lost")

    patience.patient(Faulty)
    undone = Faulty("storage_conflict", 3)
    undone.work()
    assert undone.seen == [(0, False), (0, True), (0, True), (0, True)]
    with pytest.raises(StorageError, match="lost"):
        Faulty("storage_conflict", 99).work()
    busy = Faulty("storage_busy", 1)
    with pytest.raises(StorageError, match="lost"):
        busy.work()
    assert len(busy.seen) == 1
    assert not again()
    assert once("number", lambda: 7) == 7


def search(store: Store) -> mpq.SearchResult:
    """A search of two hundred small tasks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))).eval()
    return mpq.search(
        model,
        [torch.randn(4, 12) for _ in range(TASKS)],
        budgets=["memory <= uniform int4"],
        schemes=["int2", "int4", "int8"],
        metric="kl",
        executor="serial",
        storage=store,
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("away_s", [15.0, 120.0])
def test_a_search_goes_on_when_its_server_comes_back(
    store: Store, stoppable: Server, monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    address, put = text_of(store), Store.put_partial
    query = "SELECT key, created_at, seconds, arrays FROM partials ORDER BY key"
    committed: list[Any] = []
    back: list[threading.Thread] = []

    def then_stop(self: Store, *given: Any) -> None:
        put(self, *given)
        committed[:] = committed if back else sql(address, query)
        if not back and len(committed) == TASKS // 2:
            back.append(away_for(stoppable, away_s))

    monkeypatch.setattr(Store, "put_partial", then_stop)
    with pytest.warns(MpqWarning, match="was away for") as told:
        found = search(store)
    monkeypatch.undo()
    back[0].join()
    (said,) = [str(w.message) for w in told if "was away" in str(w.message)]
    seconds = float(said.split("was away for ")[1].split(" s")[0])
    assert away_s - 1 <= seconds <= away_s + 10
    assert store.run(found.run_id).state is RunState.SUCCEEDED
    assert any("was away for" in note for note in store.notes(found.run_id))
    kept = sql(address, query)
    assert len(committed) == TASKS // 2
    assert set(committed) <= set(kept)  # the very rows

    with open_store("sqlite://") as undisturbed:
        expected = search(undisturbed)
        assert found.allocation == expected.allocation
        np.testing.assert_array_equal(
            found.problem.sensitivity.values, expected.problem.sensitivity.values
        )
        keys = [key for key, *_ in kept]
        assert len(undisturbed.partials(keys)) == len(keys)  # none more; and none less:
        events = [e.kind for e in store.events(found.run_id) if "was away" not in e.message]
        assert events == [e.kind for e in undisturbed.events(expected.run_id)]
        assert len(store.runs()) == 1
        assert len(found.evaluation) == len(expected.evaluation)
        labels = [label for label, _ in undisturbed.solutions(expected.run_id)]
        assert [label for label, _ in store.solutions(found.run_id)] == labels
