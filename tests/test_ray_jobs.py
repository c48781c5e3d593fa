"""Drivers inside a real Ray cluster: submitted as Ray jobs by a process that goes away."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import mpq
from mpq import service
from mpq.cli import app
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.core.jobs import RunState
from mpq.driving import driving
from mpq.store.store import Store, open_store
from mpq.transport import cluster_for
from tests.postgres import Server
from tests.test_service import JOB, alive, descendants, scores, spec, until
from workers.ray_jobs import RayJobs

ROOT = Path(mpq.__file__).parents[1]
HOLDER = "ray job at http://127.0.0.1:1 [abc123]"


# Without a cluster


@pytest.mark.parametrize(
    "address",
    [
        *("", "auto", "head:8265", "ray://head:10001", "http://", "http://me:secret@head:8265"),
        *("http://head:8265/api", "http://head:8265?x=1"),
    ],
)
def test_an_address_is_that_of_a_dashboard(address: str) -> None:
    with pytest.raises(InvalidInputError, match="a cluster that takes jobs is 'http://host:8265'"):
        RayJobs(address)


def test_a_slash_at_the_end_does_not_matter() -> None:
    assert RayJobs("http://localhost:8265/") == RayJobs("http://localhost:8265")


def test_a_database_of_this_machine_is_refused_for_another_one(tmp_path: Path) -> None:
    with (
        open_store(tmp_path / "runs.db") as store,
        pytest.raises(InvalidInputError, match=r"http://head:8265 cannot reach .*runs\.db"),
    ):
        service.submit(store, spec(), ray="http://head:8265")
    with (
        open_store("sqlite://") as store,
        pytest.raises(InvalidInputError, match="cannot reach the database"),
    ):
        cluster_for(store, "http://localhost:8265")


def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with open_store(tmp_path / "runs.db") as store:
        with pytest.raises(StorageError, match=r"http://127.0.0.1:1 does not take or tell"):
            service.submit(store, spec(), ray="http://127.0.0.1:1")
        (run,) = store.runs()
        assert (run.state, run.error_code) == (RunState.FAILED, "cluster")
        assert not store.job(run.id).is_driven
        with pytest.raises(InvalidInputError, match="goes to Ray, not both"):
            service.submit(store, spec(), ray="http://127.0.0.1:1", queue=True)


def test_whoever_submits_the_same_at_once_finds_it_driven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path / "runs.db") as store:
        make = store.submit

        def made_and_taken(*given: Any, **named: Any) -> tuple[str, bool]:
            run_id, is_new = make(*given, **named)
            store.take(run_id, HOLDER, 60)
            return run_id, is_new

        monkeypatch.setattr(store, "submit", made_and_taken)
        run_id, _ = service.submit(store, spec(), ray="http://127.0.0.1:1")
        assert (store.run(run_id).state, store.job(run_id).driver) == (RunState.PENDING, HOLDER)


def test_a_run_that_waits_in_a_cluster_stops_at_once_for_good(tmp_path: Path) -> None:
    with open_store(tmp_path / "runs.db") as store:
        run_id, _ = service.submit(store, spec(), queue=True)
        store.take(run_id, HOLDER, 60)
        began = time.monotonic()
        assert service.stop(store, run_id) is RunState.STOPPED
        assert time.monotonic() - began < 5
        with (
            pytest.raises(InvalidInputError, match="was stopped before its driver began"),
            driving(store, run_id, instead_of=HOLDER),
        ):
            pass
        assert store.run(run_id).state is RunState.STOPPED


def test_a_cluster_that_is_gone_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_RAY_LOOK_S", 0.1)
    monkeypatch.setattr(service, "_ABANDONED_S", 0.5)
    with open_store(tmp_path / "runs.db") as store:
        run_id, _ = service.submit(store, spec(), queue=True)
        store.take(run_id, HOLDER, 0.1)
        with pytest.raises(RunFailedError, match=r"lost its driver ray job at http://127.0.0.1:1"):
            service.wait(store, run_id, 60)
        assert store.run(run_id).state is RunState.PENDING  # it may come back


def test_the_referee_takes_the_address_of_a_cluster(tmp_path: Path) -> None:
    words = ["referee", job_file(tmp_path), "--ray-address", "auto"]
    found = CliRunner().invoke(app, words)
    assert "ray_address 'auto' is for executor 'ray', got 'serial'" in str(found.exception)


# With one


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def own_address() -> str:
    """The address of this machine in its network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 9))  # sends nothing
        return str(one.getsockname()[0])


@contextmanager
def head(**environment: str) -> Iterator[int]:
    """A cluster of one node with its dashboard; yields the dashboard's port, ends by pid."""
    # A folder of its own, in which its jobs find it, with a short name, as sockets need.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield from started(Path(folder), environment)


def started(folder: Path, environment: dict[str, str]) -> Iterator[int]:
    port = free_port()
    python = Path(sys.executable).parent
    command = [str(python / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    options = {
        "port": free_port(),
        "dashboard-port": port,
        "dashboard-host": "0.0.0.0",
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 2,
        "include-dashboard": "true",
        "object-store-memory": 100_000_000,
        "temp-dir": folder,
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    kept = {k: v for k, v in os.environ.items() if k not in ("MPQ_STORAGE", "RAY_ADDRESS")}
    kept |= {"PATH": f"{python}{os.pathsep}{os.environ['PATH']}", "MPQ_TEST_SLEEP": "0.05"}
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--disable-usage-stats"],
            env=kept | {"RAY_TMPDIR": "/tmp"} | environment,
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: answers(port), 90)
        yield port
    finally:
        family = [process.pid, *descendants(process.pid)]
        process.terminate()  # `ray start --block` ends what it started, most of the time
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for pid in filter(alive, family):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not any(map(alive, family)), 30)


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def token() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}


@pytest.fixture(scope="module")
def port(token: dict[str, str]) -> Iterator[int]:
    with head(**token) as found:
        yield found


def command(*words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run mpq in a process of its own, which is gone afterwards."""
    found = subprocess.run(
        [sys.executable, "-m", "mpq.cli", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found


def asked(port: int, path: str, token: dict[str, str]) -> Any:
    headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def job_file(folder: Path, **changes: Any) -> str:
    path = folder / "job.json"
    path.write_text(json.dumps(JOB | {"budgets": list(JOB["budgets"])} | changes))
    return str(path)


def ended(store: Store, run_id: str, seconds: float) -> RunState:
    until(lambda: store.run(run_id).ended_at is not None, seconds)
    return store.run(run_id).state


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["serial", "ray"])
def test_a_ray_job_drives_the_run_when_its_submitter_is_gone(
    tmp_path: Path, port: int, token: dict[str, str], executor: str
) -> None:
    storage, ray = str(tmp_path / "runs.db"), f"http://127.0.0.1:{port}"
    job = job_file(tmp_path, executor=executor)
    words = ("submit", job, "--ray", ray, "--submission-id", "x", "--storage", storage)
    run_id = command(*words, **token).stdout.strip()
    with open_store(storage) as store:
        state = ended(store, run_id, 150)
        assert state is RunState.SUCCEEDED, store.run(run_id).error_message
        driver = str(store.job(run_id).driver)
        assert not driver.startswith("ray job at")
        assert store.run(run_id).spec.ray_address == (None if executor == "serial" else "auto")
        assert f"Ray job {run_id} at {ray} drives it" in [e.message for e in store.events(run_id)]
        here = mpq.run_job(spec(), store)
        assert scores(store, run_id) == scores(store, here.run_id)
        again = command(*words, **token)
        assert again.stdout.strip() == run_id
        assert "is this run already" in again.stderr
    (told,) = [j for j in asked(port, "/api/jobs/", token) if j["submission_id"] == run_id]
    assert told["entrypoint"].startswith(f"python -m mpq.driver {run_id} --instead-of ")
    # Under its id Ray takes no second job, and that is no error.
    again_there = f"RayJobs({ray!r}).submit({run_id!r}, ['true'], {{}})"
    code = f"from workers.ray_jobs import RayJobs; print({again_there})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | token,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert found.stdout.split()[-1] == "False"


LIVE = """
import sys, mpq
from tests.builders import case
from tests.test_artifacts import JOB
model, batch = case("decoder")
with mpq.Client(sys.argv[1], ray=sys.argv[2]) as client:
    print(client.submit(JOB, model=model.eval(), calibration=[batch]).id)
"""


@pytest.mark.slow
def test_a_live_network_is_searched_inside_a_cluster(
    tmp_path: Path, port: int, token: dict[str, str]
) -> None:
    storage = str(tmp_path / "runs.db")
    found = subprocess.run(
        [sys.executable, "-c", LIVE, storage, f"http://127.0.0.1:{port}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | token,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    run_id = found.stdout.split()[-1]
    with open_store(storage) as store:
        assert ended(store, run_id, 120) is RunState.SUCCEEDED, store.run(run_id).error_message


@pytest.mark.slow
def test_stop_and_resume_of_a_run_inside_a_cluster(
    tmp_path: Path, port: int, token: dict[str, str]
) -> None:
    storage, ray = str(tmp_path / "runs.db"), f"http://127.0.0.1:{port}"
    words = ("submit", job_file(tmp_path), "--ray", ray, "--storage", storage)
    run_id = command(*words, **token).stdout.strip()
    with open_store(storage) as store:
        until(lambda: store.run(run_id).state is RunState.RUNNING, 90)
        assert command("stop", run_id, "--storage", storage).stdout.strip() == f"{run_id} STOPPED"
        until(lambda: not store.job(run_id).is_driven)
        command("resume", run_id, "--ray", ray, "--storage", storage, **token)
        assert ended(store, run_id, 120) is RunState.SUCCEEDED
        assert store.job(run_id).attempts == 2
    ids = {job["submission_id"] for job in asked(port, "/api/jobs/", token)}
    assert {run_id, f"{run_id}-2"} <= ids


@pytest.mark.slow
def test_a_password_stays_here_and_a_job_that_cannot_begin_is_told(
    tmp_path: Path, port: int, token: dict[str, str], postgres: Server
) -> None:
    address, ray = postgres.new_database(), f"http://127.0.0.1:{port}"
    secret = "s3cr3t"
    storage = f"{address}{'&' if '?' in address else '?'}password={secret}"
    words = ("submit", job_file(tmp_path), "--ray", ray)
    found = command(*words, MPQ_STORAGE=storage, **token)
    run_id = found.stdout.strip()
    assert "password is not sent" in found.stderr
    assert "MPQ_STORAGE of their own" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    with open_store(address) as store:
        # The cluster has no MPQ_STORAGE, so that its driver looks at another database.
        began = time.monotonic()
        status = ""
        while "FAILED" not in status and time.monotonic() - began < 90:
            status = command("status", run_id, MPQ_STORAGE=storage, **token).stdout
        assert "error[ray_job_lost]" in status
        assert f"ray job logs {run_id} --address {ray}" in status
        assert not store.job(run_id).is_driven
    everything = json.dumps(asked(port, "/api/jobs/", token))
    assert run_id in everything
    assert secret not in everything
    postgres.drop(address)


@pytest.mark.slow
def test_a_job_that_the_cluster_never_got_is_told_when_its_time_is_over(
    tmp_path: Path, port: int, token: dict[str, str]
) -> None:
    storage = str(tmp_path / "runs.db")
    holder = f"ray job at http://127.0.0.1:{port} [abc123]"
    with open_store(storage) as store:
        run_id, _ = service.submit(store, spec(), queue=True)
        store.take(run_id, holder, 60)
        waiting = command("status", run_id, "--storage", storage, **token).stdout
        assert f"given to a {holder}, which has not begun: it waits there" in waiting
        store.release(run_id, holder)
        over = command("status", run_id, "--storage", storage, "--json", **token).stdout
        told = json.loads(over)
        assert (told["state"], told["error_code"]) == ("FAILED", "ray_job_lost")
        assert "the cluster does not know it" in told["error_message"]


@pytest.mark.slow
def test_a_cluster_beyond_this_machine_must_ask_for_a_token(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPQ_INSECURE_RAY", raising=False)
    RayJobs(f"http://{own_address()}:{port}").check_secure()
    with head(RAY_AUTH_MODE="disabled") as open_port:
        cluster = RayJobs(f"http://{own_address()}:{open_port}")
        assert not cluster.is_here
        with pytest.raises(InvalidInputError, match="takes jobs without a token") as told:
            cluster.check_secure()
        assert "\n" not in str(told.value)
        monkeypatch.setenv("MPQ_INSECURE_RAY", "1")
        cluster.check_secure()
    monkeypatch.delenv("MPQ_INSECURE_RAY")
    with pytest.raises(StorageError, match="does not take or tell of jobs"):
        cluster.check_secure()
