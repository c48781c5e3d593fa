"""Bytes while the network runs: the weights, and what is held beside them."""

from __future__ import annotations

from dataclasses import replace

from hw_cost_models.kv_cache import KvCache
from hw_cost_models.memory import Memory
from mpq.core.layers import LayerGraph
from mpq.core.tables import Cells, CostTable


class Resident:
    """Bytes of the weights and of the KV cache."""

    name = "resident"

    def __init__(self, *, cache_bytes: int = 0) -> None:
        self._cache_bytes = cache_bytes

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell.

        The cache is `cache_bytes` and `fixed`, or that of `kv_cache` where caches are searched.
        """
        weights = Memory().table(graph, cells)
        if any(layer.is_cache for layer in graph.apart):
            cache = KvCache().table(graph, cells)
            values, fixed, baseline = cache.values, cache.fixed, cache.baseline
        else:
            values, fixed, baseline = 0.0 * weights.values, self._cache_bytes, self._cache_bytes
        return CostTable.exact(
            self.name,
            "bytes",
            cells,
            weights.values + values,
            fixed=weights.fixed + fixed,
            baseline=weights.baseline + baseline,
            weights=weights.weights,
        )


class Peak:
    """Bytes of the weights, of the KV cache and of the most activations alive together.

    The activations are those of torch, operation by operation: a conservative estimate, and so
    is the sum.
    """

    name = "peak"

    def __init__(self, *, cache_bytes: int = 0, activation_bytes: int = 0) -> None:
        self._resident = Resident(cache_bytes=cache_bytes)
        self._activation_bytes = activation_bytes

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell; activations are `fixed`."""
        table = self._resident.table(graph, cells)
        return replace(
            table,
            name=self.name,
            fixed=table.fixed + self._activation_bytes,
            baseline=table.baseline + self._activation_bytes,
            provenance="conservative: activations as in torch",
        )
