"""Bytes while the network runs: the weights, and what no choice of formats changes."""

from __future__ import annotations

from dataclasses import replace

from hw_cost_models.memory import Memory
from mpq.core.layers import LayerGraph
from mpq.core.tables import Cells, CostTable


class Resident:
    """Bytes of the weights and of the KV cache."""

    name = "resident"

    def __init__(self, *, cache_bytes: int = 0) -> None:
        self._beside = cache_bytes

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell; the cache is `fixed`."""
        weights = Memory().table(graph, cells)
        return replace(
            weights,
            name=self.name,
            fixed=weights.fixed + self._beside,
            baseline=weights.baseline + self._beside,
        )


class Peak:
    """Bytes of the weights, of the KV cache and of the most activations alive together.

    The activations are those of torch, operation by operation: a conservative estimate, and so
    is the sum.
    """

    name = "peak"

    def __init__(self, *, cache_bytes: int = 0, activation_bytes: int = 0) -> None:
        self._beside = cache_bytes + activation_bytes

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell; cache and activations are `fixed`."""
        table = Resident(cache_bytes=self._beside).table(graph, cells)
        return replace(table, name=self.name, provenance="conservative: activations as in torch")
