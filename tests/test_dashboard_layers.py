"""Pages across runs: what layers got, and what kernels take."""

from __future__ import annotations

import html
from dataclasses import replace
from typing import Any

import pytest
import torch

import mpq
from hw_cost_models.measured.capability import kernel_for
from mpq.core.evaluation import CHOSEN
from mpq.core.formats import parse_scheme
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import Layer
from mpq.dashboard.kernel_name import kernel_name
from mpq.dashboard.kernels_view import kernels_view
from mpq.layer_use import layer_uses
from mpq.store.layer_counts import counted_models
from mpq.store.store import Store, open_store
from mpq.store.timed_devices import timed_devices
from tests.pages import (
    NAMES,
    SPEC,
    asking,
    figure,
    read,
    searched,
    store,
    strange_net,
    texts,
)

__all__ = ["searched", "store"]  # fixtures


# --- layers across runs ---------------------------------------------------------------------------


def test_layers_show_the_counts_of_the_view(searched: tuple[Store, list[str]]) -> None:
    store, _ = searched
    uses = layer_uses(store)
    page = read(asking(store), "/layers", bits=3)
    said = texts(page)
    assert uses.always(3)
    assert f"{len(uses.always(3))} of {len(uses.layers)} layers got 3 bits or more" in said
    assert not uses.always(8)
    assert "no layer always got 8 bits or more" in texts(read(asking(store), "/layers"))
    bits = sorted({b for layer in uses.layers for b in layer.bits})
    for layer in uses.layers:
        counts = " ".join(str(layer.bits.get(b, "–")) for b in bits)
        numbers = f"{layer.runs} {layer.least_bits} {layer.mean_bits:.4g} {counts}"
        assert f"{layer.layer} {numbers}" in said
    drawn = figure(page, "layers-plot")["data"]
    assert [trace["name"] for trace in drawn] == [f"{b} bit" for b in bits]
    shares = [sum(trace["y"][n] for trace in drawn) for n in range(len(uses.layers))]
    assert shares == pytest.approx([100] * len(uses.layers))


def test_models_with_a_result_are_counted_in_the_database(
    address: str, searched: tuple[Store, list[str]]
) -> None:
    source, (first, *_) = searched
    chosen = dict(source.solutions(first))[CHOSEN]
    with open_store(address) as store:
        assert counted_models(store) == {}
        for model in (NAMES[1], "b", NAMES[1], "without"):
            run_id = store.create_run(replace(SPEC, model=model))
            if model != "without":
                store.put_solution(run_id, CHOSEN, chosen)
                store.put_solution(run_id, "uniform int8", chosen)
        assert counted_models(store) == {NAMES[1]: 2, "b": 1}


def test_layers_are_filtered_as_runs_are(searched: tuple[Store, list[str]]) -> None:
    store, _ = searched
    client = asking(store)
    assert "1 run with a result" in texts(read(client, "/layers", tag=NAMES[1]))
    assert "1 run with a result" in texts(read(client, "/layers", budget="memory <= 21%"))
    page = read(client, "/layers", tag="unknown")
    assert "no run with these properties" in texts(page)
    assert 'value="unknown"' in page
    assert "since" in texts(read(client, "/layers", 422, since="someday")).lower()


def test_strange_names_are_shown_as_they_are(store: Store) -> None:
    found = []
    for name in NAMES[:2]:
        batches = [torch.randn(4, 8) for _ in range(2)]
        budget = f"memory <= {30 + 10 * len(found)}%"
        result = mpq.search(
            strange_net(),
            batches,
            budgets=[budget],
            schemes=["int3", "int8"],
            metric="kl",
            executor="serial",
            refine=0,
            storage=store,
            name=name,
        )
        found.append(result.run_id)
    client = asking(store)
    layers = [name.replace(".", "") for name in NAMES]
    compared = read(client, "/compare", run=found, layers="all")
    pages = [compared, read(client, "/layers"), read(client, "/compare")]
    for page in pages:
        assert "<script>alert" not in page
        assert "<b>bold" not in page
    for layer in layers:
        assert " ".join(layer.split()) in texts(compared)
        assert " ".join(layer.split()) in texts(pages[1])
    for name in NAMES[:2]:
        assert name in texts(compared)
        assert name in texts(pages[2])
    hovered = [item[0] for item in figure(pages[1], "layers-plot")["data"][0]["customdata"]]
    assert [html.unescape(name) for name in hovered] == layers
    assert not any("<" in name for name in hovered)


# --- kernels --------------------------------------------------------------------------------------


def timed(
    store: Store, kernel: str, median_s: float, shape: str = "linear 4x8->8", **more: Any
) -> None:
    given = {
        "low_s": 0.9 * median_s,
        "high_s": 1.1 * median_s,
        "rounds": 30,
        "device": "d1",
        **more,
    }
    case = KernelCase("onnxruntime", kernel, shape)
    store.put_kernel_latency(KernelLatency(case=case, median_s=median_s, **given))


def test_devices_are_counted_in_the_database(address: str) -> None:
    with open_store(address) as store:
        assert timed_devices(store) == ()
        timed(store, "MatMul fp32", 1e-3)
        timed(store, "MatMulNBits bits=4 block=32", 2e-3, noisy=True)
        timed(store, "MatMul fp32", 1e-3, device="d2")
        found = timed_devices(store)
    assert [(one.device, one.kernels, one.noisy) for one in found] == [("d2", 1, 0), ("d1", 2, 1)]


def test_kernels_show_times_speedups_and_where_more_bits_are_faster(store: Store) -> None:
    timed(store, "MatMul fp32", 4e-3)
    timed(store, "MatMulNBits bits=8 block=64 accuracy_level=4", 2e-3)
    timed(store, "MatMulNBits bits=4 block=32 accuracy_level=4", 2.1e-3)  # within both intervals
    timed(store, "MatMulNBits bits=2 block=32 accuracy_level=4 zero_points", 5e-3, noisy=True)
    timed(store, "MatMul fp32", 1e-3, shape="linear 1x2->2")
    timed(store, "MatMulNBits bits=4 block=16 accuracy_level=4", 5e-4, shape="linear 1x2->2")
    view = kernels_view(store)
    assert view is not None
    rows = {row.label: row for shape in view.shapes for row in shape.rows if "4x8" in shape.shape}
    assert rows["int8g64"].speedup == 2.0
    assert rows["int2g32a"].speedup == pytest.approx(0.8)
    assert view.slower == (
        "linear 4x8->8: int2g32a (5.0 ms) is slower than int8g64 (2.0 ms), int4g32 (2.1 ms), "
        "fp32 (4.0 ms).",
    )
    page = read(asking(store), "/kernels", device="d1", family="linear")
    said = texts(page)
    assert view.slower[0] in said
    assert "on 1 of 2 shapes" in said
    assert said.count("noisy") == 2
    assert "1.8 ms to 2.2 ms" in said
    drawn = {trace["name"]: trace for trace in figure(page, "kernels-plot")["data"]}
    assert drawn["int8g64"]["x"] == [2.0]
    assert drawn["int2g32a"]["y"] == ["linear 4x8-&gt;8"]
    assert drawn["int2g32a"]["y"] == ["linear 4x8->8".replace(">", "&gt;")]
    assert drawn["int4g16"]["x"] == [2.0]
    assert "fp32" not in drawn


def test_an_unknown_device_is_told_beside_the_known_ones(store: Store) -> None:
    timed(store, "MatMul fp32", 1e-3, device=NAMES[0])
    client = asking(store)
    page = read(client, "/kernels", 404, device="d2")
    assert "d2" in texts(page)
    assert NAMES[0] in texts(page)
    assert "family" in texts(read(client, "/kernels", 404, family="convolutions"))
    assert "Gather" not in texts(read(client, "/kernels", device=NAMES[0]))


@pytest.mark.parametrize(
    "scheme",
    [
        "fp32",
        "int8:int8",
        "int8t:int8",
        "int8:int8static",
        "int8g64",
        "int4g32",
        "int4g16a",
        "int2g32a",
    ],
)
def test_the_format_of_a_kernel_is_read_from_its_name(scheme: str) -> None:
    layer = Layer(
        name="l",
        kind="linear",
        weight_shape=(64, 64),
        weight_id="l",
        weight_bytes=64 * 64 * 4,
        input_shape=(4, 64),
        output_shape=(4, 64),
        macs=4 * 64 * 64,
        calls=1,
        order=0,
    )
    case = kernel_for(layer, parse_scheme(scheme))
    assert case is not None
    name = kernel_name(replace(case, shape=f"{case.shape} in a network of 8Mi weights"))
    assert (name.label, name.bits) == (scheme, parse_scheme(scheme).weights.bits)
    assert (name.family, name.shape, name.size) == ("linear", "linear 4x64->64", "8Mi")


@pytest.mark.parametrize(
    ("kernel", "label"),
    [
        ("aten::conv2d fp32", "fp32"),
        ("quantized::linear_dynamic_fp16 x86", "fp16"),
        ("quantized::linear_dynamic x86 reduce_range s8 weights per channel", "int8:int7"),
        ("aten::linear bf16, cast before and after", "bf16"),
        ("quantize, aten::_int_mm, rescale", "int8:int8s"),
        ("aten::_weight_int4pack_mm block=64 bf16, cast before and after", "int4g64a"),
        ("network fp32", "fp32"),
        ("something new", "something new"),
    ],
)
def test_kernels_of_other_libraries_are_read_too(kernel: str, label: str) -> None:
    assert kernel_name(KernelCase("torch_cpu", kernel, "linear 1x1->1")).label == label
