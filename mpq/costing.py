"""What choices cost, and which of them the hardware can run when its time is budgeted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hw_cost_models import COST_MODELS, get_cost_model, get_hardware, get_kernels, is_local
from hw_cost_models.latency import MeasuredLatency
from hw_cost_models.measured.capability import BACKEND
from mpq.choices import parse_schemes
from mpq.core.errors import InvalidInputError, unknown
from mpq.core.formats import Format, PerGroup, Scheme, native_scheme, parse_scheme
from mpq.core.jobs import JobSpec
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import BudgetText
from mpq.core.protocols import LatencyModel
from mpq.core.tables import Cells, CostTable
from mpq.nn.batches import Batch
from mpq.nn.workload import Workload
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
_NUM_THREADS = 1  # of a kernel; a layer's time is comparable between machines only so


_ALWAYS = ("memory", "bops")
_WHERE_NAMED = ("macs", "energy", "luts")
_WHILE_RUNNING = ("resident", "peak")


class Hardware:
    """The schemes that a machine's kernels run and the time they take: measured, or modelled.

    Where latency is budgeted or minimised, and always on a machine that is not this one, a scheme
    without a real kernel (or a time) is not offered to a layer, and `left_out` says why; without
    one every scheme that can be stored is offered. `beside(cost)` returns the options of the
    models of what is in memory while the network runs. Raises InvalidInputError for hardware or a
    cost to minimise that is unknown.
    """

    def __init__(
        self,
        spec: JobSpec,
        budgets: Sequence[BudgetText],
        store: Store,
        progress: Progress,
        beside: Callable[[str], Mapping[str, int]] = lambda _: {},
    ) -> None:
        self._hardware = spec.hardware
        self._model: LatencyModel | None = None
        self._measured: MeasuredLatency | None = None
        if is_local(spec.hardware):
            self._kernels = get_kernels(spec.hardware, num_threads=_NUM_THREADS)
            self.device = self._kernels.device
        else:
            self._model = get_hardware(spec.hardware)
            self.device = self._model.provenance
        for cost in spec.minimised:
            if cost not in COST_MODELS:
                raise unknown("cost", cost, COST_MODELS)
        self._named = {*spec.minimised, *(budget.cost for budget in budgets)}
        self.times_matter = self._model is not None or "latency" in self._named
        self.left_out: list[str] = []
        self._asked = None if spec.schemes is None else parse_schemes(spec.schemes)
        self._seed = spec.seed
        self._seconds = spec.latency_seconds
        self._beside = beside
        self._store = store
        self._progress = progress

    def schemes(self, layer: Layer) -> Sequence[Scheme]:
        """Return what a layer may take; experts stay as they are where nothing else is left."""
        asked = self._asked or self._offered(layer) or _without_kernel(layer)
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
        return "this machine" if self._model is None else "it"

    def _offered(self, layer: Layer) -> Sequence[Scheme]:
        return (self._model or self._kernels).schemes(layer)

    def _why_not(self, layer: Layer, scheme: Scheme) -> str:
        if layer.why_weights_only and not scheme.activations.is_native:
            return (
                f"{scheme}: a layer of kind {layer.kind!r} {layer.why_weights_only}, there are no "
                f"activations to quantize"
            )
        if self._model is not None:
            return self._model.why_not(layer, scheme)
        if layer.kind == "experts" and scheme == native_scheme(layer.native_family):
            return ""  # its time is outside of all that is measured
        return self._kernels.why_not(layer, scheme) if self.times_matter else ""

    def tables(self, graph: LayerGraph, cells: Cells) -> dict[str, CostTable]:
        """Return memory and BOPs of every cell, and what else is budgeted.

        Measured latency only where it is budgeted, that of another machine always. Kernels
        already timed on this device are read from the database; each new time is in it as soon as
        it is known.
        """
        names = [*_ALWAYS, *(name for name in _WHERE_NAMED if name in self._named)]
        tables = [get_cost_model(name).table(graph, cells) for name in names]
        tables += [
            get_cost_model(name, **self._beside(name)).table(graph, cells)
            for name in _WHILE_RUNNING
            if name in self._named
        ]
        if self._model is not None:
            tables.append(self._model.table(graph, cells))
        elif self.times_matter:
            tables.append(self._latency(graph, cells))
        return {table.name: table for table in tables}

    def whole_network(
        self,
        tables: Mapping[str, CostTable],
        workload: Workload,
        sample: Batch,
        log: Callable[[str, str], None],
    ) -> dict[str, CostTable]:
        """Return the measured latency table with the rest of the network, {} where it has none.

        Why a network has none is logged; the table then is of the layers that have a kernel.
        """
        table = tables.get("latency")
        if table is None or table.provenance != f"measured on {self.device}":
            return {}
        from mpq.deploy.target import TARGETS, get_target
        from mpq.deploy.whole import WholeNetwork, with_whole

        target = self._hardware.partition(":")[2] or BACKEND
        if target not in TARGETS:
            log("latency", f"of the searched layers only: {self._hardware} times no whole network")
            return {}
        assert self._measured is not None
        network = WholeNetwork(
            target=get_target(target),
            model=workload.model,
            graph=workload.graph,
            sample=sample,
            calibration=workload.calibration,
            store=self._store,
            seconds=self._seconds / 4,
            seed=self._seed,
        )
        try:
            with self._progress.stage("network latency", 1) as advance:
                parts = self._measured.parts(workload.graph, table.cells)
                found = with_whole(table, parts, network, seed=self._seed)
                advance()
        except Exception as error:  # whatever an exporter does: the layers' times are still right
            reason = " ".join(str(error).split()) or type(error).__name__
            log("latency", f"of the searched layers only, not of the whole network: {reason}")
            return {}
        return {"latency": found}

    def _latency(self, graph: LayerGraph, cells: Cells) -> CostTable:
        steps = 100
        done = 0
        with self._progress.stage("kernel latency", steps) as advance:

            def listen(share: float) -> None:
                nonlocal done
                while done < round(share * steps):
                    done += 1
                    advance()

            self._measured = MeasuredLatency(
                hardware=self._hardware,
                num_threads=_NUM_THREADS,
                budget_s=self._seconds,
                known=self._store.kernel_latencies(self.device),
                save=self._store.put_kernel_latency,
                seed=self._seed,
                progress=listen,
            )
            table = self._measured.table(graph, cells)
            listen(1.0)
        return table


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
