"""Modelled look-up tables of an FPGA design that runs the network as a stream."""

from __future__ import annotations

import math

from hw_cost_models.per_layer import per_layer_table
from hw_cost_models.work import branch_macs, float_family, work_of
from mpq.core.formats import Format, Scheme, channel_axes
from mpq.core.layers import Layer, LayerGraph
from mpq.core.tables import Cells, CostTable

Element = tuple[int, int]  # exponent and mantissa bits, without the sign; integers have no exponent
_NATIVE: dict[str, Element] = {"fp32": (8, 23), "fp16": (5, 10), "bf16": (8, 7)}


def luts_per_mac(weight: Element, activation: Element, depth: int) -> int:
    """Return the LUTs of one multiply-accumulate whose sum has `depth` terms.

    multiplier    (M_w + 1) (M_a + 1), of integers the product of their bits
    exponents     max(E_w, E_a) + 1, an adder
    shifter       width * ceil((max(E_w, E_a) + 1) / 2): a LUT holds two stages of one bit
    accumulator   width, a fixed-point register that no sum rounds (Kulisch):
                  2^E_w + 2^E_a + M_w + M_a + ceil(log2 depth)
    Without exponents nothing is shifted, and the width is b_w + b_a + ceil(log2 depth). An
    estimate without synthesis, to compare formats as Aggarwal et al. do (Post-Training
    Quantization with Low-precision Minifloats and Integers on FPGAs, 2023).
    """
    (exponent_w, mantissa_w), (exponent_a, mantissa_a) = weight, activation
    width = (1 << exponent_w) + (1 << exponent_a) + mantissa_w + mantissa_a
    width += math.ceil(math.log2(max(depth, 1)))
    luts = (mantissa_w + 1) * (mantissa_a + 1) + width
    exponent = max(exponent_w, exponent_a)
    if exponent:
        luts += exponent + 1 + width * math.ceil((exponent + 1) / 2)
    return luts


def dsps_per_mac(weight: Element, activation: Element) -> float:
    """Return the DSP48E2 slices of one multiplication, where they are used in place of LUTs.

    Integers share a slice: four of up to 4 bits (AMD WP521), two of up to 8 (WP486), else one for
    each 27 x 18 bits; so do the significands of floating-point numbers.
    """
    widest, narrowest = sorted((weight[1] + 1, activation[1] + 1), reverse=True)
    if widest <= 4:
        return 0.25
    if widest <= 8:
        return 0.5
    return float(math.ceil(widest / 27) * math.ceil(narrowest / 18))


def element_of(fmt: Format, family: str) -> Element:
    """Return the exponent and mantissa bits of a format; `family` is the type of native ones.

    Codes that are read before they are multiplied (codebooks) are numbers of that type, too.
    """
    match fmt.arithmetic:
        case "int":
            return 0, max(fmt.bits, fmt.high.bits if fmt.high else 0) - 1
        case "float":
            return fmt.bits - 1 - fmt.mantissa, fmt.mantissa
    return _NATIVE[family]


class Luts:
    """LUTs of a stream in which every layer takes `cycles` clock cycles for the sample.

    A layer then has ceil(MACs / cycles) multiply-accumulate units. Memories, control and what is
    between layers count nothing; look-ups (embeddings) neither.
    """

    name = "luts"

    def __init__(self, *, cycles: int = 1_000_000) -> None:
        self._cycles = cycles

    def luts(self, layer: Layer, scheme: Scheme) -> float:
        """Return the LUTs of a layer."""
        macs = work_of(layer).macs
        if not macs:
            return 0.0
        family = float_family(layer, scheme)
        # With weights alone quantized activations stay floating point.
        weight, activation = (
            element_of(fmt, family) for fmt in (scheme.weights, scheme.activations)
        )
        units = -(-macs // self._cycles)
        luts = units * luts_per_mac(weight, activation, _depth(layer))
        if scheme.weights.rank:
            half = _NATIVE["fp16"]
            branch = math.ceil(branch_macs(layer, scheme) / self._cycles)
            luts += branch * luts_per_mac(half, half, _depth(layer))
        return float(luts)

    def table(self, graph: LayerGraph, cells: Cells) -> CostTable:
        """Return the LUTs of every cell."""
        provenance = f"model of a stream of {self._cycles} cycles"
        return per_layer_table(self.name, "LUTs", graph, cells, self.luts, provenance)


def _depth(layer: Layer) -> int:
    """Return the terms of one output: the weights of an output channel."""
    channels = math.prod(layer.weight_shape[axis] for axis in channel_axes(layer.channel_axis))
    return layer.num_weights // channels
