"""What a layer asks of any machine in one pass: multiplications, and numbers moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hw_cost_models.memory import stored_bytes
from mpq.core.formats import NATIVE_BITS, Scheme
from mpq.core.granularity import matrix_of
from mpq.core.layers import Layer


@dataclass(frozen=True, slots=True)
class Work:
    """The work of all calls of a layer; `reads` is how often its whole weight is read."""

    macs: int
    calls: int
    inputs: int
    outputs: int
    reads: float


def work_of(layer: Layer) -> Work:
    """Return the work of a layer on the sample.

    Inputs, outputs and weights are moved once in each call (of an embedding the rows that are
    looked up), which is the least that any kernel moves. Of experts as many are read as there are
    tokens for them, at most all, and each token goes in and out.
    """
    if layer.kind == "experts":
        *experts, rows, columns = layer.weight_shape
        tokens = layer.macs // (rows * columns)
        reads = min(1.0, tokens / math.prod(experts))
        return Work(layer.macs, layer.calls, tokens * columns, tokens * rows, reads)
    inputs, outputs = (
        math.prod(shape) * layer.calls if shape else 0
        for shape in (layer.input_shape, layer.output_shape)
    )
    if layer.kind == "embedding":
        return Work(0, layer.calls, 0, outputs, outputs / max(layer.num_weights, 1))
    return Work(layer.macs, layer.calls, inputs, outputs, float(layer.calls))


def float_family(layer: Layer, scheme: Scheme) -> str:
    """Return the floating-point type that enters and leaves a layer's kernel.

    That of native weights; kernels of quantized weights work in 16 bits.
    """
    if scheme.weights.is_native:
        return scheme.weights.family
    return layer.native_family if NATIVE_BITS[layer.native_family] == 16 else "fp16"


def branch_macs(layer: Layer, scheme: Scheme) -> float:
    """Return the multiply-accumulates of a low-rank branch beside a layer, in 16 bits."""
    if not scheme.weights.rank:
        return 0.0
    channels, columns = matrix_of(layer.weight_shape, layer.channel_axis)
    share = scheme.weights.rank * (channels + columns) / (channels * columns)
    return work_of(layer).macs * share


def bytes_moved(layer: Layer, scheme: Scheme) -> float:
    """Return the bytes of weights (with scales), inputs and outputs of all calls.

    Quantized inputs are read at their own bits, outputs are written in the floating-point type.
    """
    work = work_of(layer)
    float_bits = NATIVE_BITS[float_family(layer, scheme)]
    input_bits = float_bits if scheme.activations.is_native else scheme.activations.bits
    activations = (work.inputs * input_bits + work.outputs * float_bits) / 8
    return work.reads * stored_bytes(layer, scheme.weights) + activations
