"""Bit operations: the hardware-neutral count of HAWQ-V3."""

from __future__ import annotations

from hw_cost_models.work import branch_macs
from mpq.core.formats import NATIVE_BITS
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

_NATIVE = NATIVE_BITS["fp32"] ** 2
_HALF = NATIVE_BITS["fp16"] ** 2


def _macs(layer: Layer) -> int:
    return 0 if layer.kind == "embedding" else layer.macs  # a look-up multiplies nothing


class BitOperations:
    """BOPs of a layer = MACs * weight bits * activation bits.

    Yao et al., HAWQ-V3, ICML 2021, section 3.4. Activations that are left alone count 32 bits,
    embeddings 0 MACs. Tied layers store one weight but multiply in each of their places. Shares in
    a wider format count their own bits, a low-rank branch its own MACs at 16 * 16 bits.
    """

    name = "bops"

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the BOPs of every cell.

        `fixed` counts the layers outside the search at 32 * 32 bits and `baseline` the whole
        network so.
        """
        named = graph.by_name
        macs = {unit.name: sum(_macs(named[n]) for n in unit.layers) for unit in graph.units}
        branches = {unit.name: [named[n] for n in unit.layers] for unit in graph.units}
        values = [
            float(macs[unit] * scheme.weights.mean_bits * scheme.activations.bits)
            + _HALF * sum(branch_macs(layer, scheme) for layer in branches[unit])
            for unit, scheme in cells
        ]
        total = sum(_macs(layer) for layer in graph.layers)
        return CostTable.exact(
            self.name,
            "bitops",
            cells,
            values,
            fixed=float(_NATIVE * (total - sum(macs.values()))),
            baseline=float(_NATIVE * total),
            weights=graph.searched_weights,
        )
