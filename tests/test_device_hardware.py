"""Kernels of a node of a cluster: chosen and timed there, kept as that machine's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import mpq
from hw_cost_models import get_hardware, get_kernels, is_measured, place_of
from hw_cost_models.latency import MeasuredLatency
from mpq.core.errors import InvalidInputError
from mpq.core.jobs import JobSpec
from mpq.core.problem import BudgetText
from mpq.costing import Hardware
from mpq.progress import Silent
from mpq.store.store import Store, open_store
from tests.builders import mlp, workload
from workers import get_executor
from workers.ray_executor import check_node

ROOT = Path(mpq.__file__).parents[1]


def sent(fn: Callable[[], Any], resources: Mapping[str, float] | None = None) -> Any:
    """Run a function as another process would: it, and what it returns, travel as bytes."""
    return pickle.loads(cloudpickle.dumps(cloudpickle.loads(cloudpickle.dumps(fn))()))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(str(tmp_path / "runs.db")) as opened:
        yield opened


def loaded() -> Any:
    import torch

    return workload(mlp().eval(), [torch.randn(4, 6)], ("fp32", "int8:int8"))


def test_a_text_says_where_and_whose() -> None:
    assert place_of("device:jetson") == ("jetson", "local")
    assert place_of("device:jetson/torch_cpu") == ("jetson", "local:torch_cpu")
    assert place_of("local:torch_cpu") == ("", "local:torch_cpu")
    assert is_measured("device:jetson")
    assert is_measured("local")
    assert not is_measured("roofline:H100")
    for text in ("device:", "device:/torch_cpu", "device:jetson/"):
        with pytest.raises(InvalidInputError, match="'device:NAME' or 'device:NAME/KERNELS', got"):
            place_of(text)
    with pytest.raises(InvalidInputError, match="did you mean 'device:NAME'"):
        get_hardware("devices:NAM")


@pytest.mark.parametrize("whose", ["onnxruntime", "torch_cpu"])
def test_everything_that_is_timed_travels(whose: str) -> None:
    load, saved = loaded(), []
    times = MeasuredLatency(
        hardware=f"local:{whose}", budget_s=0.5, run=sent, save=saved.append, progress=saved.append
    )
    table = times.table(load.graph, load.cells)
    assert (table.values > 0).all()
    assert times.device == get_kernels(f"local:{whose}").device
    assert {latency.device for latency in saved if not isinstance(latency, float)} == {times.device}
    assert saved.pop() == 1.0 or saved  # the last that is heard
    again = MeasuredLatency(hardware=f"local:{whose}", known=times.latencies, run=sent)
    np.testing.assert_array_equal(again.table(load.graph, load.cells).values, table.values)


def test_times_are_kept_under_the_identity_of_the_node(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def there(fn: Callable[[], Any], resources: Mapping[str, float] | None = None) -> Any:
        asked.append(dict(resources or {}))
        with monkeypatch.context() as node:
            node.setattr("platform.machine", lambda: "far64")
            return sent(fn)

    load = loaded()
    spec = JobSpec(
        model="a:b",
        calibration="a:c",
        budgets=("latency <= 90%",),
        hardware="device:far",
        latency_seconds=0.5,
    )
    budgets = [BudgetText.parse(text) for text in spec.budgets]
    hardware = Hardware(spec, budgets, store, Silent(), run_exclusively=there)
    assert "far64" in hardware.device
    tables = hardware.tables(load.graph, load.cells)
    assert "far64" in tables["latency"].provenance
    assert store.kernel_latencies(hardware.device)
    assert not store.kernel_latencies(get_kernels("local").device)
    assert asked == [{"device:far": 0.001}] * len(asked)
    lines: list[tuple[str, str]] = []
    log = lambda kind, line: lines.append((kind, line))  # noqa: E731
    assert hardware.whole_network(tables, load, load.calibration[0], log) == {}
    assert "not on device:far" in lines[0][1]


def test_two_machines_under_one_name_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    load = loaded()
    times = MeasuredLatency(budget_s=0.5, run=sent)
    monkeypatch.setattr("platform.machine", lambda: "far64")
    with pytest.raises(InvalidInputError, match="nodes of one device name are different machines"):
        times.table(load.graph, load.cells)


def test_the_serial_executor_has_no_nodes(store: Store) -> None:
    spec = JobSpec(
        model="a:b",
        calibration="a:c",
        budgets=(),
        hardware="device:jetson",
        executor="serial",
    )
    run = get_executor("serial").run_exclusively
    with pytest.raises(InvalidInputError, match=r"^device:jetson is on a node of a Ray cluster"):
        Hardware(spec, [], store, Silent(), run_exclusively=run)
    with pytest.raises(InvalidInputError, match="'device:jetson' is a node of a Ray cluster: none"):
        Hardware(replace(spec, executor="ray"), [], store, Silent())
    assert get_executor("serial").run_exclusively(lambda: 3) == 3


NODES = [
    {"Alive": True, "Resources": {"CPU": 4, "device:jetson": 1, "bench": 1}},
    {"Alive": True, "Resources": {"CPU": 4, "device:idle": 1}},
    {"Alive": True, "Resources": {"CPU": 64}},
    {"Alive": False, "Resources": {"CPU": 4, "device:gone": 1, "bench": 1}},
]


def test_a_device_that_no_node_has_is_one_line_with_what_there_is() -> None:
    check_node(NODES, {"device:jetson": 0.001, "bench": 1})
    for name in ("jetsn", "gone", "idle"):
        with pytest.raises(InvalidInputError) as told:
            check_node(NODES, {f"device:{name}": 0.001, "bench": 1})
        assert str(told.value) == (
            f"no node of the Ray cluster has device:{name} and bench: of 3 nodes each has bench "
            f"and device:jetson; device:idle; neither; start one with ray start --resources="
            f'\'{{"device:{name}": 1, "bench": 1}}\''
        )


REAL = """
import os, sys
import ray
from ray.cluster_utils import Cluster
import mpq
from mpq.core.errors import InvalidInputError

folder = sys.argv[1]
cluster = Cluster()
near = cluster.add_node(num_cpus=1, resources={"device:near": 1, "bench": 1})
os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ["PYTHONPATH"]])
far = cluster.add_node(num_cpus=1, resources={"device:far": 1, "bench": 1})

net = "examples.digits_resnet20"

def search(hardware, **more):
    return mpq.search(
        f"{net}:make_model", f"{net}:calibration_batches",
        budgets=["latency <= 1 s", "memory <= 60%"], schemes=["fp32", "int8:int8"],
        hardware=hardware, ray_address=cluster.address, latency_seconds=3.0, refine=0,
        storage=f"{folder}/runs.db", **more)

result = search("device:far")
store = result.store
device = store.run(result.run_id).device
assert "far64" in device, device
assert store.kernel_latencies(device)
assert "far64" in result.problem.costs["latency"].provenance
near_run = search("device:near/torch_cpu", worker_resources={"device:far": 0.5})
there = near_run.store.run(near_run.run_id).device
assert "far64" not in there and "torch" in there, there
try:
    search("device:fart")
except InvalidInputError as error:
    assert "device:far" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("no error")
ray.shutdown()
cluster.shutdown()
print("done")
"""


@pytest.mark.slow
def test_each_node_of_a_cluster_times_its_own_kernels(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import platform\nplatform.machine = lambda: 'far64'\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "done"
