"""A cost table whose cells are sums over the layers of a unit."""

from __future__ import annotations

import math
from collections.abc import Callable

from mpq.core.formats import Scheme, native_scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable


def per_layer_table(
    name: str,
    unit: str,
    graph: LayerGraph,
    cells: Cells,
    cost: Callable[[Layer, Scheme], float],
    provenance: str,
) -> CostTable:
    """Return the sums of `cost(layer, scheme)`, of all calls of a layer on the sample.

    `fixed` is that of the layers outside the search as they are, `baseline` of all layers so; both
    without what lies between layers. `cost` may return NaN for a layer as it is where it does not
    know: then there is no baseline, and outside the search the layer counts nothing.
    """
    units = graph.kernels
    searched = {layer.name for layers in units.values() for layer in layers}
    as_it_is = {
        layer.name: cost(layer, native_scheme(layer.native_family)) for layer in graph.layers
    }
    outside = (value for name, value in as_it_is.items() if name not in searched)
    return CostTable.exact(
        name,
        unit,
        cells,
        [math.fsum(cost(layer, scheme) for layer in units[of]) for of, scheme in cells],
        fixed=math.fsum(value for value in outside if not math.isnan(value)),
        baseline=math.fsum(as_it_is.values()),
        weights=graph.searched_weights,
        provenance=provenance,
    )
