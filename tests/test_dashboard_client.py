"""`mpq serve` as a process of its own, and `mpq.Client(url=...)` that asks it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

import mpq
from mpq import remote
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.core.jobs import JobSpec, RunState
from mpq.store.records import EventRecord
from mpq.store.store import Store, open_store
from tests.dashboards import JOB, secret, serving

ALLOWED = ("--allow-module", "tests.slow_net")


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def store(storage: str) -> Iterator[Store]:
    with open_store(storage) as opened:
        yield opened


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_client_of_a_server_has_what_one_of_the_database_has(
    storage: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job goes over HTTP, is driven by the server, and everything comes back as it is stored."""
    monkeypatch.setattr(remote, "_PATIENCE_S", 5.0)
    token = secret(store, "admin")
    here = mpq.Client(store)
    with serving(storage, *ALLOWED, drivers=2) as (url, _), mpq.Client(url=url, token=token) as far:
        job: dict[str, Any] = {**JOB, "name": "toy", "schemes": ["int2", *JOB["schemes"]]}
        run = far.submit(job, submission_id="x", tags=["night"], priority=2)
        assert far.submit(job, submission_id="x").id == run.id
        lines = list(run.follow())
        assert run.wait(60) is RunState.SUCCEEDED
        assert run.wait(60, bars=True) is RunState.SUCCEEDED
        stored = here.run(run.id)
        until(lambda: not stored.job().is_driven)
        assert lines == list(run.logs()) == list(stored.logs()) != []
        assert list(run.logs(lines[0].id)) == lines[1:]
        assert list(stored.follow(lines[0].id)) == lines[1:]
        assert asyncio.run(collected(run)) == asyncio.run(collected(stored)) == lines
        assert run.record() == stored.record()
        assert run.job() == stored.job()
        assert run.progress() == stored.progress()
        assert run.status() is RunState.SUCCEEDED
        for name in ("scores", "costs", "allocation", "evaluations"):
            assert run.table(name).csv() == stored.table(name).csv()
        assert far.run("toy").id == far.run().id == far.run(run.id[:6]).id == run.id
        other = far.submit({**job, "name": "other", "seed": 1, "budgets": ["memory <= 50%"]})
        assert other.wait(60) is RunState.SUCCEEDED
        assert far.runs() == here.runs()
        assert far.runs(tag="night", state=RunState.SUCCEEDED) == [stored.record()]
        assert far.runs_table().csv() == here.runs_table().csv()
        page = far.page(limit=1, sort="name")
        assert page.rows[0].run.name == "other"
        assert far.page(limit=5, sort="name", cursor=page.cursor).rows[0].run.id == run.id
        assert far.compare(run.id, other.id) == here.compare(run.id, other.id)
        assert far.layers(metric="kl") == here.layers(metric="kl")
        result, expected = run.result(), stored.result()
        assert dict(result.allocation) == dict(expected.allocation)
        assert result.solution == expected.solution
        assert result.evaluations.csv() == stored.table("evaluations").csv()
        for budgets in (["memory <= 40%"], ["memory <= 1%"]):
            solved, again = result.solve(budgets), expected.solve(budgets)
            assert (solved.status, solved.allocation) == (again.status, again.allocation)
            assert solved.score == again.score or solved.allocation is None
        layer = next(iter(result.allocation))
        pinned = result.solve(["memory <= 60%"], pin={layer: "int8"})
        assert pinned.allocation == expected.solve(["memory <= 60%"], {layer: "int8"}).allocation
        assert [s.allocation for s in result.frontier().solutions] == [
            s.allocation for s in expected.frontier().solutions
        ]
        with pytest.raises(AttributeError, match=r"needs the network.*mpq\.SearchResult"):
            result.export("mpq", "x.json")
        assert not hasattr(result, "nonsense")
        with pytest.raises(InvalidInputError, match="has succeeded: there is nothing to do"):
            run.resume()
        run.delete()
        assert [r.id for r in here.runs()] == [other.id]
        with pytest.raises(InvalidInputError, match="unknown run") as caught:
            run.record()
        assert caught.value.code == "unknown_run"
        with pytest.raises(InvalidInputError, match="its database is not here"):
            _ = far.store


async def collected(run: mpq.client.RunHandle) -> list[EventRecord]:
    return [line async for line in run.follow_async()]


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on_over_http(
    storage: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPQ_TEST_SLEEP", "0.3")
    with serving(storage, *ALLOWED, drivers=1) as (url, _), mpq.Client(url=url) as far:
        run = far.submit(JOB)
        until(lambda: any(s.stage.startswith("scoring") and s.done for s in run.progress()))
        with pytest.raises(StorageError, match="is being driven by") as caught:
            run.delete()
        assert caught.value.code == "run_driven"
        started = time.monotonic()
        assert run.stop() is RunState.STOPPED
        assert time.monotonic() - started < 10
        with pytest.raises(RunFailedError, match="STOPPED"):
            run.result()
        until(lambda: not run.job().is_driven)
        run.resume()
        until(lambda: run.status() is RunState.RUNNING)
        assert run.stop() is RunState.STOPPED
        broken = far.submit({**JOB, "model": "tests.slow_net:broken"})
        with pytest.raises(RunFailedError, match="the weights are gone"):
            broken.result(60)


def test_what_a_server_refuses_is_our_error(storage: str, store: Store) -> None:
    named = store.create_run(JobSpec(model="a:b", calibration="a:c", budgets=(), name="a/b #1"))
    with serving(storage, "--require-token") as (url, _):
        with mpq.Client(url=url) as far, pytest.raises(InvalidInputError, match="token create"):
            far.runs()
        with mpq.Client(url=url, token=secret(store)) as far:
            with pytest.raises(InvalidInputError, match="scope submit") as caught:
                far.submit(JOB)
            assert caught.value.code == "scope"
            with pytest.raises(InvalidInputError, match="unknown number 'memry'"):
                far.runs(where="memry <= 1")
            with pytest.raises(InvalidInputError, match="nope"):
                far.runs(nope="x")
            assert far.run("a/b #1").id == named
            for name in ("a/c", "..", ".", "x?y#z", "%2e"):
                with pytest.raises(InvalidInputError, match="unknown run"):
                    far.run(name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"url": "localhost:8080"}, "http://host:8080"),
        ({"url": "http://localhost:8080", "storage": "runs.db"}, "give one of them"),
        ({"token": "mpq_x"}, "give its url"),
    ],
)
def test_a_client_is_of_one_place(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        mpq.Client(**arguments)


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE_S", 0.5)
    url = f"http://127.0.0.1:{free_port()}"
    with mpq.Client(url=url) as far, pytest.raises(StorageError, match=f"cannot reach {url}"):
        far.runs()


@pytest.mark.slow
def test_a_client_waits_for_a_server_that_restarts(storage: str, store: Store) -> None:
    """What was sent twice is one run, and nothing of a log is lost or comes twice."""
    port = free_port()
    run_id, _ = store.submit(JobSpec(**{**JOB, "budgets": ("memory <= 60%",)}), queued=True)
    expected: list[int] = []
    found: list[EventRecord] = []
    with mpq.Client(url=f"http://127.0.0.1:{port}") as far:

        def listening() -> None:
            found.extend(far.run(run_id).follow())

        with serving(storage, *ALLOWED, port=port) as (_, process):
            listener = threading.Thread(target=listening)
            listener.start()
            say(store, run_id, expected, 20)
            until(lambda: len(found) > 5)
            process.send_signal(signal.SIGKILL)
            process.wait()
        say(store, run_id, expected, 20)  # while nobody serves
        with serving(storage, *ALLOWED, port=port):
            say(store, run_id, expected, 20)
            job = {**JOB, "name": "while it restarts"}
            submitted = far.submit(job, submission_id="once").id
        say(store, run_id, expected, 20)
        answers: list[str] = []
        asking = threading.Thread(
            target=lambda: answers.append(far.submit(job, submission_id="once").id)
        )
        asking.start()  # before the server is there again
        with serving(storage, *ALLOWED, port=port):
            say(store, run_id, expected, 20)
            asking.join(30)
            store.request_stop(run_id)
            listener.join(30)
    assert answers == [submitted]
    assert not listener.is_alive()
    assert [event.id for event in found] == expected
    assert found == store.events(run_id)
    assert len(store.runs()) == 2


def say(store: Store, run_id: str, told: list[int], lines: int) -> None:
    for number in range(lines):
        store.log(run_id, "note", f"line {len(told) + number}")
        time.sleep(0.01)
    told[:] = [event.id for event in store.events(run_id)]


def memory(process: Any) -> int:
    return int(psutil.Process(process.pid).memory_info().rss)


def test_a_large_body_costs_the_server_no_memory(storage: str) -> None:
    with serving(storage, *ALLOWED) as (url, process):
        httpx2.get(f"{url}/api/v1/runs")
        before, after = 0, memory(process)
        while after > before:  # it still loads what answers a first what-if
            time.sleep(2.0)
            before, after = after, memory(process)

        def endless() -> Iterator[bytes]:
            for _ in range(100):
                yield b" " * 1_000_000

        headers = {"Content-Type": "application/json"}
        try:
            found = httpx2.post(f"{url}/api/v1/runs", content=endless(), headers=headers)
            assert found.status_code == 413
        except httpx2.TransportError:
            pass  # the server answered and closed before all of it was sent
        whole = httpx2.post(f"{url}/api/v1/runs", content=b" " * 3_000_000, headers=headers)
        assert whole.status_code == 413
        pins = {f"layer{i}": "int8" for i in range(10_000)}
        job = {"job": {**JOB, "pin": pins}}
        assert httpx2.post(f"{url}/api/v1/runs", json=job).status_code == 202
        assert memory(process) - before < 100_000_000
        assert httpx2.get(f"{url}/healthz").status_code == 200


def test_whoever_reads_the_url_can_ask_at_once(storage: str) -> None:
    for _ in range(2):
        with serving(storage) as (url, _process):
            assert httpx2.get(f"{url}/healthz", timeout=30).status_code == 200


def test_a_server_ends_when_it_is_told_to(storage: str, store: Store) -> None:
    run_id, _ = store.submit(JobSpec(**{**JOB, "budgets": ("memory <= 60%",)}), queued=True)
    with serving(storage) as (url, process):
        with httpx2.stream("GET", f"{url}/api/v1/runs/{run_id}/events") as stream:
            next(stream.iter_lines())
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.wait(15)
            assert time.monotonic() - started < 10
        assert process.returncode in (0, -signal.SIGTERM)


def test_tokens_on_the_command_line(storage: str, capfd: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from mpq.cli import app

    def said(*words: str) -> str:
        found = CliRunner().invoke(app, [*words, "--storage", storage])
        assert found.exit_code == 0, (found.output, found.exception)
        return found.stdout

    text = said("token", "create", "ci", "--scope", "submit", "--days", "2").strip()
    assert text.startswith("mpq_")
    listed = said("token", "list", "--json")
    assert '"scope": "submit"' in listed
    assert text not in listed
    assert " ci " in said("token", "list")
    said("token", "revoke", "ci")
    assert "revoked" in said("token", "list")
    for wrong in (
        ["create", "x", "--scope", "root"],
        ["create", "x", "--days", "0"],
        ["create", " "],
        ["revoke", "nobody"],
    ):
        found = CliRunner().invoke(app, ["token", *wrong, "--storage", storage])
        assert isinstance(found.exception, InvalidInputError), wrong


@pytest.mark.slow
def test_the_password_of_a_database_is_in_no_list_of_processes(tmp_path: Path) -> None:
    """A driver that the server starts gets the address in its environment."""
    storage = f"sqlite:///{tmp_path / 'runs.db'}"
    with (
        serving(storage, *ALLOWED, drivers=1) as (url, process),
        mpq.Client(url=url) as far,
    ):
        run = far.submit(JOB)
        until(lambda: run.job().is_driven)
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("mpq.driver" in one.cmdline() for one in family)
        assert not any(storage in " ".join(one.cmdline()) for one in family)
        run.stop()
