"""What choices cost, and which of them the hardware can run when its time is budgeted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hw_cost_models import (
    COST_MODELS,
    get_cost_model,
    get_hardware,
    get_kernels,
    is_measured,
    place_of,
)
from hw_cost_models.latency import MeasuredLatency, Run, noise_note
from hw_cost_models.measured.backend import KernelBackend
from hw_cost_models.measured.capability import BACKEND
from mpq.apart import check_costs, schemes_apart, weights_alone
from mpq.choices import parse_schemes
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Format, PerGroup, Scheme, native_scheme, parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import BudgetText
from mpq.core.profiles import weighted_latency
from mpq.core.protocols import LatencyModel
from mpq.core.tables import Cells, CostTable
from mpq.nn.batches import Batch
from mpq.nn.workload import Workload
from mpq.profiles import Served, with_ranges
from mpq.progress import Progress
from mpq.store.store import Store

# For a layer that has no default scheme; of each line the first that fits the weight.
_WITHOUT_KERNEL = (("int8",),)
_OF_EXPERTS = (
    ("fp32",),
    ("int8g64", "int8g32", "int8g16", "int8"),
    ("int4g128", "int4g64", "int4"),
    ("int4g32", "int4g16"),
    ("int2g32a",),
)
_NOTHING = "in none that is not wider than its weights: leave it out with skip"
LATENCY = "latency"  # the time on the sample, or the mean of all profiles
RunExclusively = Callable[..., Any]  # (fn, resources), as in mpq.core.protocols.Executor
KV_CACHE = "kv_cache"
_CACHES_UNTIMED = "no time of attention is taken: formats of KV caches cost none and save none"
_SHARE = 0.001  # of a node's device: the resource says where, workers may hold the rest
_NUM_THREADS = 1  # of a kernel; a layer's time is comparable between machines only so


_ALWAYS = ("memory", "bops")
_WHERE_NAMED = ("macs", "energy", "luts")
_WHILE_RUNNING = ("resident", "peak")


class Hardware:
    """The schemes that a machine's kernels run and the time they take: measured, or modelled.

    Where a time is budgeted or minimised, and always on a machine that is not this one, a scheme
    without a real kernel (or a time) is not offered to a layer, and `left_out` says why; without
    one every scheme that can be stored is offered. `beside(cost)` returns the options of the
    models of what is in memory while the network runs. With profiles (`served`) each has a time
    of its own, a scheme is offered where all of them have its kernels, and "latency" is their
    weighted mean; without, it is the time on the sample. Kernels of a node of a cluster are timed
    there, by what `run_exclusively(fn, resources)` of an executor runs. Raises InvalidInputError
    for hardware, a budgeted cost or one to minimise that is unknown.
    """

    def __init__(
        self,
        spec: JobSpec,
        budgets: Sequence[BudgetText],
        store: Store,
        progress: Progress,
        beside: Callable[[str], Mapping[str, int]] = lambda _: {},
        served: Mapping[str, Served] | None = None,
        run_exclusively: RunExclusively | None = None,
    ) -> None:
        self._served = served or {}
        self._layers = [one.graph.by_name for one in self._served.values()]
        self._hardware = spec.hardware
        self._model: LatencyModel | None = None
        self._kernel_times: MeasuredLatency | None = None
        self._run: Run | None = None
        if is_measured(spec.hardware):
            place, self._whose = place_of(spec.hardware)
            if place:
                self._run = _on_node(place, self._whose, run_exclusively)
            make = partial(get_kernels, self._whose, num_threads=_NUM_THREADS)
            self._kernels: KernelBackend = self._run(make) if self._run else make()
            self.device = self._kernels.device
        else:
            self._model = get_hardware(spec.hardware)
            self.device = self._model.provenance
        self._named = [*spec.minimised, *(budget.cost for budget in budgets)]
        for cost in self._named:
            if cost not in COST_MODELS and cost not in self._served:
                raise unknown("cost", cost, {*COST_MODELS, *self._served})
        timed = {LATENCY, *self._served} & set(self._named)
        check_costs(spec, self._named, [*self._served])
        self._spec = spec
        self._has_caches = False
        self.times_matter = self._model is not None or bool(timed)
        self.left_out: list[str] = []
        self._asked = None if spec.schemes is None else parse_schemes(spec.schemes)
        self._seed = spec.seed
        self._seconds = spec.latency_seconds
        self._beside = beside
        self._store = store
        self._progress = progress

    def schemes(self, layer: Layer) -> Sequence[Scheme]:
        """Return what a layer may take; experts stay as they are where nothing else is left."""
        if layer.source:
            self._has_caches |= layer.is_cache
            return schemes_apart(self._spec, layer)
        asked = self._asked or self._offered(layer) or _without_kernel(layer)
        if self._spec.activations == "apart":
            asked = weights_alone(asked, self._asked is not None)
        reasons = {scheme: self._why_not(layer, scheme) for scheme in asked}
        self.left_out += [f"{layer.name}: {reason}" for reason in reasons.values() if reason]
        runs = [scheme for scheme, reason in reasons.items() if not reason]
        if not runs and layer.kind == "experts":
            self.left_out.append(f"{layer.name}: nothing asked for is left, it stays as it is")
            runs = [native_scheme(layer.native_family)]
        if not self.times_matter:
            return runs
        if not runs:
            raise InvalidInputError(
                "unsupported_schemes",
                f"{self._when} layer {layer.name!r} needs a scheme that {self._machine} "
                f"runs: {'; '.join(reasons.values())}; it runs "
                f"{', '.join(map(str, self._offered(layer))) or _NOTHING}",
            )
        return runs

    @property
    def _when(self) -> str:
        return "under a latency budget" if self._model is None else f"on {self.device}"

    @property
    def _machine(self) -> str:
        if self._run is not None:
            return self._hardware
        return "this machine" if self._model is None else "it"

    def _offered(self, layer: Layer) -> Sequence[Scheme]:
        kernels = self._model or self._kernels
        first, *others = self._shapes(layer)
        offered = kernels.schemes(first)
        return [s for s in offered if not any(kernels.why_not(other, s) for other in others)]

    def _shapes(self, layer: Layer) -> list[Layer]:
        """Return a layer as it is timed: as each profile runs it, or as the sample does."""
        return [layers[layer.name] for layers in self._layers] or [layer]

    def _why_not(self, layer: Layer, scheme: Scheme) -> str:
        if layer.why_weights_only and not scheme.activations.is_native:
            return (
                f"{scheme}: a layer of kind {layer.kind!r} {layer.why_weights_only}, there are no "
                f"activations to quantize"
            )
        if self._model is not None:
            return self._no_kernel(self._model, layer, scheme)
        if layer.kind == "experts" and scheme == native_scheme(layer.native_family):
            return ""  # its time is outside of all that is measured
        return self._no_kernel(self._kernels, layer, scheme) if self.times_matter else ""

    def _no_kernel(
        self, kernels: LatencyModel | KernelBackend, layer: Layer, scheme: Scheme
    ) -> str:
        """Return why one of the shapes of a layer has no kernel, "" where all have one."""
        reasons = [kernels.why_not(shape, scheme) for shape in self._shapes(layer)]
        if len(set(reasons)) == 1:
            return reasons[0]
        names = [f" (profile {name!r})" for name in self._served]
        told = (reason + name for reason, name in zip(reasons, names, strict=True) if reason)
        return next(told, "")

    def tables(self, graph: LayerGraph, cells: Cells) -> dict[str, CostTable]:
        """Return memory and BOPs of every cell, and what else is budgeted.

        Measured times only where one is budgeted, those of another machine always; then of every
        profile, and "latency". Kernels already timed on this device are read from the database;
        each new time is in it as soon as it is known.
        """
        found = self._counted(graph, cells)
        if not self.times_matter:
            return found
        return found | self._with_mean(self._times(self._graphs(graph), cells))

    def tables_at_hand(self, graph: LayerGraph, cells: Cells) -> tuple[dict[str, CostTable], int]:
        """Return what of `tables` needs no measurement, and how many kernels have no time yet."""
        if not self.times_matter or self._model is not None:
            return self.tables(graph, cells), 0
        found, graphs, times = self._counted(graph, cells), self._graphs(graph), self._measuring()
        untimed = times.untimed(graphs, cells)
        if untimed:
            return found, untimed
        return found | self._with_mean(times.known_tables(graphs, cells)), 0

    def _graphs(self, graph: LayerGraph) -> dict[str, LayerGraph]:
        """Return the network as each profile runs it, or as the sample does."""
        graphs = {name: with_ranges(one.graph, graph) for name, one in self._served.items()}
        return graphs or {LATENCY: graph}

    def _counted(self, graph: LayerGraph, cells: Cells) -> dict[str, CostTable]:
        names = [*_ALWAYS, *(name for name in _WHERE_NAMED if name in self._named)]
        if KV_CACHE in self._named or any(layer.is_cache for layer in graph.apart):
            names.append(KV_CACHE)
        tables = [get_cost_model(name).table(graph, cells) for name in names]
        tables += [
            get_cost_model(name, **self._beside(name)).table(graph, cells)
            for name in _WHILE_RUNNING
            if name in self._named
        ]
        return {table.name: table for table in tables}

    def _times(self, graphs: Mapping[str, LayerGraph], cells: Cells) -> dict[str, CostTable]:
        model = self._model
        if model is None:
            return self._measured(graphs, cells)
        return {name: replace(model.table(g, cells), name=name) for name, g in graphs.items()}

    def _with_mean(self, times: Mapping[str, CostTable]) -> dict[str, CostTable]:
        """Return the tables of all profiles and their mean; without profiles that of the sample."""
        if not self._served:
            return dict(times)
        weights = {name: one.weight for name, one in self._served.items()}
        return {**times, LATENCY: weighted_latency(times, weights)}

    def remarks(self, costs: Mapping[str, CostTable]) -> list[tuple[str, str]]:
        """Return what the log of a run says of its times, each with its kind."""
        if not self.times_matter:
            untimed = ", ".join(self._served)
            return [(LATENCY, f"no time is budgeted: not taken of {untimed}")] if untimed else []
        caches = [(LATENCY, _CACHES_UNTIMED)] if self._has_caches else []
        notes = {name: noise_note(costs[name]) for name in self._served or (LATENCY,)}
        found = caches + [
            ("noisy", f"{name}: {note}" if self._served else note)
            for name, note in notes.items()
            if note
        ]
        for one, other in itertools.combinations(self._served, 2):
            shapes = {self._served[name].graph.sample for name in (one, other)}
            if len(shapes) > 1 and np.array_equal(costs[one].values, costs[other].values):
                found.append(
                    (
                        LATENCY,
                        f"{one} and {other} take the same time, whatever their shapes, in "
                        f"{costs[one].provenance}",
                    )
                )
        return found

    def whole_network(
        self,
        tables: Mapping[str, CostTable],
        workload: Workload,
        sample: Batch,
        log: Callable[[str, str], None],
    ) -> dict[str, CostTable]:
        """Return the measured tables with the rest of the network, {} where there are none.

        Why a network has no rest is logged; the table then is of the layers that have a kernel.
        """
        if not self.times_matter or self._model is not None:
            return {}
        from mpq.deploy.target import TARGETS, get_target
        from mpq.deploy.whole import WholeNetwork, with_whole

        if self._run is not None:
            log(
                LATENCY,
                f"of the searched layers only: whole networks are timed on the machine of the "
                f"search, not on {self._hardware}",
            )
            return {}
        target = self._hardware.partition(":")[2] or BACKEND
        if target not in TARGETS:
            log(LATENCY, f"of the searched layers only: {self._hardware} times no whole network")
            return {}
        graphs = {
            n: (with_ranges(s.graph, workload.graph), s.sample) for n, s in self._served.items()
        }
        graphs = graphs or {LATENCY: (workload.graph, sample)}
        times = {name: tables[name] for name in graphs}
        assert self._kernel_times is not None
        with self._progress.stage("network latency", len(graphs)) as advance:
            for name, (graph, batch) in graphs.items():
                network = WholeNetwork(
                    target=get_target(target),
                    model=workload.model,
                    graph=graph.without_apart,
                    sample=batch,
                    calibration=workload.calibration,
                    store=self._store,
                    seconds=self._seconds / 4 / len(graphs),
                    seed=self._seed,
                )
                try:
                    parts = self._kernel_times.parts(graph, tables[name].cells)
                    times[name] = with_whole(tables[name], parts, network, seed=self._seed)
                except Exception as error:  # whatever an exporter does: layers' times are right
                    reason = " ".join(str(error).split()) or type(error).__name__
                    of = f"{name}: " if self._served else ""
                    log(
                        LATENCY,
                        f"{of}of the searched layers only, not of the whole network: {reason}",
                    )
                advance()
        return self._with_mean(times)

    def _measured(self, graphs: Mapping[str, LayerGraph], cells: Cells) -> dict[str, CostTable]:
        steps = 100
        done = 0
        with self._progress.stage("kernel latency", steps) as advance:

            def listen(share: float) -> None:
                nonlocal done
                while done < round(share * steps):
                    done += 1
                    advance()

            self._kernel_times = self._measuring(listen)
            tables = self._kernel_times.tables(graphs, cells)
            listen(1.0)
        return tables

    def _measuring(self, listen: Callable[[float], None] | None = None) -> MeasuredLatency:
        return MeasuredLatency(
            hardware=self._whose,
            run=self._run,
            num_threads=_NUM_THREADS,
            budget_s=self._seconds,
            known=self._store.kernel_latencies(self.device),
            save=self._store.put_kernel_latency,
            seed=self._seed,
            progress=listen,
        )


def _on_node(device: str, whose: str, run_exclusively: RunExclusively | None) -> Run:
    """Return what runs a function on a node that has the resource of a device."""
    if run_exclusively is None:
        raise InvalidInputError(
            "hardware", f"hardware 'device:{device}' is a node of a Ray cluster: none is connected"
        )
    needs = {f"device:{device}": _SHARE} | ({"gpu": 1.0} if whose.endswith(":cuda") else {})
    return partial(run_exclusively, resources=needs)


def _without_kernel(layer: Layer) -> tuple[Scheme, ...]:
    """Return what is tried of a layer that no kernel here runs."""
    lines = _OF_EXPERTS if layer.kind == "experts" else _WITHOUT_KERNEL
    fitting = [[s for s in map(parse_scheme, line) if _fits(layer, s.weights)] for line in lines]
    return tuple(schemes[0] for schemes in fitting if schemes)


def _fits(layer: Layer, weights: Format) -> bool:
    """Tell whether a format is no wider than the weight, and its groups divide a row."""
    size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else 1
    narrow = weights.bits * layer.num_weights <= 8 * layer.weight_bytes
    return narrow and layer.weight_shape[-1] % size == 0
