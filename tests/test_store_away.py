"""A server that stops in the middle of the work: it is waited for, nothing is lost or twice."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from mpq.core.errors import MpqWarning
from mpq.core.jobs import JobSpec, RunState
from mpq.store import Store, open_store
from tests.postgres import Server

SPEC = JobSpec(model="pkg:net", calibration="pkg:data", budgets=())
X = {"x": np.arange(3.0)}


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
    store: Store, stoppable: Server, name: str, when: str
) -> None:
    """The connection breaks just before the commit, or after it and before its answer."""
    run_id = store.create_run(SPEC)
    broken = []

    def lose(session: Any) -> None:
        if not broken:
            broken.append(session)
            connection = session.connection()
            if when == "after":
                connection.connection.driver_connection.commit()
            stoppable.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state LIKE 'idle%' "
                "AND pid <> pg_backend_pid()"
            )
            time.sleep(0.05)

    event.listen(Session, "before_commit", lose)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MpqWarning)
            CALLS[name](store, run_id)
    finally:
        event.remove(Session, "before_commit", lose)
    assert broken
    assert len(store.runs()) == (2 if name == "create" else 1)
    assert len(store.events(run_id)) == (1 if name == "log" else 0)
    assert (store.run(run_id).state is RunState.RUNNING) == (name == "state")
    assert list(store.partial_seconds(["key"])) == (["key"] if name == "partial" else [])
