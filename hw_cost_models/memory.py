"""Bytes that the weights of a unit take in a file."""

from __future__ import annotations

from mpq.core.errors import InvalidInputError
from mpq.core.formats import Format
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable


def stored_bytes(layer: Layer, weights: Format) -> int:
    """Return the exact bytes of one stored weight in a format.

    A quantized weight is several arrays, each padded to whole bytes: the packed codes
    (ceil(elements * bits / 8)), the scales, and what else its format needs (`Format.parts`): zero
    points, masks, codebooks, branches. A native weight is elements * bits / 8.
    Raises InvalidInputError naming the layer where groups do not divide it (`group_size`) or
    where a native format is wider than the weight already is (`format`).
    """
    if weights.is_native:
        own_bits = 8 * layer.weight_bytes / max(layer.num_weights, 1)
        if weights.bits > own_bits:
            raise InvalidInputError(
                "format",
                f"layer {layer.name!r} holds {own_bits:g}-bit weights: {weights.family} would "
                "make it larger and no better; leave that format out",
            )
        return layer.num_weights * weights.bits // 8
    try:
        return weights.storage_bytes(layer.weight_shape, layer.channel_axis)
    except InvalidInputError as error:
        raise InvalidInputError(error.code, f"layer {layer.name!r}: {error}") from error


def storable(layer: Layer, weights: Format) -> bool:
    """Tell whether a format is no wider than the weight, and its groups divide a channel."""
    try:
        return stored_bytes(layer, weights) <= layer.weight_bytes or weights.is_native
    except InvalidInputError:
        return False


class Memory:
    """Bytes of the weights with their scales and zero points; tied weights count once."""

    name = "memory"

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the bytes of every cell.

        `fixed` is every tensor outside the search, `baseline` the network as it is, `weights`
        the searched weights. Raises what `stored_bytes` raises.
        """
        stored = {unit.name: graph.stored_layers(unit) for unit in graph.units}
        values = [
            sum(stored_bytes(layer, scheme.weights) for layer in stored[unit])
            for unit, scheme in cells
        ]
        return CostTable.exact(
            self.name,
            "bytes",
            cells,
            values,
            fixed=graph.fixed_bytes,
            baseline=graph.native_bytes,
            weights=graph.searched_weights,
        )
