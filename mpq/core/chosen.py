"""An allocation on its way out of `mpq`, with the network it is for and where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph, LayerName, UnitName
from mpq.core.problem import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The scheme of every searched layer of a network, and what is known of the choice.

    `totals` are in the units of `cost_units` ("memory": "bytes"); `provenance` is plain data about
    the run. A KV cache is there where it is quantized. Raises InvalidInputError where `schemes` is
    not over the searched layers.
    """

    graph: LayerGraph
    schemes: Mapping[LayerName, Scheme]
    pinned: frozenset[UnitName] = frozenset()
    budgets: tuple[Budget, ...] = ()
    totals: Mapping[str, float] = field(default_factory=dict)
    cost_units: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str | float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        searched = {name for unit in self.graph.units for name in unit.layers}
        if other := sorted(searched ^ set(self.schemes)):
            raise InvalidInputError(
                "allocation",
                f"an allocation names every searched layer and no other: {other[0]!r} is "
                f"{'missing' if other[0] in searched else 'not searched'}",
            )

    @property
    def searched(self) -> tuple[tuple[Layer, Scheme], ...]:
        """Every searched layer with its scheme in execution order, then caches."""
        return tuple(
            (layer, self.schemes[layer.name])
            for layer in (*self.graph.layers, *self.graph.apart)
            if layer.name in self.schemes
        )

    @property
    def left_alone(self) -> tuple[Layer, ...]:
        """Every layer that nothing is done to: not searched, or searched and native."""
        return tuple(
            layer
            for layer in self.graph.layers
            if layer.name not in self.schemes or self.schemes[layer.name].is_native
        )
