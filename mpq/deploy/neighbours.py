"""Which layers hand their outputs to each other, so that their formats meet."""

from __future__ import annotations

from itertools import combinations, product

from mpq.core.layers import LayerName
from mpq.deploy.marked import DOMAIN, MarkedGraph, layer_of

_MOST_SUMS = 1  # between two neighbours: of a residual stream, only the layers next to a sum


def neighbours(marked: MarkedGraph) -> list[tuple[LayerName, LayerName]]:
    """Return the pairs of marked layers between which no other marked one is.

    One reads what the other returned, after whatever else the network does to it and one sum of
    two tensors at most, or the outputs of both are summed.
    """
    origins: dict[str, dict[LayerName, int]] = {}  # of a tensor: layers and sums since each
    pairs: dict[tuple[LayerName, LayerName], None] = {}
    for node in marked.model().graph.node:
        found = [origins.get(name, {}) for name in node.input]
        if node.domain == DOMAIN:
            layer = layer_of(node)
            pairs |= dict.fromkeys((origin, layer) for origin in found[0])
            origins[node.output[0]] = {layer: 0}
            continue
        summed = [origin for origin in found if origin] if node.op_type == "Add" else []
        sums = int(len(summed) > 1)
        if sums:
            for one, other in combinations(summed, 2):
                pairs |= dict.fromkeys(product(_direct(one), _direct(other)))
        merged: dict[LayerName, int] = {}
        for origin in found:
            for name, crossed in origin.items():
                if crossed + sums <= _MOST_SUMS:
                    merged[name] = min(merged.get(name, _MOST_SUMS), crossed + sums)
        origins |= dict.fromkeys(node.output, merged)
    return [(one, other) for one, other in pairs if one != other]


def _direct(origins: dict[LayerName, int]) -> list[LayerName]:
    return [layer for layer, sums in origins.items() if not sums]
