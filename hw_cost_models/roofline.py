"""Modelled seconds of a layer on a machine that is not here: the roofline."""

from __future__ import annotations

from collections.abc import Mapping

from hw_cost_models.machines import MACHINES, Machine, get_machine
from hw_cost_models.memory import storable
from hw_cost_models.per_layer import per_layer_table
from hw_cost_models.work import branch_macs, bytes_moved, float_family, work_of
from mpq.core.errors import unknown
from mpq.core.formats import Scheme, native_scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

_ARITHMETIC_BITS = (4, 8)
# Of each line the first that can store the weight.
_OFFERED = (
    ("int8:int8",),
    ("int8",),
    ("int4g128", "int4g64", "int4g32", "int4"),
    ("int3g128", "int3g64", "int3g32", "int3"),
    ("int2g32a", "int2g16a"),
)


def computes_in(peaks: Mapping[str, float], layer: Layer, scheme: Scheme) -> str:
    """Return the format whose peak bounds a layer.

    Native weights: their own type, fp32 where the machine lacks it. Weights alone quantized: they
    are expanded and multiplied in 16-bit floating point. Both quantized: the narrowest arithmetic
    of their family that holds both, 16-bit floating point where there is none (integers times
    minifloats, codebooks).
    """
    weights, activations = scheme.weights, scheme.activations
    family = float_family(layer, scheme)
    if weights.is_native:
        return family if family in peaks else "fp32"
    half = family if family in peaks else "fp16"
    if activations.is_native:
        return half
    if not weights.arithmetic or weights.arithmetic != activations.arithmetic:
        return half
    kind = "int" if weights.arithmetic == "int" else "fp"
    widest = max(weights.bits, activations.bits, weights.high.bits if weights.high else 0)
    own = (f"{kind}{bits}" for bits in _ARITHMETIC_BITS if bits >= widest)
    return next((name for name in own if name in peaks), half)


class Roofline:
    """Seconds = max(operations / peak, bytes / bandwidth) + launch overhead of each call.

    Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009. Peaks and bandwidth are those of
    data sheets, so a real kernel is slower, and more so the less common its format; unpacking and
    scales take no time here, and weights are read from memory in every call. With `tf32` fp32
    layers run at the tf32 rate.
    """

    name = "latency"

    def __init__(self, *, machine: Machine | str, tf32: bool = False) -> None:
        self.machine = get_machine(machine) if isinstance(machine, str) else machine
        peaks = dict(self.machine.peaks)
        if tf32:
            if "tf32" not in peaks:
                raise unknown("format", "tf32", peaks)
            peaks["fp32"] = peaks["tf32"]
        self._peaks = peaks

    @classmethod
    def parse(cls, argument: str) -> Roofline:
        """Return the model of a preset."""
        return cls(machine=argument)

    @property
    def provenance(self) -> str:
        """What every table of this model is marked with."""
        return f"roofline {self.machine.name}"

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer: as it is, and narrower integers."""
        found = [native_scheme(layer.native_family)]
        for line in _OFFERED:
            some = (s for s in map(parse_scheme, line) if not self.why_not(layer, s))
            found += [s for s in some if storable(layer, s.weights)][:1]
        return tuple(found)

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why no kernel is modelled, "" where one is."""
        if scheme.activations.is_native:
            return ""
        if layer.why_weights_only:
            return f"{scheme}: a layer of kind {layer.kind!r} {layer.why_weights_only}"
        if scheme.weights.is_native:
            return f"{scheme}: no kernel takes floating-point weights and quantized activations"
        return ""

    def seconds(self, layer: Layer, scheme: Scheme) -> float:
        """Return the modelled seconds of all calls of a layer on the sample; 0 if never called."""
        work = work_of(layer)
        if not work.calls:
            return 0.0
        peak = self._peaks[computes_in(self._peaks, layer, scheme)]
        moving = bytes_moved(layer, scheme) / self.machine.bandwidth
        computing = 2 * work.macs / peak
        if scheme.weights.rank:
            half = self._peaks.get("fp16", self._peaks["fp32"])
            computing += 2 * branch_macs(layer, scheme) / half
        return max(computing, moving) + work.calls * self.machine.launch_s

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the modelled seconds of every cell.

        Norms, softmax, attention products and everything else between layers count nothing.
        """
        return per_layer_table(self.name, "s", graph, cells, self.seconds, self.provenance)


def presets() -> list[str]:
    """Return the texts that name a preset as hardware."""
    return [f"roofline:{name}" for name in MACHINES]
