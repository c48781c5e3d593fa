"""Which kernel of torch on this processor runs a layer in a scheme, and what one is offered."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from hw_cost_models.measured.capability import shape_text, why_no_integers
from hw_cost_models.measured.torch_modules import (
    ENGINE,
    REDUCED_BITS,
    StaticConvolution,
    StaticLinear,
    Steps,
    engine,
    quiet,
)
from mpq.core.formats import FP32, PerGroup, PerTensor, Scheme, parse_format, parse_scheme
from mpq.core.latency import KernelCase
from mpq.core.layers import Convolution, Layer

BACKEND = "torch_cpu"
RUNTIME = "torch on this processor"

_FP32 = {
    "linear": "linear",
    "embedding": "embedding",
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "conv_transpose2d": "conv_transpose2d",
}
_CONVOLUTION = ("conv1d", "conv2d")  # in integers
# The first that runs is offered where a tuple has several.
_DEFAULT = {
    "linear": (("fp32",), ("fp16",), ("int8:int7",)),
    **dict.fromkeys(_CONVOLUTION, (("fp32",), ("int8:int8", "int8:int7"))),
}
_DYNAMIC = tuple(parse_format(text, "activations") for text in ("int7", "int8"))
_STATIC = (*_DYNAMIC, *(parse_format(text, "activations") for text in ("int7s", "int8s")))
_STATIC_KERNEL = {
    "linear": "quantized::linear_with_input_q_dq_qweight_dq_output_fp32",
    "conv1d": "quantized::conv1d",
    "conv2d": "quantized::conv2d",
}
_EXACT = 0.99  # of the right sum; one that saturates is near a half
# What executes, but is no evidence of a format's time: 0.01 to 0.6 of the speed of fp32 with
# AVX2, and with VNNI and AVX512_BF16 the loops of the last two lines still take 0.01 to 0.14.
_NO_EVIDENCE = {
    "bf16": "torch.nn.functional.{kind} in bf16 rounds activations too, and only emulates bf16 "
    "without AMX or AVX512_BF16",
    "fp16": "torch.nn.functional.{kind} in fp16 rounds activations too, and only emulates fp16 "
    "without AVX512_FP16",
    "symmetric": "torch._int_mm quantizes no activations and is a reference loop without VNNI",
    "int8": "torch._weight_int8pack_mm is a reference loop in fp32",
    "int4": "torch._weight_int4pack_mm_for_cpu and torch._dyn_quant_matmul_4bit are reference "
    "loops in fp32",
}


def why_not(layer: Layer, scheme: Scheme) -> str:
    """Return why no real kernel of torch runs `layer` in `scheme`, "" where one does.

    fp32: linear, embedding, conv1d, conv2d, conv_transpose2d of torch, with MKL and oneDNN.
    fp16, linear: quantized::linear_dynamic_fp16, weights in fp16, all else in fp32.
    int8:int7, linear (weights per channel or tensor): quantized::linear_dynamic, signed 8-bit
    weights; the activations of the whole tensor are quantized at run time, with reduce_range to
    7 bits, so that the 16-bit multiply-add of x86 without VNNI does not saturate. The same
    kernel is what torch calls int8 dynamic: it is taken for int8:int8 too, whose activations it
    rounds twice as coarsely as the scheme says.
    int8:int8static, int8:int7static, linear: a product with a static range of its input, for
    which 7 bits are what they are for convolutions.
    int8:int8, int8:int7, conv1d and conv2d (weights per channel or tensor; the static range may
    be symmetric, int8:int8s): quantized::conv1d and conv2d with signed 8-bit weights, between the
    quantize_per_tensor before and the dequantize after, because the neighbours may be fp32. The
    output is rounded to 8 bits of a static range. 8-bit activations are refused where this
    processor's kernel for the layer saturates, as those without VNNI do: a product whose
    sum is known is run to see it. 7 bits never saturate; inputs outside of their range, which
    would reach further codes of the byte, are clamped, and that is a part of the kernel.
    """
    found = _decide(layer, scheme)
    return found if isinstance(found, str) else ""


def kernel_for(layer: Layer, scheme: Scheme) -> KernelCase | None:
    """Return the kernel that runs `layer` in `scheme`, None where there is no real one."""
    found = _decide(layer, scheme)
    return found if isinstance(found, KernelCase) else None


def default_schemes(layer: Layer) -> tuple[Scheme, ...]:
    """Return what is worth trying for a layer, each with a kernel, none wider than its weights."""
    offered: list[Scheme] = []
    for alternatives in _DEFAULT.get(layer.kind, (("fp32",),)):
        runs = [
            scheme
            for scheme in map(parse_scheme, alternatives)
            if scheme.weights.bits * layer.num_weights <= 8 * layer.weight_bytes
            and not why_not(layer, scheme)
        ]
        offered += runs[:1]
    return tuple(offered)


def _decide(layer: Layer, scheme: Scheme) -> KernelCase | str:
    if layer.kind not in _FP32:
        return f"no kernel of torch here for a layer of kind {layer.kind!r}"
    if not layer.input_shape:
        return f"layer {layer.name!r} is not called on the sample, so its shape is unknown"
    scheme = scheme.as_stored
    if not_integers := why_no_integers(scheme):
        return f"{scheme}: {RUNTIME} has no kernel for {not_integers}"
    if scheme == Scheme(FP32):
        return KernelCase(BACKEND, f"aten::{_FP32[layer.kind]} fp32", shape_text(layer))
    if scheme.activations == FP32:
        if str(scheme) == "fp16" and layer.kind == "linear":
            name = f"quantized::linear_dynamic_fp16 {ENGINE}"
            return KernelCase(BACKEND, name, shape_text(layer))
        return _weights_alone(layer, scheme)
    if layer.kind != "linear" and layer.kind not in _CONVOLUTION:
        return f"{scheme}: no integer kernel of torch here for {layer.kind}; it runs in fp32"
    name = _integer(layer, scheme)
    return name if name.startswith(f"{scheme}: ") else KernelCase(BACKEND, name, shape_text(layer))


def _integer(layer: Layer, scheme: Scheme) -> str:
    """Return the integer kernel, or why there is none, which begins with the scheme."""
    weights, activations = scheme.weights, replace(scheme.activations, static=False)
    linear = layer.kind == "linear" and not scheme.activations.static
    name = "quantized::linear_dynamic" if linear else _STATIC_KERNEL[layer.kind]
    if linear and activations.symmetric:
        return f"{scheme}: {_NO_EVIDENCE['symmetric']}; write int8:int7"
    taken = _DYNAMIC if linear else _STATIC
    if (weights.family, weights.bits) != ("int", 8) or activations not in taken:
        of_whom = "dynamic " if linear else ""
        return (
            f"{scheme}: {name} takes 8-bit weights and 7- or 8-bit {of_whom}activations; "
            "use int8:int7"
        )
    if isinstance(weights.granularity, PerGroup) or not weights.symmetric:
        return (
            f"{scheme}: {name} takes symmetric weights with one scale per "
            "channel or tensor; use int8:int7"
        )
    scales = "per tensor" if isinstance(weights.granularity, PerTensor) else "per channel"
    if linear:
        return f"{name} {ENGINE} reduce_range s8 weights {scales}"
    if activations.bits > REDUCED_BITS and saturates(layer):
        return (
            f"{scheme}: {name} overflows on this processor where 8-bit activations meet signed "
            f"8-bit weights; write int8:{replace(scheme.activations, bits=7).text('activations')}"
        )
    clamp = "" if activations.bits > REDUCED_BITS else "clamp+"
    if layer.kind == "linear":
        return f"{clamp}{name} {ENGINE} s8 weights {scales}"
    return f"quantize_per_tensor+{clamp}{name}+dequantize {ENGINE} s8 weights {scales}"


def _weights_alone(layer: Layer, scheme: Scheme) -> str:
    family = scheme.weights.text("weights") if scheme.is_native else f"int{scheme.weights.bits}"
    if family not in _NO_EVIDENCE or (layer.kind != "linear" and not scheme.is_native):
        return f"{scheme}: no kernel of torch here quantizes the weights of {layer.kind} so"
    return f"{scheme}: {_NO_EVIDENCE[family].format(kind=layer.kind)}; it is not timed"


def saturates(layer: Layer) -> bool:
    """Tell whether this processor's kernel with a static range overflows at 8 bits.

    Runs it where all activations and weights are the largest: a multiply-add that saturates in
    16 bits returns half of the sum. What decides is the instruction set and the geometry.
    """
    if layer.kind == "linear":
        return _product_saturates(layer.weight_shape, ENGINE)
    assert layer.convolution is not None, layer.name
    return _saturates(layer.weight_shape, layer.convolution, ENGINE)


@functools.cache
def _product_saturates(shape: tuple[int, ...], _: str) -> bool:
    codes, scales = torch.full(shape, 127, dtype=torch.int8), torch.ones(shape[0])
    with engine(), quiet(), torch.inference_mode():
        kernel = StaticLinear(codes, scales, None, Steps(1.0, 0, 255))
        found = kernel(torch.full((16, shape[1]), 255.0))
    return float(found.max()) < _EXACT * 127.0 * 255.0 * shape[1]


@functools.cache
def _saturates(shape: tuple[int, ...], conv: Convolution, _: str) -> bool:
    full = 127.0 * 255.0 * torch.Size(shape[1:]).numel()  # the sum, where no padding takes part
    spans = zip(conv.kernel, conv.dilation, conv.stride, strict=True)
    sizes = [2 * (dilation * (kernel - 1) + 1 + stride) for kernel, dilation, stride in spans]
    codes, scales = torch.full(shape, 127, dtype=torch.int8), torch.ones(shape[0])
    with engine(), quiet(), torch.inference_mode():
        inputs = Steps(1.0, 0, 255)
        kernel = StaticConvolution(codes, scales, None, conv, inputs, Steps(full / 200, 0, 255))
        found = kernel(torch.full((1, shape[1] * conv.groups, *sizes), 255.0))
    return float(found.max()) < _EXACT * full
