"""A small ONNX model that runs one kernel several times, each time on other weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from hw_cost_models.measured.capability import linear_rows
from hw_cost_models.measured.operands import CENTRE, Float32, blockwise, centred_u8
from mpq.core.formats import PerGroup, PerTensor, Scheme
from mpq.core.layers import Layer

_OPSET, _IR_VERSION = 21, 10
_MICROSOFT = "com.microsoft"
_OUTLIER = 4.0  # standard deviations that a static 8-bit activation covers

Limits = tuple[float, float]
Arrays = dict[str, npt.NDArray[Any]]


def input_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of the model's input "x"."""
    if layer.kind == "linear":
        return linear_rows(layer), layer.weight_shape[1]
    return (linear_rows(layer),) if layer.kind == "embedding" else layer.input_shape


def output_shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of each of the model's outputs "y0", "y1", ..."""
    if layer.kind == "linear":
        return linear_rows(layer), layer.weight_shape[0]
    if layer.kind == "embedding":
        return linear_rows(layer), layer.weight_shape[1]
    return layer.output_shape


def kernel_model(
    layer: Layer,
    scheme: Scheme,
    weights: Sequence[Float32],
    *,
    input_limits: Limits = (-_OUTLIER, _OUTLIER),
    output_limits: Limits | None = None,
) -> bytes:
    """Return a serialized model that applies the kernel to "x" once for each of `weights`.

    Weights have the layer's shape. All copies share the input, as hot as a real layer finds what
    the layer before it wrote, and do not share anything else, so that no graph optimization can
    merge them. The limits are the static activation ranges of integer convolutions (output:
    four standard deviations for a standard normal input). `scheme` must have a kernel.
    """
    nodes: list[Any] = []
    arrays: Arrays = {}
    for i, weight in enumerate(weights):
        copy_nodes, copy_arrays = _copy(layer, scheme, weight, input_limits, output_limits, i)
        for node in copy_nodes:
            names = {name: f"{name}{i}" for name in (*node.input, *node.output) if name != "x"}
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names[name] for name in node.output]
        nodes += copy_nodes
        arrays |= {f"{name}{i}": array for name, array in copy_arrays.items()}
    kind = TensorProto.INT64 if layer.kind == "embedding" else TensorProto.FLOAT
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "kernel",
        [value("x", kind, input_shape(layer))],
        [value(f"y{i}", TensorProto.FLOAT, output_shape(layer)) for i in range(len(weights))],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    serialized: bytes = model.SerializeToString()
    return serialized


def _copy(
    layer: Layer,
    scheme: Scheme,
    weight: Float32,
    input_limits: Limits,
    output_limits: Limits | None,
    number: int,
) -> tuple[list[Any], Arrays]:
    # Other scales in each copy: equal QuantizeLinear nodes would be merged into one.
    factor = 1 + number * 1e-4
    if layer.kind in ("linear", "embedding"):
        return _matrix(layer, scheme, weight, input_limits, factor)
    if scheme.is_native:
        name = "ConvTranspose" if layer.kind == "conv_transpose2d" else "Conv"
        return [helper.make_node(name, ["x", "w"], ["y"], **geometry(layer))], {"w": weight}
    spread = _OUTLIER * math.sqrt(weight[0].size) * float(np.sqrt(np.square(weight).mean()))
    limits = output_limits or (-spread, spread)
    return _static_convolution(layer, scheme, weight, input_limits, limits, factor)


def _matrix(
    layer: Layer, scheme: Scheme, weight: Float32, input_limits: Limits, factor: float
) -> tuple[list[Any], Arrays]:
    """Linear layers, and embeddings: a look-up in a matrix."""
    linear = layer.kind == "linear"
    if scheme.is_native:
        if linear:
            return [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight.T.copy()}
        return [helper.make_node("Gather", ["w", "x"], ["y"])], {"w": weight}
    if scheme.activations.is_native:
        return _blockwise_matrix(layer, scheme, weight)
    per_channel = not isinstance(scheme.weights.granularity, PerTensor)
    codes, scales = centred_u8(weight, per_channel=per_channel)
    arrays: Arrays = {"w": codes.T.copy(), "s": scales, "z": np.full(len(scales), CENTRE, np.uint8)}
    if scheme.activations.static:
        arrays |= _steps("x", input_limits, factor, symmetric=scheme.activations.symmetric)
        inputs = ["xq", "w", "xs", "s", "xz", "z"]
        return [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("MatMulIntegerToFloat", inputs, ["y"], domain=_MICROSOFT),
        ], arrays
    inputs = ["x", "w", "s", "z"]
    return [helper.make_node("DynamicQuantizeMatMul", inputs, ["y"], domain=_MICROSOFT)], arrays


def _blockwise_matrix(layer: Layer, scheme: Scheme, weight: Float32) -> tuple[list[Any], Arrays]:
    fmt = scheme.weights
    assert isinstance(fmt.granularity, PerGroup)
    block, (rows, columns) = fmt.granularity.size, weight.shape
    packed = blockwise(weight, fmt.bits, block, symmetric=fmt.symmetric)
    arrays: Arrays = {"w": packed.codes, "s": packed.scales}
    if packed.zero_points is not None:
        arrays["z"] = packed.zero_points
    zero = ["z"] if packed.zero_points is not None else []
    shared = {"bits": fmt.bits, "block_size": block, "domain": _MICROSOFT}
    if layer.kind == "linear":
        sizes = {"K": columns, "N": rows, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "s", *zero], ["y"], **sizes, **shared)
    else:
        arrays["w"] = packed.codes.reshape(rows, -1)
        axes = {"gather_axis": 0, "quantize_axis": 1}
        inputs = ["w", "x", "s", *zero]
        node = helper.make_node("GatherBlockQuantized", inputs, ["y"], **axes, **shared)
    return [node], arrays


def _static_convolution(
    layer: Layer,
    scheme: Scheme,
    weight: Float32,
    input_limits: Limits,
    output_limits: Limits,
    factor: float,
) -> tuple[list[Any], Arrays]:
    per_channel = not isinstance(scheme.weights.granularity, PerTensor)
    codes, scales = centred_u8(weight, per_channel=per_channel)
    zeros = np.full(len(scales), CENTRE, np.uint8)
    arrays: Arrays = {
        "w": codes,
        "ws": scales if per_channel else scales.reshape(()),
        "wz": zeros if per_channel else zeros.reshape(()),
    }
    arrays |= _steps("x", input_limits, factor, symmetric=scheme.activations.symmetric)
    arrays |= _steps("y", output_limits, factor)
    inputs = ["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("QLinearConv", inputs, ["yq"], **geometry(layer)),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    return nodes, arrays


def _steps(name: str, limits: Limits, factor: float, *, symmetric: bool = False) -> Arrays:
    """Return scale and zero point of a static 8-bit range."""
    low, high = limits
    scale = factor * (max(-low, high) / 127 if symmetric else (high - low) / 255)
    zero = CENTRE if symmetric else np.clip(np.rint(-low / scale), 0, 255)
    return {f"{name}s": np.array(scale, np.float32), f"{name}z": np.array(zero, np.uint8)}


def geometry(layer: Layer) -> dict[str, Any]:
    """Return the attributes of Conv, QLinearConv or ConvTranspose for a convolution."""
    conv = layer.convolution
    assert conv is not None, layer.name
    attributes: dict[str, Any] = {
        "kernel_shape": conv.kernel,
        "strides": conv.stride,
        "pads": conv.padding + (conv.padding_end or conv.padding),
        "dilations": conv.dilation,
        "group": conv.groups,
    }
    if any(conv.output_padding):
        attributes["output_padding"] = conv.output_padding
    return attributes
