"""Multiply-accumulates: the count that no format changes."""

from __future__ import annotations

from hw_cost_models.per_layer import per_layer_table
from hw_cost_models.work import work_of
from mpq.core.layers import LayerGraph
from mpq.core.tables import Cells, CostTable


class Macs:
    """MACs of a unit on the sample, the same in every scheme; a look-up multiplies nothing."""

    name = "macs"

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the MACs of every cell; `fixed` are those of the layers outside the search."""
        return per_layer_table(
            self.name, "MACs", graph, cells, lambda layer, _: work_of(layer).macs, "exact"
        )
