"""What all runs share: results of scoring tasks, and times of kernels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import pytest

from mpq.core.errors import InvalidInputError, StorageError
from mpq.core.latency import KernelCase, KernelLatency
from mpq.store import Store, open_store
from mpq.store.arrays import npz_bytes
from tests.databases import sql


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    with open_store(address) as opened:
        yield opened


def assert_same(found: Mapping[str, Any], put: Mapping[str, Any]) -> None:
    assert list(found) == list(put)
    for name, array in put.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_partial_conflict_does_nothing(store: Store) -> None:
    first = {"values": np.arange(6, dtype=np.float32).reshape(2, 3), "file": np.array(7)}
    store.put_partial("key", first, 1.5)
    store.put_partial("key", {"values": np.zeros(1)}, 9.0)
    store.put_partial("empty", {}, 0.0)
    found = store.partials(["empty", "missing", "key", "key"])
    assert list(found) == ["empty", "key"]
    assert found["empty"] == {}
    assert_same(found["key"], first)


def test_the_seconds_of_a_task_are_those_of_its_first_result(store: Store) -> None:
    store.put_partial("slow", {"values": np.zeros(1)}, 1.5)
    store.put_partial("slow", {"values": np.zeros(1)}, 9.0)
    store.put_partial("fast", {}, 0.25)
    found = store.partial_seconds(["fast", "missing", "slow", "fast"])
    assert list(found.items()) == [("fast", 0.25), ("slow", 1.5)]
    many = [f"key {number}" for number in range(1200)]  # more than a statement's parameters
    assert store.partial_seconds([*many, "slow"]) == {"slow": 1.5}


def test_many_partials_at_once(store: Store) -> None:
    store.put_partial("key-1700", {"x": np.ones(1)}, 0.0)
    assert list(store.partials(f"key-{i}" for i in range(2000))) == ["key-1700"]


def test_partials_hold_no_pickle(store: Store, address: str) -> None:
    with pytest.raises(InvalidInputError, match="holds Python objects"):
        store.put_partial("objects", {"x": np.array([object()])}, 0.0)
    arrays = {"a/b": np.array([True]), "text": np.array(["é"]), "half": np.ones(2, np.float16)}
    store.put_partial("key", arrays, 0.0)
    rows = sql(address, "SELECT arrays FROM partials")
    assert len(rows) == 1
    with np.load(BytesIO(rows[0][0]), allow_pickle=False) as loaded:  # any numpy reads it
        assert_same(dict(loaded), arrays)
    assert_same(store.partials(["key"])["key"], arrays)


@pytest.mark.parametrize("damage", ["cut", "pickle", "flip"])
def test_damaged_partial_is_an_error(store: Store, address: str, damage: str) -> None:
    store.put_partial("key", {"x": np.arange(100.0)}, 0.0)
    data = sql(address, "SELECT arrays FROM partials")[0][0]
    if damage == "pickle":
        out = BytesIO()
        np.savez(out, x=np.array([{}], object))
        bad = out.getvalue()
    else:
        bad = data[:200] if damage == "cut" else data[:300] + b"\xff\xff" + data[302:]
    sql(address, "UPDATE partials SET arrays = :bad", bad=bad)
    with pytest.raises(StorageError, match="damaged"):
        store.partials(["key"])


def test_same_partial_gives_the_same_bytes() -> None:
    assert npz_bytes({"x": np.ones(3)}) == npz_bytes({"x": np.ones(3)})
    with zipfile.ZipFile(BytesIO(npz_bytes({"x": np.ones(3)}))) as archive:
        assert archive.namelist() == ["x.npy"]


def test_kernel_latencies_of_a_device(store: Store) -> None:
    def latency(device: str, shape: str, median_s: float) -> KernelLatency:
        return KernelLatency(
            device=device,
            case=KernelCase("onnxruntime", "MatMulNBits bits=4", shape),
            median_s=median_s,
            low_s=median_s * 0.9,
            high_s=median_s * 1.1,
            rounds=30,
            noisy=shape == "b",
        )

    first, second, elsewhere = (
        latency("d", "a", 1.0),
        latency("d", "b", 2.0),
        latency("e", "a", 3.0),
    )
    again = latency("d", "a", 0.5)
    for one in (first, second, elsewhere, again):
        store.put_kernel_latency(one)
    assert store.kernel_latencies("d") == {again.case: again, second.case: second}
    assert store.kernel_latencies("unknown") == {}
