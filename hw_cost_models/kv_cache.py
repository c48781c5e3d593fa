"""Bytes of the keys and values that a language model keeps while it generates."""

from __future__ import annotations

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable


def cached_bytes(layer: Layer, fmt: Format) -> int:
    """Return the exact bytes of a cache in a format: whole bytes for each token and head.

    A vector of head_dim elements is stored with its own scales and zero points. Raises
    InvalidInputError naming the cache for groups that do not divide a vector (`group_size`),
    anything of the whole cache (`format`: it is not known before the cache is full) and a native
    format of more than 16 bits.
    """
    vectors, head_dim = layer.weight_shape
    if fmt.is_native and fmt.bits > 16:
        raise InvalidInputError(
            "format", f"cache {layer.name!r} holds 16-bit numbers: leave {fmt.family} out"
        )
    try:
        bits, of_two = (0 if fmt.made_ahead else fmt.storage_bits((n, head_dim)) for n in (1, 2))
    except InvalidInputError as error:
        raise InvalidInputError(
            error.code,
            f"cache {layer.name!r} holds vectors of {head_dim}: {fmt.text('weights')} has groups "
            f"that do not divide them",
        ) from None
    if fmt.made_ahead or of_two != 2 * bits:
        raise InvalidInputError(
            "format",
            f"cache {layer.name!r} is filled token by token, {fmt.text('weights')} has to see all "
            f"of them: use a scale for each vector such as int4, or for groups of it",
        )
    return vectors * -(-bits // 8)


class KvCache:
    """Bytes of the KV cache at the context and batch that the job names; 0 of all other units."""

    name = "kv_cache"

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell, linear in batch and (without a window) in context.

        `fixed` are caches outside the search, `baseline` all of them in 16 bits, the network's own
        type where it has 16. Raises InvalidInputError where the network has no caches.
        """
        caches = [layer for layer in graph.apart if layer.is_cache]
        if not caches:
            raise InvalidInputError(
                "cost",
                "a budget on kv_cache needs the caches: search them with kv_cache=True, or "
                "kv_cache={'context': 4096, 'batch': 8}",
            )
        named = graph.by_name
        of_unit = {u.name: [named[n] for n in u.layers if named[n].is_cache] for u in graph.units}
        searched = {layer.name for layers in of_unit.values() for layer in layers}
        return CostTable.exact(
            self.name,
            "bytes",
            cells,
            [
                float(sum(cached_bytes(layer, scheme.weights) for layer in of_unit[unit]))
                for unit, scheme in cells
            ],
            fixed=float(sum(la.weight_bytes for la in caches if la.name not in searched)),
            baseline=float(sum(la.weight_bytes for la in caches)),
        )
