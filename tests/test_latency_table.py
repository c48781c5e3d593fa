"""The latency table: sums of kernel times, each measured once, never a made-up one."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from hw_cost_models import get_cost_model
from hw_cost_models.latency import MeasuredLatency, noise_note
from hw_cost_models.measured.capability import kernel_for
from hw_cost_models.measured.protocol import Op, Stopwatch
from mpq.core.errors import InvalidInputError
from mpq.core.formats import parse_scheme
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import Convolution, Layer, LayerGraph, Unit
from mpq.core.tables import Cells

FP32, INT8, INT4 = map(parse_scheme, ("fp32", "int8:int8", "int4g32"))


class CountingStopwatch(Stopwatch):
    """Says that the n-th kernel it ever saw takes n milliseconds, plus or minus ten per cent."""

    seen: ClassVar[list[KernelCase]] = []
    budgets: ClassVar[list[float]] = []

    def measure(
        self,
        ops: Sequence[Op],
        reference: Op,
        device: str,
        progress: Callable[[float], None] | None = None,
    ) -> list[KernelLatency]:
        found = []
        width = max(0.1, self.target)
        self.budgets.append(self.budget_s)
        for op in ops:
            self.seen.append(op.case)
            seconds = 1e-3 * len(self.seen)
            found.append(
                KernelLatency(
                    device=device,
                    case=op.case,
                    median_s=seconds,
                    low_s=(1 - width) * seconds,
                    high_s=(1 + width) * seconds,
                    rounds=1,
                )
            )
        if progress is not None:
            progress(1.0)
        return found


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    CountingStopwatch.seen.clear()


def linear(name: str, outputs: int, inputs: int, rows: int = 4, calls: int = 1) -> Layer:
    return Layer(
        name=name,
        kind="linear",
        weight_shape=(outputs, inputs),
        weight_id=f"{name}.weight",
        weight_bytes=4 * outputs * inputs,
        input_shape=(1, rows, inputs),
        output_shape=(1, rows, outputs),
        macs=rows * outputs * inputs * calls,
        calls=calls,
        order=0,
    )


def convolution(name: str) -> Layer:
    return Layer(
        name=name,
        kind="conv2d",
        weight_shape=(8, 4, 3, 3),
        weight_id=f"{name}.weight",
        weight_bytes=8 * 4 * 9 * 4,
        input_shape=(1, 4, 8, 8),
        output_shape=(1, 8, 8, 8),
        macs=8 * 8 * 8 * 36,
        calls=1,
        order=0,
        convolution=Convolution(
            kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1
        ),
    )


def network() -> LayerGraph:
    """q and k share a shape and a unit; twice runs two times; head is outside; mixed has a conv."""
    layers = (
        linear("q", 64, 64),
        linear("k", 64, 64),
        linear("twice", 32, 64, calls=2),
        linear("mixed", 64, 64),
        convolution("conv"),
        linear("head", 96, 64),
        linear("never", 64, 64, calls=0),
    )
    units = (
        Unit(name="qk", layers=("q", "k")),
        Unit(name="twice", layers=("twice",)),
        Unit(name="mixed", layers=("mixed", "conv")),
    )
    return LayerGraph(layers=layers, units=units, unsearched=(), sample="one")


CELLS = Cells(units=("qk", "twice", "mixed"), schemes=((FP32, INT4), (INT8, INT4), (FP32, INT8)))


def time_of(model: MeasuredLatency, layer: Layer, text: str) -> float:
    wanted = kernel_for(layer, parse_scheme(text))
    assert wanted is not None
    (seconds,) = [
        latency.median_s
        for case, latency in model.latencies.items()
        if case.kernel == wanted.kernel
        and case.shape == f"{wanted.shape} in a network of 16Ki weights"
    ]
    return seconds


def test_a_cell_is_the_sum_over_layers_and_calls() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    table = model.table(network(), CELLS)
    square, twice, conv, head = (
        linear("", 64, 64),
        linear("", 32, 64),
        convolution(""),
        linear("", 96, 64),
    )
    expected = {
        ("qk", FP32): 2 * time_of(model, square, "fp32"),
        ("qk", INT4): 2 * time_of(model, square, "int4g32"),
        ("twice", INT8): 2 * time_of(model, twice, "int8:int8"),
        ("twice", INT4): 2 * time_of(model, twice, "int4g32"),
        ("mixed", FP32): time_of(model, square, "fp32") + time_of(model, conv, "fp32"),
        ("mixed", INT8): time_of(model, square, "int8:int8") + time_of(model, conv, "int8:int8"),
    }
    for cell, seconds in expected.items():
        assert table[cell] == pytest.approx(seconds)
    np.testing.assert_allclose(table.low, 0.9 * table.values)
    np.testing.assert_allclose(table.high, 1.1 * table.values)
    assert table.fixed == pytest.approx(time_of(model, head, "fp32"))
    assert table.baseline == pytest.approx(
        table.fixed + table["qk", FP32] + 2 * time_of(model, twice, "fp32") + table["mixed", FP32]
    )
    assert (table.name, table.unit) == ("latency", "s")
    assert table.provenance == f"measured on {model.device}"


def test_the_network_as_it_is_costs_exactly_the_baseline() -> None:
    """A budget of 100 % must be in reach; sums in another order may be off by the last bit."""
    layers = tuple(linear(f"layer{n}", 32, 32 * n) for n in range(1, 9))
    units = tuple(Unit(name=layer.name, layers=(layer.name,)) for layer in layers)
    graph = LayerGraph(layers=layers, units=units, unsearched=(), sample="one")
    names = tuple(unit.name for unit in units)
    cells = Cells(units=names, schemes=((FP32, INT8),) * len(names))
    known: dict[KernelCase, KernelLatency] = {}
    model = MeasuredLatency(stopwatch=CountingStopwatch(), known=known)
    model.table(graph, cells)
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = {
            case: replace(latency, median_s=seconds, low_s=seconds, high_s=seconds)
            for case, latency in model.latencies.items()
            for seconds in [float(rng.uniform(1e-7, 1e-4))]
        }
        table = MeasuredLatency(stopwatch=CountingStopwatch(), known=times).table(graph, cells)
        as_it_is = np.array([cells.index((name, FP32)) for name in names])
        assert table.total(as_it_is) == table.baseline


def test_each_kernel_is_timed_once_however_many_layers_it_runs() -> None:
    MeasuredLatency(stopwatch=CountingStopwatch()).table(network(), CELLS)
    seen = CountingStopwatch.seen
    assert len(seen) == len(set(seen)) == 9
    shapes = [case.shape for case in seen]
    assert shapes == sorted(shapes)  # all schemes of a shape side by side


def test_the_second_use_costs_nothing() -> None:
    saved: dict[KernelCase, KernelLatency] = {}

    def save(latency: KernelLatency) -> None:
        saved[latency.case] = latency

    first = MeasuredLatency(stopwatch=CountingStopwatch(), save=save).table(network(), CELLS)
    assert set(saved) == set(CountingStopwatch.seen)
    CountingStopwatch.seen.clear()
    again = MeasuredLatency(stopwatch=CountingStopwatch(), known=saved, save=save)
    second = again.table(network(), CELLS)
    assert CountingStopwatch.seen == []
    np.testing.assert_array_equal(first.values, second.values)
    assert (first.fixed, first.baseline) == (second.fixed, second.baseline)


def test_only_what_is_missing_is_measured() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    model.table(network(), CELLS)
    known = dict(model.latencies)
    gone = known.popitem()[0]
    CountingStopwatch.seen.clear()
    MeasuredLatency(stopwatch=CountingStopwatch(), known=known).table(network(), CELLS)
    assert CountingStopwatch.seen == [gone]


def test_a_wide_noisy_time_is_measured_again_and_the_narrower_one_kept() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    model.table(network(), CELLS)
    wide, narrow = sorted(model.latencies, key=str)[:2]
    known = dict(model.latencies)
    for case, share in ((wide, 0.2), (narrow, 0.14)):
        median_s = known[case].median_s
        known[case] = replace(
            known[case], low_s=median_s * (1 - share), high_s=median_s * (1 + share), noisy=True
        )
    CountingStopwatch.seen.clear()
    CountingStopwatch.budgets.clear()
    saved: list[KernelLatency] = []
    again = MeasuredLatency(
        stopwatch=CountingStopwatch(budget_s=9.0), known=known, save=saved.append
    )
    again.table(network(), CELLS)
    assert CountingStopwatch.seen == [wide]
    assert 0.5 <= CountingStopwatch.budgets[0] <= 1.0  # one of nine kernels
    assert [latency.case for latency in saved] == [wide]
    assert again.latencies[wide] == saved[0]
    again.table(network(), CELLS)
    assert CountingStopwatch.seen == [wide]  # one more chance, not many


def test_a_second_measurement_that_is_wider_is_not_kept() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    model.table(network(), CELLS)
    case, good = next(iter(model.latencies.items()))
    half_s = 0.16 * good.median_s
    known = model.latencies | {
        case: replace(good, low_s=good.median_s - half_s, high_s=good.median_s + half_s, noisy=True)
    }
    saved: list[KernelLatency] = []
    stopwatch = CountingStopwatch(target=0.5)  # what it measures is that uncertain
    again = MeasuredLatency(stopwatch=stopwatch, known=known, save=saved.append)
    again.table(network(), CELLS)
    assert CountingStopwatch.seen[-1] == case
    assert saved == []
    assert again.latencies[case] == known[case]


def test_times_that_are_very_uncertain_are_told() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    table = model.table(network(), CELLS)
    assert noise_note(table) == ""
    high = table.high.copy()
    high[3] += 0.5 * table.values[3]  # from 10 to 35 %
    high[1] += 0.2 * table.values[1]  # to 20 %
    note = noise_note(replace(table, high=high))
    assert note.startswith("2 of 6 times are uncertain by more than 15%, most that of 'twice' in")
    assert "int4g32 (35%)" in note
    assert noise_note(replace(table, low=table.values, high=table.values)) == ""


def test_times_of_another_device_are_not_used() -> None:
    model = MeasuredLatency(stopwatch=CountingStopwatch())
    model.table(network(), CELLS)
    CountingStopwatch.seen.clear()
    elsewhere = MeasuredLatency(num_threads=2, stopwatch=CountingStopwatch(), known=model.latencies)
    elsewhere.table(network(), CELLS)
    assert len(CountingStopwatch.seen) == 9


def test_large_tables_are_measured_in_parts_that_share_the_budget() -> None:
    layers = tuple(linear(f"l{i}", 32, 32, rows=i + 1) for i in range(30))
    graph = LayerGraph(
        layers=layers,
        units=tuple(Unit(name=la.name, layers=(la.name,)) for la in layers),
        unsearched=(),
        sample="one",
    )
    cells = Cells(units=tuple(la.name for la in layers), schemes=((FP32,),) * 30)
    seen: list[float] = []
    model = MeasuredLatency(stopwatch=CountingStopwatch(), progress=seen.append)
    model.table(graph, cells)
    assert seen == pytest.approx([24 / 30, 1.0])
    assert len(CountingStopwatch.seen) == 30


def test_a_cell_without_a_kernel_is_refused_and_not_estimated() -> None:
    cells = Cells(units=("mixed",), schemes=((INT4,),))
    with pytest.raises(InvalidInputError, match="no kernel quantizes the weights of conv2d alone"):
        MeasuredLatency(stopwatch=CountingStopwatch()).table(network(), cells)
    assert CountingStopwatch.seen == []


def test_real_kernels_end_to_end() -> None:
    saved: list[KernelLatency] = []
    model = get_cost_model("latency", budget_s=1.0, save=saved.append)
    table = model.table(network(), CELLS)
    assert (table.values > 1e-7).all()
    assert (table.values < 1e-2).all()
    assert (table.low < table.values).all()
    assert (table.values < table.high).all()
    assert 0 < table.fixed < table.baseline
    assert len(saved) == 9
    assert all(latency.rounds >= 6 for latency in saved)


def test_the_benchmark_asks_for_cells_that_have_kernels() -> None:
    path = Path(__file__).parent.parent / "benchmarks" / "latency_table.py"
    benchmark = runpy.run_path(str(path))
    graph = benchmark["encoder"](8)
    cells = benchmark["choices"](graph)
    MeasuredLatency(stopwatch=CountingStopwatch()).table(graph, cells)
    assert len(cells.units) == 36
    assert len(CountingStopwatch.seen) == len(
        {
            (s, la.weight_shape)
            for la, ss in zip(graph.layers, cells.schemes, strict=True)
            for s in ss
        }
    )
