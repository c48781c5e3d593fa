"""Modelled seconds of kernels that multiply bit planes."""

from __future__ import annotations

import math

from hw_cost_models.per_layer import per_layer_table
from hw_cost_models.work import work_of
from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme, parse_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

_OFFERED = ("int8:int8", "int6:int6", "int4:int8", "int4:int4", "int3:int8", "int2:int8")
_PLANES = ("int", "uint", "bipolar")
_EXAMPLE = "bitplanes:a=5e-6,c=1e-16"


class BitPlanes:
    """Seconds of a call = a + c * p * q * M * N * K, with p weight and q activation bits.

    A product of p-bit and q-bit integers is p * q products of bit planes (XW = sum over s, t of
    2^(s+t) X_s W_t), each a binary matrix product of M * N * K one-bit multiply-accumulates: Zeng
    et al., ABQ-LLM, AAAI 2025; with digits -1 and 1 Ma et al., bipolar-INT, 2024. `a`, seconds of
    a launch, and `c`, seconds of a binary multiply-accumulate, are to be fitted to measurements
    of the kernels in question. Layers as they are run in other kernels, whose time is unknown:
    there is no baseline for percentages, and layers outside the search count nothing.
    """

    name = "latency"

    def __init__(self, *, a: float, c: float) -> None:
        for what, value, least in (("a", a, 0.0), ("c", c, math.ulp(0.0))):
            if not least <= value < math.inf:
                raise InvalidInputError(
                    "hardware",
                    f"bitplanes: {what} is a number of seconds (a >= 0, c > 0), got {value!r}",
                )
        self.a, self.c = a, c

    @classmethod
    def parse(cls, argument: str) -> BitPlanes:
        """Read "a=5e-6,c=1e-16", seconds."""
        given = dict(part.partition("=")[::2] for part in argument.split(",") if part)
        try:
            numbers = {name.strip(): float(text) for name, text in given.items()}
        except ValueError:
            numbers = {}
        if numbers.keys() != {"a", "c"}:
            raise InvalidInputError(
                "hardware", f"bit planes are written {_EXAMPLE!r}, got 'bitplanes:{argument}'"
            )
        return cls(**numbers)

    @property
    def provenance(self) -> str:
        """What every table of this model is marked with."""
        return f"bit planes a={self.a:g} s, c={self.c:g} s"

    def schemes(self, layer: Layer) -> tuple[Scheme, ...]:
        """Return what is worth trying for a layer."""
        return tuple(s for s in map(parse_scheme, _OFFERED) if not self.why_not(layer, s))

    def why_not(self, layer: Layer, scheme: Scheme) -> str:
        """Return why no bit-plane kernel runs a layer in a scheme, "" where one does."""
        if layer.why_weights_only:
            return f"{scheme}: a layer of kind {layer.kind!r} {layer.why_weights_only}"
        formats = (scheme.weights, scheme.activations)
        plain = all(fmt.family in _PLANES and not fmt.rank and fmt.high is None for fmt in formats)
        return "" if plain else f"{scheme}: bit planes need integers on both sides"

    def seconds(self, layer: Layer, scheme: Scheme) -> float:
        """Return the modelled seconds of all calls of a layer on the sample; 0 if never called."""
        work = work_of(layer)
        planes = scheme.weights.bits * scheme.activations.bits
        return self.a * work.calls + self.c * planes * work.macs

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the modelled seconds of every cell.

        Raises InvalidInputError (`no_kernel`) for a cell that bit planes cannot run.
        """

        def cost(layer: Layer, scheme: Scheme) -> float:
            if scheme.is_native:
                return math.nan
            return self.seconds(layer, scheme)

        units = graph.kernels
        for unit, scheme in cells:
            for layer in units[unit]:
                if reason := self.why_not(layer, scheme):
                    raise InvalidInputError("no_kernel", f"layer {layer.name!r}: {reason}")
        return per_layer_table(self.name, "s", graph, cells, cost, self.provenance)
