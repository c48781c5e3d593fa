"""Which ONNX Runtime CPU kernel runs a layer in a scheme, and what one layer is offered."""

from __future__ import annotations

import math

from mpq.core.formats import FP32, Format, PerGroup, PerTensor, Scheme, parse_scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Layer

BACKEND = "onnxruntime"
RUNTIME = "ONNX Runtime on this processor"
_BLOCKS = (16, 32, 64, 128, 256)
_TWO_BIT_BLOCKS = (32, 64, 128)
_DEFAULT = {
    # The largest block that divides is used where a tuple offers several.
    "linear": (
        ("fp32",),
        ("int8:int8",),
        ("int8g64", "int8g32", "int8g16"),
        ("int4g128", "int4g64"),
        ("int4g32", "int4g16"),
        ("int2g32a",),  # symmetric 2 bits are three levels: 2.6 times the rounding error
    ),
    "embedding": (("fp32",), ("int8g64", "int8g32", "int8g16"), ("int4g32", "int4g16")),
    "conv1d": (("fp32",), ("int8:int8",)),
    "conv2d": (("fp32",), ("int8:int8",)),
    "conv_transpose2d": (("fp32",),),
}


def kernel_for(layer: Layer, scheme: Scheme) -> KernelCase | None:
    """Return the kernel that runs `layer` in `scheme`, None where there is no real one.

    fp32: MatMul, Conv, ConvTranspose, Gather.
    int8:int8 (weights per channel or tensor): linear layers run DynamicQuantizeMatMul, which
    quantizes the activations of the whole tensor at run time; convolutions run QLinearConv with
    a static activation scale, and the QuantizeLinear before, the DequantizeLinear after it and
    the changes of layout that the runtime adds are part of the kernel, because the neighbours
    may be fp32; a static range may be symmetric, int8:int8s, which is the zero point 128 of the
    same kernel. Linear layers with static activations, int8:int8static, run MatMulIntegerToFloat
    behind a QuantizeLinear that is a part of it. All take *unsigned* weights:
    signed ones meet unsigned activations in a 16-bit saturating multiply-add on x86 without
    VNNI, and are wrong by up to half of the output.
    int2, int4, int8 in groups of 16 to 256 (2 bits: 32 to 128) with fp32 activations:
    MatMulNBits with accuracy_level=4, which itself rounds the activations to int8 in blocks of
    the group size (its error is that of an 8-bit activation, a few 1e-3 of the output's range);
    embeddings run GatherBlockQuantized.
    """
    found = _decide(layer, scheme)
    return found if isinstance(found, KernelCase) else None


def why_no_kernel(layer: Layer, scheme: Scheme) -> str:
    """Return why nothing runs `layer` in `scheme`, "" where something does."""
    found = _decide(layer, scheme)
    return found if isinstance(found, str) else ""


def default_schemes(layer: Layer) -> tuple[Scheme, ...]:
    """Return a short list of what is worth trying for a layer, each with a kernel.

    None is wider than the layer's weights: kernels run 16-bit floating-point layers in integers
    only, so a layer that has no integer kernel gets an empty list.
    """
    offered = []
    for alternatives in _DEFAULT.get(layer.kind, ()):
        runs = [
            scheme
            for scheme in map(parse_scheme, alternatives)
            if scheme.weights.bits * layer.num_weights <= 8 * layer.weight_bytes
            and kernel_for(layer, scheme) is not None
        ]
        offered += runs[:1]
    return tuple(offered)


def _decide(layer: Layer, scheme: Scheme) -> KernelCase | str:
    if layer.kind not in _DEFAULT:
        return f"no ONNX Runtime kernel for a layer of kind {layer.kind!r}"
    if not layer.input_shape:
        return f"layer {layer.name!r} is not called on the sample, so its shape is unknown"
    scheme = scheme.as_stored
    if not_integers := why_no_integers(scheme):
        return f"{scheme}: {RUNTIME} has no kernel for {not_integers}"
    weights, activations = scheme.weights, scheme.activations
    if scheme.is_native:
        found = _native(layer, weights)
    elif weights.is_native:
        found = f"{scheme}: no kernel takes {weights.family} weights and integer activations"
    elif activations == FP32:
        found = _weight_only(layer, weights, scheme)
    else:
        found = _integer(layer, scheme)
    name, is_kernel = found if isinstance(found, tuple) else (found, False)
    return KernelCase(BACKEND, name, shape_text(layer)) if is_kernel else name


_Found = str | tuple[str, bool]


def _native(layer: Layer, weights: Format) -> _Found:
    if weights.family != "fp32":
        return f"{weights.family}: ONNX Runtime computes on this CPU in fp32 only"
    names = {"linear": "MatMul", "embedding": "Gather", "conv_transpose2d": "ConvTranspose"}
    return f"{names.get(layer.kind, 'Conv')} fp32", True


def _integer(layer: Layer, scheme: Scheme) -> _Found:
    weights, activations = scheme.weights, scheme.activations
    if layer.kind not in ("linear", "conv1d", "conv2d"):
        return f"{scheme}: no integer kernel for {layer.kind}; it runs in fp32"
    is_dynamic = layer.kind == "linear" and not activations.static
    if activations.bits != 8 or (activations.symmetric and is_dynamic):
        return (
            f"{scheme}: integer kernels of {layer.kind} take asymmetric 8-bit activations; "
            f"write {weights.text('weights')}:int8"
        )
    if weights.bits != 8:
        return f"{scheme}: with int8 activations kernels take 8-bit weights only; use int8:int8"
    if isinstance(weights.granularity, PerGroup):
        return f"{scheme}: integer kernels take one scale per channel or tensor; use int8:int8"
    scales = "per tensor" if isinstance(weights.granularity, PerTensor) else "per channel"
    if layer.kind == "linear" and activations.static:
        return f"QuantizeLinear+MatMulIntegerToFloat u8 weights {scales}", True
    if layer.kind == "linear":
        return f"DynamicQuantizeMatMul u8 weights {scales}", True
    return f"QuantizeLinear+QLinearConv+DequantizeLinear u8 weights {scales}", True


def _weight_only(layer: Layer, weights: Format, scheme: Scheme) -> _Found:
    if layer.kind not in ("linear", "embedding"):
        return f"{scheme}: no kernel quantizes the weights of {layer.kind} alone; use int8:int8"
    name = "MatMulNBits" if layer.kind == "linear" else "GatherBlockQuantized"
    if weights.bits not in (2, 4, 8):
        return f"no ONNX Runtime kernel for int{weights.bits}: {name} runs 2, 4 and 8 bits"
    if not isinstance(weights.granularity, PerGroup):
        return f"{scheme}: {name} needs groups, for example int{weights.bits}g64"
    block = weights.granularity.size
    if block not in _BLOCKS:
        return f"{scheme}: {name} runs groups of {', '.join(map(str, _BLOCKS))}"
    if layer.weight_shape[1] % block:
        return (
            f"{scheme}: groups of {block} do not divide the {layer.weight_shape[1]} "
            f"inputs of layer {layer.name!r}"
        )
    if layer.kind == "embedding" and weights.bits == 2:
        return f"{scheme}: {name} is used for 4 and 8 bits only"
    if weights.bits == 2 and block not in _TWO_BIT_BLOCKS:
        return f"{scheme}: {name} unpacks 2-bit groups of {block} in every call; use int2g32"
    zero_points = "" if weights.symmetric else " zero_points"
    level = " accuracy_level=4" if layer.kind == "linear" else ""
    return f"{name} bits={weights.bits} block={block}{level}{zero_points}", True


def why_no_integers(scheme: Scheme) -> str:
    """Return the format of a scheme that is no plain integer, nor native; "" without one."""
    if not (scheme.weights.is_native or scheme.weights.is_plain_integer):
        return f"weights in {scheme.weights.text('weights')}"
    if not (scheme.activations.is_native or scheme.activations.is_plain_integer):
        return f"activations in {scheme.activations.text('activations')}"
    return ""


def linear_rows(layer: Layer) -> int:
    """Return the rows of a linear layer's (or indices of an embedding's) first call."""
    shape = layer.input_shape if layer.kind == "embedding" else layer.input_shape[:-1]
    return math.prod(shape)


def shape_text(layer: Layer) -> str:
    """Return the canonical text of the operands, such as "linear 64x384->1536"."""
    outputs, inputs = layer.weight_shape[:2]
    if layer.kind == "linear":
        return f"linear {linear_rows(layer)}x{inputs}->{outputs}"
    if layer.kind == "embedding":
        return f"embedding {linear_rows(layer)} of {outputs}x{inputs}"
    conv = layer.convolution
    assert conv is not None, layer.name
    parts = {"k": conv.kernel, "s": conv.stride, "p": conv.padding, "d": conv.dilation}
    if conv.padding_end:
        parts["e"] = conv.padding_end
    if any(conv.output_padding):
        parts["o"] = conv.output_padding
    geometry = " ".join(mark + "x".join(map(str, sizes)) for mark, sizes in parts.items())
    shape = "x".join(map(str, layer.input_shape))
    return f"{layer.kind} {shape}->{layer.output_shape[1]} {geometry} g{conv.groups}"
