"""An ONNX model whose marked layers are the kernels that run their schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mpq.core.errors import InvalidInputError
from mpq.core.formats import PerGroup, PerTensor
from mpq.core.layers import LayerName
from mpq.deploy.marked import DOMAIN, OPSET, MarkedGraph, layer_of
from mpq.deploy.placed import Limits, Placed, static_step
from mpq.nn.quantizers import StoredWeight

_MICROSOFT = "com.microsoft"
_PREFIX = "model."  # of the exporter's names
_LARGEST = 2**31 - 1  # bytes of one file of this kind
_FLOAT, _UINT8, _INT32 = 1, 2, 6  # types as ONNX counts them

Arrays = dict[str, npt.NDArray[Any]]
_Rounded = tuple[str, Limits, bool]  # a tensor, its static range, and whether that is symmetric


class _Writer:
    """Collects the nodes and stored arrays that take the place of one marked node.

    An array that several layers share is stored once, under the name of its parameter; what
    only changes its layout or type is a node that the runtime runs once, when it loads. `codes`
    are the tensors that are there in 8 bits too, by tensor and range.
    """

    def __init__(self, arrays: Arrays, codes: dict[_Rounded, list[str]], prefix: str) -> None:
        self.arrays, self.codes, self.nodes = arrays, codes, list[Any]()
        self._prefix = prefix

    def stored(self, name: str, make: Callable[[], npt.NDArray[Any]]) -> str:
        """Return the name of an array, made where it is not there yet."""
        if name not in self.arrays:
            self.arrays[name] = make()
        return name

    def node(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        from onnx import helper

        output = output or f"{self._prefix}{operator}{len(self.nodes)}"
        name = f"{self._prefix}{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output


def with_kernels(marked: MarkedGraph, placed: Mapping[LayerName, Placed]) -> bytes:
    """Return the serialized model in which each marked node is its layer's kernel.

    Raises InvalidInputError (`no_node`) for a placed layer without a node, (`model_size`) above
    2 GB, the most that one file can hold.
    """
    from onnx import helper, numpy_helper

    model = marked.model()
    arrays: Arrays = {}
    codes: dict[_Rounded, list[str]] = {}
    nodes: list[Any] = []
    seen: dict[LayerName, int] = {}
    inside = {name for p in placed.values() if p.tail for name in p.tail.nodes}
    for node in model.graph.node:
        if node.domain != DOMAIN:
            nodes += [] if node.name in inside else [node]
            continue
        layer = layer_of(node)
        seen[layer] = seen.get(layer, 0) + 1
        writer = _Writer(arrays, codes, f"{layer}/{seen[layer]}/")
        _write(placed[layer], node.input[0], node.output[0], writer)
        nodes += writer.nodes
    nodes = _without_unread(nodes, [output.name for output in model.graph.output])
    for layer in placed:
        if layer not in seen:
            raise InvalidInputError(
                "no_node", f"layer {layer!r} has no ONNX node: nothing of it reaches the output"
            )
    _check_weights(model, placed)
    _replace_nodes(model, nodes, arrays)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", OPSET), helper.make_opsetid(_MICROSOFT, 1)])
    if model.ByteSize() > _LARGEST:
        raise InvalidInputError(
            "model_size", f"the ONNX model takes {model.ByteSize()} bytes: one file holds 2 GB"
        )
    serialized: bytes = model.SerializeToString()
    return serialized


def stored_bytes(serialized: bytes) -> int:
    """Return the bytes of all arrays that a model stores."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(serialized)
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def _check_weights(model: Any, placed: Mapping[LayerName, Placed]) -> None:
    """Raise InvalidInputError where a quantized weight is read by more than its layers."""
    outside = {tensor.name.removeprefix(_PREFIX) for tensor in model.graph.initializer}
    for layer, p in placed.items():
        if p.layer.weight_id in outside and not p.scheme.weights.is_native:
            raise InvalidInputError(
                "no_node",
                f"the weight of layer {layer!r} is read outside of its layers too, where no node "
                f"can be replaced: pin it to fp32",
            )


def _replace_nodes(model: Any, nodes: list[Any], arrays: Arrays) -> None:
    """Put other nodes in a model and give its arrays the names that they have in the network."""
    names = {
        tensor.name: tensor.name.removeprefix(_PREFIX)
        for tensor in model.graph.initializer
        if tensor.name.startswith(_PREFIX) and tensor.name.removeprefix(_PREFIX) not in arrays
    }
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    del model.graph.node[:]
    del model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _without_unread(nodes: list[Any], outputs: list[str]) -> list[Any]:
    """Leave out what turns codes into numbers that nobody reads, because they read the codes."""
    read = {name for node in nodes for name in node.input} | set(outputs)
    return [n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in read]


def _write(placed: Placed, source: str, target: str, writer: _Writer) -> None:
    kind, scheme = placed.layer.kind, placed.scheme
    if placed.tail is not None:
        _static_convolution(placed, source, placed.tail.output, writer)
        return
    output = target if placed.bias is None else ""
    if kind == "embedding" or kind == "linear":
        if scheme.is_native:
            made = _native_matrix(placed, source, output, writer)
        elif scheme.activations.is_native:
            made = _blockwise(placed, source, output, writer)
        elif scheme.activations.static:
            made = _static_matrix(placed, source, output, writer)
        else:
            made = _dynamic(placed, source, output, writer)
    elif scheme.is_native:
        made = _native_convolution(placed, source, output, writer)
    else:
        made = _static_convolution(placed, source, output, writer)
    if placed.bias is not None:
        bias = placed.bias
        spatial = (1,) * (0 if kind == "linear" else len(placed.layer.weight_shape) - 2)
        shaped = writer.stored(f"{placed.layer.name}.bias", lambda: bias.reshape(-1, *spatial))
        writer.node("Add", [made, shaped], target)


def _native_matrix(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    weight = writer.stored(placed.layer.weight_id, lambda: _array(placed))
    if placed.layer.kind == "embedding":
        return writer.node("Gather", [weight, source], output)
    turned = writer.node("Transpose", [weight], perm=[1, 0])
    return writer.node("MatMul", [source, turned], output)


def _blockwise(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    """MatMulNBits or GatherBlockQuantized on our codes, scales and zero points."""
    from hw_cost_models.measured.operands import pack_fields

    stored, fmt, name = _codes(placed), placed.scheme.weights, placed.layer.weight_id
    assert isinstance(fmt.granularity, PerGroup)
    block, (rows, columns) = fmt.granularity.size, placed.layer.weight_shape
    unsigned = _unsigned(stored).reshape(rows, columns)
    codes = writer.stored(f"{name}.codes", lambda: pack_fields(unsigned, fmt.bits))
    scales = _scales(stored, (rows, columns // block), name, writer)
    zeros = []
    if stored.zero_points is not None:
        points = stored.zero_points.numpy().reshape(rows, -1)
        zeros = [writer.stored(f"{name}.zero_points", lambda: pack_fields(points, fmt.bits))]
    shared = {"bits": fmt.bits, "block_size": block, "domain": _MICROSOFT}
    if placed.layer.kind == "embedding":
        axes = {"gather_axis": 0, "quantize_axis": 1}
        inputs = [codes, source, scales, *zeros]
        return writer.node("GatherBlockQuantized", inputs, output, **axes, **shared)
    shape = np.array([rows, columns // block, block * fmt.bits // 8])
    shaped = writer.node("Reshape", [codes, writer.stored(f"{name}.shape", lambda: shape)])
    sizes = {"K": columns, "N": rows, "accuracy_level": 4}
    return writer.node("MatMulNBits", [source, shaped, scales, *zeros], output, **sizes, **shared)


def _dynamic(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    """DynamicQuantizeMatMul: unsigned weights, because signed ones saturate without VNNI."""
    stored, name = _codes(placed), placed.layer.weight_id
    unsigned = _unsigned(stored).reshape(placed.layer.weight_shape)
    codes = writer.stored(f"{name}.codes", lambda: np.ascontiguousarray(unsigned.T))
    inputs = [source, codes, _scales(stored, (-1,), name, writer), _zeros(placed, writer)]
    return writer.node("DynamicQuantizeMatMul", inputs, output, domain=_MICROSOFT)


def _static_matrix(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    """MatMulIntegerToFloat behind the rounding of its input, weights as for a dynamic one."""
    stored, name = _codes(placed), placed.layer.weight_id
    unsigned = _unsigned(stored).reshape(placed.layer.weight_shape)
    codes = writer.stored(f"{name}.codes", lambda: np.ascontiguousarray(unsigned.T))
    assert placed.input_limits is not None
    symmetric = placed.scheme.activations.symmetric
    place = f"{placed.layer.name}.input"
    read, scale, zero = _rounded(source, place, placed.input_limits, symmetric, writer)
    scales = _scales(stored, (-1,), name, writer)
    inputs = [read, codes, scale, scales, zero, _zeros(placed, writer)]
    return writer.node("MatMulIntegerToFloat", inputs, output, domain=_MICROSOFT)


def _native_convolution(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    from hw_cost_models.measured.graphs import geometry

    operator = "ConvTranspose" if placed.layer.kind == "conv_transpose2d" else "Conv"
    weight = writer.stored(placed.layer.weight_id, lambda: _array(placed))
    return writer.node(operator, [source, weight], output, **geometry(placed.layer))


def _static_convolution(placed: Placed, source: str, output: str, writer: _Writer) -> str:
    """QLinearConv with its tail, between the rounding of its input and of what it writes."""
    from hw_cost_models.measured.graphs import geometry

    layer = placed.layer
    symmetric = placed.scheme.activations.symmetric
    assert placed.input_limits is not None
    assert placed.output_limits is not None
    read = _rounded(source, f"{layer.name}.input", placed.input_limits, symmetric, writer)
    steps = _steps(f"{layer.name}.output", placed.output_limits, writer)
    weights = _static_weights(placed, read[1], writer)
    operands = [*read, *weights[:3], *steps, *weights[3:]]
    made = writer.node("QLinearConv", operands, **geometry(layer))
    written = writer.node("DequantizeLinear", [made, *steps], output)
    writer.codes[written, placed.output_limits, False] = [made, *steps]
    return written


def _rounded(source: str, name: str, limits: Limits, symmetric: bool, writer: _Writer) -> list[str]:
    """Return a tensor's codes in a static range, scale and zero point, made where they are not."""
    key = (source, limits, symmetric)
    if key not in writer.codes:
        steps = _steps(name, limits, writer, symmetric=symmetric)
        writer.codes[key] = [writer.node("QuantizeLinear", [source, *steps]), *steps]
    return writer.codes[key]


def _static_weights(placed: Placed, input_scale: str, writer: _Writer) -> list[str]:
    """Return codes, scales, zero points and integer bias with the tail in them.

    The file has the arrays of the network; what they come to is computed when it is loaded:
    scales by |factor|, codes turned around 128 where it is negative, bias offset / scale.
    """
    stored, layer, tail = _codes(placed), placed.layer, placed.tail
    per_tensor = isinstance(placed.scheme.weights.granularity, PerTensor)
    unsigned = _unsigned(stored).reshape(layer.weight_shape)
    codes = writer.stored(f"{layer.weight_id}.codes", lambda: unsigned)
    scales = _scales(stored, () if per_tensor else (-1,), layer.weight_id, writer)
    zeros = _zeros(placed, writer)
    if tail is None or (tail.norm is None and placed.bias is None):
        return [codes, scales, zeros]
    bias = placed.bias
    offset = "" if bias is None else writer.stored(f"{layer.name}.bias", lambda: bias)
    if tail.norm is not None:
        weight, shift, mean, variance = tail.norm.arrays
        epsilon = writer.node("Constant", [], value_float=tail.norm.epsilon)
        deviation = writer.node("Sqrt", [writer.node("Add", [variance, epsilon])])
        factor = writer.node("Div", [weight, deviation])
        centred = writer.node("Sub", [offset, mean]) if offset else writer.node("Neg", [mean])
        offset = writer.node("Add", [writer.node("Mul", [centred, factor]), shift])
        scales = writer.node("Mul", [scales, writer.node("Abs", [factor])])
        if (tail.factor < 0).any():
            codes = _turned(codes, factor, layer.weight_shape, writer)
    accumulated = writer.node("Mul", [scales, input_scale])
    counted = writer.node("Round", [writer.node("Div", [offset, accumulated])])
    return [codes, scales, zeros, writer.node("Cast", [counted], to=_INT32)]


def _turned(codes: str, factor: str, shape: tuple[int, ...], writer: _Writer) -> str:
    """Return codes c as 256 - c in the channels of a negative factor."""
    name = f"channels.{len(shape)}d"
    spread = writer.stored(name, lambda: np.array([-1, *(1,) * (len(shape) - 1)]))
    signs = writer.node("Reshape", [writer.node("Sign", [factor]), spread])
    middle = writer.node("Constant", [], value_float=128.0)
    centred = writer.node("Sub", [writer.node("Cast", [codes], to=_FLOAT), middle])
    turned = writer.node("Add", [writer.node("Mul", [centred, signs]), middle])
    return writer.node("Cast", [turned], to=_UINT8)


def _steps(name: str, limits: Limits, writer: _Writer, *, symmetric: bool = False) -> list[str]:
    """Store scale and zero point of a static 8-bit range, computed as the search computes them."""
    scale = static_step(limits, symmetric=symmetric)
    low = np.float32(limits[0])
    zero = np.uint8(128) if symmetric else np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8)
    return [
        writer.stored(f"{name}.scale", lambda: np.array(scale, np.float32)),
        writer.stored(f"{name}.zero_point", lambda: np.array(zero)),
    ]


def _codes(placed: Placed) -> StoredWeight:
    assert isinstance(placed.weight, StoredWeight)
    return placed.weight


def _array(placed: Placed) -> npt.NDArray[np.float32]:
    assert isinstance(placed.weight, np.ndarray)
    return placed.weight


def _unsigned(stored: StoredWeight) -> npt.NDArray[np.uint8]:
    """Return codes as kernels count them: from 0, symmetric ones around 2^(bits - 1)."""
    offset = 2 ** (stored.fmt.bits - 1) if stored.fmt.symmetric else 0
    return (stored.codes.numpy() + offset).astype(np.uint8)


def _scales(stored: StoredWeight, shape: tuple[int, ...], name: str, writer: _Writer) -> str:
    """Store scales as the 16 bits that they have, and widen them when the model is loaded."""
    half = stored.scales.numpy().astype(np.float16).reshape(shape)
    return writer.node("Cast", [writer.stored(f"{name}.scales", lambda: half)], to=_FLOAT)


def _zeros(placed: Placed, writer: _Writer) -> str:
    """Store the zero points of integer weights: of one tensor, or of each channel."""
    stored = _codes(placed)
    per_tensor = isinstance(placed.scheme.weights.granularity, PerTensor)
    points: npt.NDArray[np.uint8]
    if stored.zero_points is not None:
        points = stored.zero_points.numpy().astype(np.uint8).reshape(-1)
        name = f"{placed.layer.weight_id}.zero_points"
    else:
        points, name = np.full(len(stored.scales), 128, np.uint8), f"zeros.{len(stored.scales)}"
    if per_tensor and placed.layer.kind != "linear":
        points, name = points.reshape(()), f"{name}.scalar"
    return writer.stored(name, lambda: points)
