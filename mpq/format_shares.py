"""Which formats an allocation took, how much of the network is in each, and in which layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.problem import Allocation
from mpq.families import family_name


@dataclass(frozen=True, slots=True)
class FormatShare:
    """A scheme with the units that took it; `share` is that of the searched weights.

    `bits` is the mean of what a weight takes with all that its format needs; `roles` are the last
    parts of the names of layers ("query", "fc1"), each with how many.
    """

    scheme: Scheme
    family: str
    units: int
    share: float
    bits: float
    roles: tuple[tuple[str, int], ...]

    def told(self) -> str:
        """Return one line."""
        where = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in self.roles)
        return (
            f"{self.scheme}: {self.units} unit{'s' if self.units > 1 else ''}, "
            f"{self.share:.1%} of the weights, {self.bits:.3g} bits each: {where}"
        )


def format_shares(graph: LayerGraph, allocation: Allocation) -> list[FormatShare]:
    """Return the schemes that an allocation took, that of the most weights first."""
    units = defaultdict(list)
    for unit in graph.units:
        units[allocation[unit.name]].append(unit)
    named, total = graph.by_name, max(graph.searched_weights, 1)
    found = []
    for scheme, members in units.items():
        stored = [layer for unit in members for layer in graph.stored_layers(unit)]
        stored = [layer for layer in stored if not layer.source]
        weights = sum(layer.num_weights for layer in stored)
        bits = sum(_bits(layer, scheme) for layer in stored) / weights if weights else 0.0
        layers = [named[name] for unit in members for name in unit.layers]
        found.append(
            FormatShare(
                scheme=scheme,
                family=family_name(scheme.weights),
                units=len(members),
                share=weights / total,
                bits=bits,
                roles=_roles(layers),
            )
        )
    return sorted(found, key=lambda one: -one.share)


def _bits(layer: Layer, scheme: Scheme) -> int:
    return scheme.weights.storage_bits(layer.weight_shape, layer.channel_axis)


def _roles(layers: Sequence[Layer]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = defaultdict(int)
    for layer in layers:
        counts[_role(layer.name)] += 1
    return tuple(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _role(name: str) -> str:
    """Return the last two parts of a name that say what a layer is: numbers are places."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    return ".".join(parts[-2:]) or name
