"""Modelled joules of a choice: arithmetic and memory traffic, 45 nm."""

from __future__ import annotations

from hw_cost_models.per_layer import per_layer_table
from hw_cost_models.work import branch_macs, bytes_moved, float_family, work_of
from mpq.core.formats import Scheme
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

# Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9: picojoules in 45 nm at 0.9 V.
_FLOAT_MAC_PJ = {"fp32": 3.7 + 0.9, "fp16": 1.1 + 0.4, "bf16": 1.1 + 0.4}  # bf16 as fp16
_INT8_MULTIPLY_PJ = 0.2
_INT32_ADD_PJ = 0.1
_DRAM_PJ_PER_BYTE = 1300 / 8  # 1.3 to 2.6 nJ for 64 bits: the lower end


def mac_joules(layer: Layer, scheme: Scheme) -> float:
    """Return the joules of one multiply-accumulate.

    Integers: a multiplier grows with the product of the bits (8 bits: 0.2 pJ; 32 bits are 3.2 pJ
    so, 3.1 in the source), sums are 32 bits wide. Weights alone quantized are multiplied in 16-bit
    floating point, and so are minifloats, which the source does not have.
    """
    weights, activations = scheme.weights, scheme.activations
    if weights.arithmetic == activations.arithmetic == "int":
        bits = weights.mean_bits * activations.bits
        return 1e-12 * (_INT8_MULTIPLY_PJ * bits / 64 + _INT32_ADD_PJ)
    return 1e-12 * _FLOAT_MAC_PJ[float_family(layer, scheme)]


class Energy:
    """Joules = MACs * energy of one + bytes moved * energy of a byte from DRAM.

    Numbers of one process and one way to build a machine (Horowitz 2014): good for comparing
    formats, not for a battery. Everything is moved from DRAM once in each call.
    """

    name = "energy"

    def joules(self, layer: Layer, scheme: Scheme) -> float:
        """Return the joules of all calls of a layer on the sample; 0 if never called."""
        work = work_of(layer)
        if not work.calls:
            return 0.0
        moving = 1e-12 * _DRAM_PJ_PER_BYTE * bytes_moved(layer, scheme)
        branch = branch_macs(layer, scheme) * 1e-12 * _FLOAT_MAC_PJ["fp16"]
        return work.macs * mac_joules(layer, scheme) + branch + moving

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the joules of every cell."""
        return per_layer_table(
            self.name, "J", graph, cells, self.joules, "model of Horowitz 2014, 45 nm"
        )
