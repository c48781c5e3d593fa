"""Seconds of a choice: the measured times of the kernels that run it on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hw_cost_models import LOCAL, get_kernels
from hw_cost_models.measured.backend import KernelBackend
from hw_cost_models.measured.correction import Parts
from hw_cost_models.measured.protocol import Stopwatch
from mpq.core.errors import InvalidInputError
from mpq.core.formats import FP32, Scheme
from mpq.core.latency import KernelCase, KernelLatency
from mpq.core.layers import Layer, LayerGraph, UnitName
from mpq.core.tables import Cells, CostTable, Indices

_NATIVE = Scheme(FP32)
_TOGETHER = 24  # kernels timed in one set of rounds, which bounds the memory they hold
# A known time whose half-width is a larger share of it is measured again. The drift between
# processes, which no measurement narrows, takes up to 0.12 (a kernel that waits for memory).
_WIDE = 0.15
_Wanted = tuple[KernelBackend, Layer, Scheme]
Run = Callable[[Callable[[], Any]], Any]  # runs a function on another machine


class MeasuredLatency:
    """Sum over the layers of kernel time * calls, from kernels timed on this machine.

    `hardware` names whose kernels: "local" is ONNX Runtime, others are "local:torch_cpu" etc.
    `known` holds times that are not measured again if they are of this device, except noisy ones
    that are uncertain by more than 15 %: each gets one more chance and the narrower interval is
    kept, and where nothing else is missing this takes only their share of the kernels as its
    share of `budget_s`. `save` gets each new time as soon as it is there. `budget_s` bounds the
    time of one table's measurement (unless making the kernels ready takes half of it, or six
    rounds do not fit), `progress` gets its share in [0, 1]. `latencies` holds every time that is
    known by now. With `run` the kernels are those of the machine on which it runs a function.
    """

    name = "latency"

    def __init__(
        self,
        *,
        hardware: str = LOCAL,
        num_threads: int = 1,
        known: Mapping[KernelCase, KernelLatency] | None = None,
        save: Callable[[KernelLatency], None] | None = None,
        budget_s: float = 60.0,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
        stopwatch: Stopwatch | None = None,
        run: Run | None = None,
    ) -> None:
        self._run = run
        self._hardware, self._options = hardware, {"num_threads": num_threads, "seed": seed}
        self.device = self._backend().device  # what every time here belongs to
        self.latencies: dict[KernelCase, KernelLatency] = {
            case: latency
            for case, latency in (known or {}).items()
            if latency.device == self.device
        }
        self._wide = {
            case
            for case, latency in self.latencies.items()
            if latency.noisy and _half_width(latency) > _WIDE
        }
        self._save = save
        self._progress = progress
        self._stopwatch = stopwatch or Stopwatch(budget_s=budget_s, seed=seed)

    def _backend(self, **options: Any) -> KernelBackend:
        make = partial(get_kernels, self._hardware, **self._options, **options)
        found: KernelBackend = make() if self._run is None else self._run(make)
        return found

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the seconds of every cell with 95 % confidence limits.

        The limits of a sum are the sums of the limits: the machine's speed, the largest error,
        is common to all kernels. `fixed` is the fp32 time of layers outside the search that have
        a kernel (nothing else of the network: norms, softmax, attention products), `baseline`
        that of all layers. A layer that is called several times counts with the shape of its
        first call. Experts that stay as they are count nothing, like all that has no kernel.
        Raises InvalidInputError (`no_kernel`) for a cell without a real kernel.
        """
        return self.tables({self.name: graph}, cells)[self.name]

    def tables(self, graphs: Mapping[str, LayerGraph], cells: Cells) -> dict[str, CostTable]:
        """Return the table of each graph, by its name; all kernels are timed side by side.

        The graphs are one network on samples of several shapes.
        """
        served = self._served(graphs)
        self._measure([one for given in served.values() for one in self._wanted(*given, cells)])
        return self.known_tables(graphs, cells)

    def untimed(self, graphs: Mapping[str, LayerGraph], cells: Cells) -> int:
        """Return how many kernels have no time yet that `tables` needs."""
        served = self._served(graphs).values()
        wanted = [one for given in served for one in self._wanted(*given, cells)]
        cases = {backend.case(layer, scheme) for backend, layer, scheme in wanted}
        return len(cases - self.latencies.keys())

    def known_tables(self, graphs: Mapping[str, LayerGraph], cells: Cells) -> dict[str, CostTable]:
        """Return `tables` of the times that are known, noisy ones too; none may be missing."""
        served = self._served(graphs)
        return {name: self._table(name, *given, cells) for name, given in served.items()}

    def _served(
        self, graphs: Mapping[str, LayerGraph]
    ) -> dict[str, tuple[KernelBackend, LayerGraph]]:
        return {
            name: (self._backend(network_weights=_size(graph)), graph)
            for name, graph in graphs.items()
        }

    def _wanted(self, backend: KernelBackend, graph: LayerGraph, cells: Cells) -> list[_Wanted]:
        units = _layers_by_unit(graph)
        outside = _outside(backend, graph)
        inside = (la for layers in units.values() for la in layers if la.kind != "experts")
        native = [(layer, _NATIVE) for layer in (*outside, *inside)]
        in_cells = [
            (layer, scheme)
            for unit, scheme in cells
            for layer in units[unit]
            if not _untimed(layer, scheme)
        ]
        return [(backend, layer, scheme) for layer, scheme in (*native, *in_cells)]

    def _table(
        self, name: str, backend: KernelBackend, graph: LayerGraph, cells: Cells
    ) -> CostTable:
        units = _layers_by_unit(graph)
        sums = np.array([self._sum(backend, units[unit], scheme) for unit, scheme in cells])
        fixed = self._sum(backend, _outside(backend, graph), _NATIVE)[0]
        # exactly what `CostTable.total` adds up, so that 100 % is in reach of the network as it is
        searched_s = math.fsum(self._sum(backend, la, _NATIVE)[0] for la in units.values())
        return CostTable(
            name=name,
            unit="s",
            cells=cells,
            values=sums[:, 0],
            low=sums[:, 1],
            high=sums[:, 2],
            fixed=fixed,
            baseline=fixed + searched_s,
            weights=graph.searched_weights,
            provenance=f"measured on {self.device}",
        )

    def parts(self, graph: LayerGraph, cells: Cells) -> Parts:
        """Return the kernel times that the cells of this graph's table are sums of."""
        backend = self._backend(network_weights=_size(graph))
        units = _layers_by_unit(graph)
        found = [
            (number, backend.case(layer, scheme), layer.calls)
            for number, (unit, scheme) in enumerate(cells)
            for layer in units[unit]
            if not _untimed(layer, scheme)
        ]
        seconds = [calls * self.latencies[case].median_s for _, case, calls in found]
        return Parts(
            cell=np.array([number for number, _, _ in found], np.int64),
            seconds=np.array(seconds, np.float64),
            kernel=_counted([case.kernel for _, case, _ in found]),
            case=_counted([f"{case.kernel} {case.shape}" for _, case, _ in found]),
        )

    def _sum(
        self, backend: KernelBackend, layers: Sequence[Layer], scheme: Scheme
    ) -> tuple[float, float, float]:
        timed = [layer for layer in layers if not _untimed(layer, scheme)]
        parts = [(self.latencies[backend.case(layer, scheme)], layer.calls) for layer in timed]
        return (
            sum(calls * latency.median_s for latency, calls in parts),
            sum(calls * latency.low_s for latency, calls in parts),
            sum(calls * latency.high_s for latency, calls in parts),
        )

    def _measure(self, wanted: Sequence[_Wanted]) -> None:
        """Time each kernel that has no good time yet; all schemes of a shape side by side."""
        cases = {
            backend.case(layer, scheme): (backend, layer, scheme)
            for backend, layer, scheme in wanted
        }
        missing, wide = cases.keys() - self.latencies.keys(), cases.keys() & self._wide
        self._wide -= wide
        new = sorted(missing | wide, key=lambda c: (c.shape, c.kernel))
        whole_s = self._stopwatch.budget_s * (1.0 if missing else len(wide) / len(cases))
        for start in range(0, len(new), _TOGETHER):
            part = new[start : start + _TOGETHER]
            share = len(part) / len(new)

            def progress(used: float, start: int = start, share: float = share) -> None:
                if self._progress is not None:
                    self._progress(start / len(new) + used * share)

            stopwatch = replace(self._stopwatch, budget_s=whole_s * share)
            timing = partial(_timed, [cases[case] for case in part], stopwatch)
            if self._run is None:
                measured = timing(progress)
            else:  # a listener does not travel
                measured = self._run(partial(_timed_there, timing, self._hardware, self.device))
                progress(1.0)
            for latency in measured:
                known = self.latencies.get(latency.case)
                if known is not None and _half_width(known) <= _half_width(latency):
                    continue
                self.latencies[latency.case] = latency
                if self._save is not None:
                    self._save(latency)


def _timed(
    kernels: Sequence[_Wanted],
    stopwatch: Stopwatch,
    progress: Callable[[float], None] | None = None,
) -> list[KernelLatency]:
    """Make kernels ready and time them side by side, in this process."""
    start_s = time.monotonic()
    ops = [backend.op(layer, scheme) for backend, layer, scheme in kernels]
    backend = kernels[0][0]
    reference = backend.reference()
    left_s = max(stopwatch.budget_s - (time.monotonic() - start_s), stopwatch.budget_s / 2)
    return replace(stopwatch, budget_s=left_s).measure(ops, reference, backend.device, progress)


def _timed_there(
    timing: Callable[[], list[KernelLatency]], hardware: str, device: str
) -> list[KernelLatency]:
    """Time kernels on a machine that is the one they were chosen for."""
    here = get_kernels(hardware).device
    if here != device:
        raise InvalidInputError(
            "device",
            f"nodes of one device name are different machines, {device!r} and {here!r}: give each "
            f"a name of its own",
        )
    return timing()


def noise_note(table: CostTable) -> str:
    """Return how many times of a table are uncertain by more than 15 %, "" where none is."""
    share = (table.high - table.low) / 2 / np.maximum(table.values, 1e-12)
    wide = int((share > _WIDE).sum())
    if not wide:
        return ""
    (unit, scheme), worst = max(zip(table.cells, share, strict=True), key=lambda pair: pair[1])
    return (
        f"{wide} of {len(share)} times are uncertain by more than {_WIDE:.0%}, most that of "
        f"{unit!r} in {scheme} ({worst:.0%}): the next search measures their noisy kernels again"
    )


def _outside(backend: KernelBackend, graph: LayerGraph) -> list[Layer]:
    """Return the layers that no choice changes and that have a kernel as they are."""
    searched = {name for unit in graph.units for name in unit.layers}
    return [
        layer
        for layer in graph.layers
        if layer.name not in searched and layer.calls and not backend.why_not(layer, _NATIVE)
    ]


def _untimed(layer: Layer, scheme: Scheme) -> bool:
    """Tell whether a layer stays as it is and has no kernel: no choice changes its time."""
    return layer.kind == "experts" and scheme.is_native


def _half_width(latency: KernelLatency) -> float:
    """Return half the width of the interval as a share of the median."""
    return (latency.high_s - latency.low_s) / 2 / latency.median_s


def _layers_by_unit(graph: LayerGraph) -> dict[UnitName, tuple[Layer, ...]]:
    return dict(graph.kernels)


def _counted(names: Sequence[str]) -> Indices:
    """Return a number for each name, equal ones for equal names."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def _size(graph: LayerGraph) -> int:
    """Return the weights that one pass reads; of an embedding it reads a few rows only."""
    read = (layer for layer in graph.layers if layer.calls and layer.kind != "embedding")
    return sum({layer.weight_id: layer.num_weights for layer in read}.values())
