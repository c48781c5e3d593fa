"""Real Ray under fire: killed workers, nodes that join and go, clusters without a token."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpq
from mpq.core.errors import InvalidInputError, RunFailedError, StorageError
from mpq.result import SearchResult
from mpq.store.store import open_store
from workers import get_executor
from workers.ray_cluster import _check_same, _why, check_secure

ROOT = Path(mpq.__file__).parents[1]


class Told(nn.Module):
    """A small network that takes its time and leaves the number of its process in a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.driver = folder, os.getpid()
        self.layers = nn.Sequential(
            *[layer for _ in range(4) for layer in (nn.Linear(12, 12), nn.Tanh())]
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.driver:
            Path(self.folder, str(os.getpid())).touch()
            time.sleep(0.02)
        return self.head(self.layers(x))


class Killer(threading.Thread):
    """Kills one worker of this test after the other, none but those that `Told` has told of."""

    def __init__(self, folder: Path, every_s: float, most: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.every_s, self.most = folder, every_s, most
        self.killed: list[int] = []
        self.over = threading.Event()
        self._random = random.Random(0)

    def run(self) -> None:
        while len(self.killed) < self.most and not self.over.wait(self.every_s):
            told = [int(path.name) for path in self.folder.glob("*")]
            alive = sorted(pid for pid in told if self._is_worker(pid))
            if alive:
                victim = self._random.choice(alive)
                os.kill(victim, signal.SIGKILL)
                self.killed.append(victim)

    def _is_worker(self, pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Worker")
        except OSError:
            return False


def search(folder: Path, name: str) -> SearchResult:
    torch.manual_seed(0)
    told = folder / name
    told.mkdir()
    model = Told(str(told)).eval()
    generator = torch.Generator().manual_seed(0)
    store = open_store(str(folder / f"{name}.db"))
    return mpq.search(
        model,
        [torch.randn(4, 12, generator=generator) for _ in range(64)],
        budgets=["memory <= uniform int4"],
        schemes=["int2", "int4", "int8"],
        metric="kl",
        refine=0,
        num_workers=2,
        storage=store,
    )


@pytest.mark.slow
def test_a_search_whose_workers_are_killed_every_two_seconds_finds_the_same(
    tmp_path: Path,
) -> None:
    undisturbed = search(tmp_path, "undisturbed")
    killer = Killer(tmp_path / "disturbed", every_s=2.0, most=10)
    killer.start()
    disturbed = search(tmp_path, "disturbed")
    killer.over.set()
    killer.join()
    assert len(killer.killed) == 10
    one, two = undisturbed.problem, disturbed.problem
    np.testing.assert_array_equal(one.sensitivity.values, two.sensitivity.values)
    np.testing.assert_array_equal(one.sensitivity.stderr, two.sensitivity.stderr)
    assert undisturbed.allocation == disturbed.allocation
    assert {(e.candidate, e.mean) for e in undisturbed.evaluation} == {
        (e.candidate, e.mean) for e in disturbed.evaluation
    }


@pytest.mark.slow
def test_sixty_tasks_and_ten_kills_give_sixty_results_and_none_twice(tmp_path: Path) -> None:
    folder, runs = tmp_path / "pids", tmp_path / "runs"
    folder.mkdir()
    runs.mkdir()

    def fn(state: object, item: int) -> tuple[int, int]:
        Path(folder, str(os.getpid())).touch()
        Path(runs, f"{item}-{time.time_ns()}").touch()
        time.sleep(0.7)
        return item, item * item

    killer = Killer(folder, every_s=2.0, most=10)
    executor = get_executor("ray", 2)
    killer.start()
    found = list(executor.map(dict, fn, range(60)))
    killer.over.set()
    killer.join()
    executor.close()
    assert len(killer.killed) == 10
    assert sorted(found) == [(i, (i, i * i)) for i in range(60)]
    assert len(list(runs.iterdir())) <= 60 + 10  # a kill costs what was at work there


@pytest.mark.slow
def test_a_hanging_worker_is_killed_and_its_task_done_by_another(tmp_path: Path) -> None:
    from workers.ray_executor import RayExecutor
    from workers.schedule import Limits

    def fn(state: object, item: int) -> int:
        if item == 3 and not (tmp_path / "hung").exists():
            (tmp_path / "hung").write_text(str(os.getpid()))
            time.sleep(1000)
        return item

    executor = RayExecutor(2, limits=Limits(grace_s=3.0, first_grace_s=30.0))
    began = time.monotonic()
    assert sorted(executor.map(dict, fn, range(8))) == [(i, i) for i in range(8)]
    assert time.monotonic() - began < 60
    hung = int((tmp_path / "hung").read_text())
    for _ in range(100):
        if not Path(f"/proc/{hung}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{hung}").exists()
    executor.close()


@pytest.mark.slow
def test_a_poison_task_lets_all_others_finish() -> None:
    def fn(state: object, item: int) -> int:
        if item == 0:
            raise ValueError("no such layer")
        return item

    executor, found = get_executor("ray", 2), []
    with pytest.raises(RunFailedError, match=r"^task 0 failed: ValueError: no such layer$") as told:  # noqa: PT012
        for result in executor.map(dict, fn, range(30)):
            found.append(result)  # noqa: PERF402 - what came before an error counts
    executor.close()
    assert sorted(found) == [(i, i) for i in range(1, 30)]
    assert 'raise ValueError("no such layer")' in str(told.value.__cause__)


def scenario(name: str, **environment: str) -> None:
    """Run a function of this file in a process of its own, as Ray is set up once in each."""
    code = f"from tests.test_cluster import {name}; {name}()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "done"


def slow_place(seconds: float) -> Any:
    def fn(state: object, item: int) -> str:
        import ray

        time.sleep(seconds)
        return str(ray.get_runtime_context().get_node_id())

    return fn


def two_nodes() -> None:
    import ray
    from ray.cluster_utils import Cluster

    from workers.ray_executor import RayExecutor

    cluster = Cluster()
    near = cluster.add_node(num_cpus=1, resources={"device:near": 1, "bench": 1})
    far = cluster.add_node(num_cpus=2, resources={"device:far": 2})
    for device, node in {"device:near": near, "device:far": far}.items():
        executor = RayExecutor(address=cluster.address, resources={device: 1})
        places = dict(executor.map(dict, slow_place(0.1), range(6)))
        assert set(places.values()) == {node.node_id}, (device, places)
        executor.close()
    alone = RayExecutor(address=cluster.address)

    def span() -> tuple[float, float]:
        began = time.time()
        time.sleep(0.5)
        return began, time.time()

    with ThreadPoolExecutor() as threads:
        spans = sorted(threads.map(lambda _: alone.run_exclusively(span), range(3)))
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(spans)), spans
    executor = RayExecutor(address=cluster.address)
    found: list[tuple[int, str]] = []
    late = None
    for result in executor.map(dict, slow_place(0.7), range(80)):
        found.append(result)
        if len(found) == 10:
            late = cluster.add_node(num_cpus=2)
        if len(found) == 40:
            cluster.remove_node(far, allow_graceful=False)
    assert sorted(position for position, _ in found) == list(range(80))
    places = {place for _, place in found}
    assert late is not None
    assert places == {near.node_id, far.node_id, late.node_id}, places
    assert {place for _, place in found[60:]} == {near.node_id, late.node_id}
    executor.close()
    ray.shutdown()
    cluster.shutdown()
    print("done")


def one_gpu() -> None:
    """A node says that it has a GPU; workers land there, and torch finds none."""
    import platform

    import ray
    from ray.cluster_utils import Cluster

    from workers.ray_executor import RayExecutor

    cluster = Cluster()
    cluster.add_node(num_cpus=2)
    node = cluster.add_node(num_cpus=2, num_gpus=1, resources={"device:a100": 1})
    resources = {"gpu": 1, "device:a100": 1}
    executor = RayExecutor(address=cluster.address, resources=resources)

    def fn(state: object, item: int) -> tuple[str, str]:
        import ray

        return str(ray.get_runtime_context().get_node_id()), os.environ["CUDA_VISIBLE_DEVICES"]

    found = dict(executor.map(dict, fn, range(4)))
    assert set(found.values()) == {(node.node_id, "0")}, found
    assert executor.gpu
    executor.close()
    with pytest.raises(InvalidInputError, match=r"torch .* finds none there") as caught:
        mpq.search(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval(),
            [torch.randn(4, 6)],
            budgets=["memory <= 60%"],
            schemes=["int4", "int8"],
            ray_address=cluster.address,
            worker_resources=resources,
            storage="sqlite://",
        )
    assert f"a worker on node {platform.node()} was given a GPU" in str(caught.value)
    assert "\n" not in str(caught.value)
    ray.shutdown()
    cluster.shutdown()
    print("done")


def asked_of_the_autoscaler() -> None:
    import ray
    from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.cluster_utils import Cluster
    from ray.experimental.internal_kv import _internal_kv_get

    from workers.ray_executor import RayExecutor
    from workers.schedule import Limits

    cluster = Cluster()
    cluster.add_node(num_cpus=1, resources={"device:near": 8})
    limits = Limits(look_s=0.2, worth_s=0.5)
    executor = RayExecutor(5, cluster.address, resources={"device:near": 1}, limits=limits)
    asked = [
        json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL))
        for _ in executor.map(dict, slow_place(0.5), range(20))
    ]
    worker = {"CPU": 1, "device:near": 1}
    assert [worker] * 5 in asked, asked  # one task of 0.5 s each, at most five workers
    assert all(len(bundles) <= 5 for bundles in asked)
    assert json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)) == []
    stopped = executor.map(dict, slow_place(0.5), range(20))
    next(stopped)
    assert json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)) != []
    stopped.close()  # type: ignore[attr-defined]
    assert json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)) == []
    executor.close()
    ray.shutdown()
    cluster.shutdown()
    print("done")


def without_a_token() -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=1)
    assert not cluster.address.startswith("127."), cluster.address
    for address in (cluster.address, "auto"):
        with pytest.raises(InvalidInputError, match="answers without a token") as caught:
            list(get_executor("ray", address=address).map(dict, slow_place(0), [1]))
        assert "\n" not in str(caught.value)
    executor = get_executor("ray", address=cluster.address, insecure=True)
    assert len(list(executor.map(dict, slow_place(0), range(3)))) == 3
    executor.close()
    ray.shutdown()
    cluster.shutdown()
    print("done")


@pytest.mark.slow
def test_tasks_land_where_their_resources_are_and_nodes_come_and_go() -> None:
    scenario("two_nodes", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)


@pytest.mark.slow
def test_workers_with_a_gpu_land_where_it_is_and_say_where_torch_finds_none() -> None:
    scenario("one_gpu", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)


@pytest.mark.slow
def test_the_autoscaler_hears_how_many_workers_have_work() -> None:
    scenario("asked_of_the_autoscaler", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex)


@pytest.mark.slow
def test_a_cluster_without_a_token_is_refused() -> None:
    scenario("without_a_token", RAY_AUTH_MODE="disabled")


@pytest.mark.parametrize("address", ["", "host", "ray://host:10001", "host:port", ":6379"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(InvalidInputError, match="a Ray cluster is 'auto' or 'host:port'"):
        check_secure(address, insecure=True)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "[::1]:6379"])
def test_a_cluster_of_this_machine_alone_needs_no_token(address: str) -> None:
    check_secure(address, insecure=False)


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with pytest.raises(StorageError, match=r"no Ray cluster answers at 192\.0\.2\.77:1"):
        check_secure("192.0.2.77:1", insecure=False)


def test_a_cluster_that_refuses_this_process_says_what_to_set() -> None:
    error = ConnectionError("Failed to connect to Ray cluster at host:6379")
    error.__cause__ = RuntimeError("RPC error: InvalidAuthToken: token is missing or incorrect")
    assert _why(error).startswith("it asks for a token that this process does not have: set RAY_")
    assert _why(ConnectionError("no\nroute")) == "no"


@pytest.mark.parametrize(
    ("address", "same"),
    [
        ("auto", True),
        ("10.0.0.7:6379", True),
        ("127.0.0.1:6379", True),  # Ray tells a node's own name for it
        ("127.0.0.1:6380", False),
        ("10.0.0.8:6379", False),
    ],
)
def test_a_process_is_connected_to_one_cluster(address: str, same: bool) -> None:
    context = SimpleNamespace(gcs_address="10.0.0.7:6379")
    ray = SimpleNamespace(get_runtime_context=lambda: context)
    if same:
        _check_same(ray, address)
        return
    with pytest.raises(InvalidInputError, match=r"connected to Ray at 10\.0\.0\.7:6379, not at"):
        _check_same(ray, address)


def test_the_serial_executor_has_no_address() -> None:
    with pytest.raises(InvalidInputError, match="executor 'serial' runs here"):
        get_executor("serial", address="auto")
    with pytest.raises(InvalidInputError, match="ray_address 'auto' is for executor 'ray'"):
        mpq.JobSpec(
            model="a:b",
            calibration="a:c",
            budgets=("memory <= 60%",),
            executor="serial",
            ray_address="auto",
        )
